"""`idloss export`: networks for onnxruntime and torch.export, and what fp16 and int8 cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from idloss.data import EvaluationSet

_CALIBRATION = 64  # faces, spread over the set
_PROBE = (14, 12)


def export(
    model: Annotated[str, typer.Argument(help="An FNet or SRNet with weights.")],
    to: Annotated[Path, typer.Option(help="FILE.onnx, or FILE.pt2 for torch.export.")],
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Of an FNet: from crops of any size, RGB in [0, 1].")
    ] = False,
    crop: Annotated[
        str | None, typer.Option(help="Template of the encoder's crops. [default: the FNet's]")
    ] = None,
    interpolation: Annotated[
        str, typer.Option(help="How the encoder enlarges: bicubic, bilinear, nearest.")
    ] = "bicubic",
    flip: Annotated[
        bool, typer.Option("--flip", help="The encoder adds the embedding of the mirror image.")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, fp16, or int8 (.onnx).")] = "fp32",
    opset: Annotated[int, typer.Option(help="Of ONNX.")] = 18,
    data: Annotated[
        Path | None, typer.Option(help="LFW, say: sets int8, and the accuracy is measured there.")
    ] = None,
    judge: Annotated[
        str, typer.Option(help="FNet that measures an SRNet, at 14x12.")
    ] = "mobilefacenet",
) -> None:
    """Export a network as ONNX or torch.export file, compared with torch."""
    from idloss import FaceEncoder, create_fnet, create_srnet
    from idloss.catalogue import describe_model
    from idloss.data import open_evaluation
    from idloss.export import export as run

    bare = model.startswith(("timm/", "spandrel:"))
    is_fnet = model.startswith("timm/") if bare else describe_model(model).kind == "FNet"
    if encoder and not is_fnet:
        raise ValueError(f"{model} is an SRNet, and --encoder is for FNets")
    net: nn.Module = (create_fnet if is_fnet else create_srnet)(model, pretrained=True)
    if encoder:
        options: dict[str, Any] = {"crop": crop, "interpolation": interpolation, "flip": flip}
        net = FaceEncoder(net, **options)
    found = None if data is None else open_evaluation(data)
    faces = None if found is None else _seen(net, found, is_fnet=is_fnet)
    settings: dict[str, Any] = {"precision": precision, "opset": opset}
    made = run(net, to, faces=faces, **settings)
    shape = ", ".join(map(str, made.inputs))
    kind = f"ONNX of opset {opset}" if to.suffix == ".onnx" else "torch.export"
    typer.echo(
        f"{to}: {kind}, {precision}, {to.stat().st_size:,} bytes, takes [{shape}], within "
        f"{made.error:.1e} of torch"
    )
    if found is not None and to.suffix == ".onnx":
        judging = None if is_fnet else create_fnet(judge, pretrained=True)
        typer.echo(_cost(net, to, found, precision, judging), nl=False)


def _seen(net: nn.Module, found: EvaluationSet, *, is_fnet: bool) -> Tensor:
    """Faces of a set as a network takes them: normalised for an FNet, LR for an SRNet."""
    import torch

    from idloss import FaceEncoder
    from idloss.evaluation.embedding import fit_size
    from idloss.geometry import get_template
    from idloss.registry import srnet_crop
    from idloss.resample import resize, to_float

    places = torch.linspace(0, len(found.faces) - 1, min(_CALIBRATION, len(found.faces))).long()
    if isinstance(net, FaceEncoder) or is_fnet:
        encoder = net if isinstance(net, FaceEncoder) else FaceEncoder(net, interpolation="bicubic")
        crop = encoder.crop or encoder.fnet_crop or get_template("sphereface")
        crops = to_float(found.faces.crops_at(places, crop))
        return crops if encoder is net else encoder.preprocess(crops)
    crop = get_template(srnet_crop(net))
    crops = found.faces.crops_at(places, crop)
    return to_float(resize(crops, fit_size(_PROBE, crop)))


def _cost(
    net: nn.Module, path: Path, found: EvaluationSet, precision: str, judge: nn.Module | None
) -> str:
    """The table of a network and of its file, at HR or of an SRNet at 14x12."""
    from torch import nn

    from idloss import FaceEncoder, create_fnet
    from idloss.evaluation import evaluate, paper_table
    from idloss.export import Exported

    both: dict[str, nn.Module] = {"torch": net, f"onnx-{precision}": Exported(path, net)}
    if isinstance(net, FaceEncoder):  # an FNet of RGB [0, 1]
        crop = net.crop or net.fnet_crop
        size = net.input_size if crop is None else crop.size
        about: dict[str, Any] = {"input_size": (3, *size), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        both = {
            label: create_fnet(nn.Sequential(one), crop=crop, **about)
            for label, one in both.items()
        }
    if judge is None:
        results = evaluate(found, both, {}, (), device="cpu")
    else:
        results = evaluate(found, {"judge": judge}, both, (_PROBE,), device="cpu")
    return paper_table(results, "verification")
