"""ONNX and torch.export files of SRNets, FNets and whole encoders, compared with torch."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from idloss.encoder import FaceEncoder
from idloss.errors import did_you_mean, import_extra
from idloss.registry import cfg_of

Precision = Literal["fp32", "fp16", "int8"]

OPSET = 18
"""Of ONNX files: the first in which Resize antialiases."""
TOLERANCE = 1e-4
"""How far outputs in fp32 may be from torch's: absolute up to 1, then relative to the largest."""
_CALIBRATION = 8  # faces at a time; they are held in memory, layer by layer


@dataclass(frozen=True)
class Export:
    """What was written, and how far its outputs are from torch's.

    Args:
        path: The file.
        inputs: Shape of what it takes; names stand for any number.
        error: Largest deviation from torch in fp32, absolute up to 1, then relative to the largest
            output.
    """

    path: Path
    inputs: tuple[int | str, ...]
    error: float


def export(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    size: tuple[int, int] | None = None,
    faces: Tensor | None = None,
    opset: int = OPSET,
) -> Export:
    """Write a network for onnxruntime or `torch.export.load`, and see that it does the same there.

    The file takes any number of images, and of any size where the network does. Its input and
    output are float32 whatever it computes in.

    Args:
        net: An SRNet or a `FaceEncoder`, from RGB [0, 1] `[B, 3, H, W]`, or an FNet, from what its
            `pretrained_cfg` says.
        path: `.onnx`, or `.pt2` for `torch.export`.
        precision: `"fp16"` is half the size; `"int8"`, for ONNX, a quarter.
        size: Rows and columns of images that it takes; None for those of its `pretrained_cfg`, or
            of an encoder's crop.
        faces: Images `[N, 3, H, W]` as it takes them, some 50 and more, by which int8 is set.
        opset: Of ONNX.

    Returns:
        What was written.

    Raises:
        ValueError: If an option is not valid, or the network cannot be exported.
        RuntimeError: If the file does not give what torch gives; it is not kept.
        ImportError: If a package is missing.
    """
    target = Path(path)
    _check(target, precision, faces)
    net = copy.deepcopy(net).cpu().eval()
    wanted = size or _own_size(net)
    program, inputs = _trace(net, wanted)
    written = program if precision != "fp16" else _trace(_Half(net), wanted)[0]
    with TemporaryDirectory(prefix="idloss-export-") as folder:
        made = Path(folder, "made")
        if target.suffix == ".pt2":
            torch.export.save(written, made)
        else:
            _write_onnx(written, made, opset, inputs, _told(net))
        if precision == "int8" and faces is not None:
            _quantise(made, faces)
        error = _compare(net, made, target.suffix, wanted, inputs)
        if precision == "fp32" and not error <= TOLERANCE:
            raise RuntimeError(
                f"the exported {type(net).__name__} is {error:.1e} away from torch, more than "
                f"{TOLERANCE:.0e}: it was not kept"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, target)
    return Export(target, inputs, error)


class Exported(nn.Module):
    """An ONNX file of `export` as a module, on the CPU: to be measured; no gradient comes back.

    Args:
        path: The file.
        like: The network it was made from, whose `pretrained_cfg` and crop it has.
    """

    def __init__(self, path: str | os.PathLike[str], like: nn.Module) -> None:
        super().__init__()
        self.session = _session(Path(path))
        for name in ("pretrained_cfg", "num_features", "crop", "scale"):
            if hasattr(like, name):
                setattr(self, name, getattr(like, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Exported:
        return self  # nobody can change it, and a session is not to be copied

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` as the network takes them to what it gives."""
        (given,) = self.session.run(None, {"images": images.detach().cpu().float().numpy()})
        return torch.from_numpy(given)


class _Half(nn.Module):
    """A network in fp16 between float32 images and outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).half()

    def forward(self, images: Tensor) -> Tensor:
        # an encoder resamples in float32, and rounds afterwards
        taken = images if isinstance(self.net, FaceEncoder) else images.half()
        given: Tensor = self.net(taken)
        return given.float()


def _check(target: Path, precision: str, faces: Tensor | None) -> None:
    if target.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"an export is a .onnx or a .pt2 file, got {target.name!r}")
    if precision not in get_args(Precision):
        raise ValueError(did_you_mean("precision", precision, get_args(Precision)))
    if target.suffix == ".onnx":
        import_extra("onnxruntime", "export", "ONNX files need")
        import_extra("onnxscript", "export", "ONNX files need")
    if precision == "int8" and target.suffix != ".onnx":
        raise ValueError("int8 is for .onnx files")
    if precision == "int8" and faces is None:
        raise ValueError("int8 is set by faces as the network will see them: give faces= or --data")


def _own_size(net: nn.Module) -> tuple[int, int]:
    if isinstance(net, FaceEncoder):
        own = net.crop or net.fnet_crop
        return net.input_size if own is None else own.size
    known = cfg_of(net).get("input_size")
    if known is None:
        raise ValueError(f"{type(net).__name__} does not say which images it takes: give size=")
    return int(known[-2]), int(known[-1])


def _trace(net: nn.Module, size: tuple[int, int]) -> tuple[ExportedProgram, tuple[int | str, ...]]:
    """A graph for any number of images, of any size if it takes them; what it takes."""
    half = (size[0] + 1) // 2, (size[1] + 1) // 2  # which networks of one size refuse at once
    reason = ""
    for axes, shape in (({0: "batch", 2: "height", 3: "width"}, half), ({0: "batch"}, size)):
        example = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        free = {axis: Dim(name) for axis, name in axes.items()}
        try:
            with torch.no_grad():
                program = torch.export.export(net, (example,), dynamic_shapes=(free,))
        except Exception as error:  # whatever a network raises
            reason = " ".join(str(error).split())[:300]
            continue
        return program, tuple(axes.get(axis, side) for axis, side in enumerate(example.shape))
    raise ValueError(f"{type(net).__name__} cannot be exported: {reason}")


def _told(net: nn.Module) -> dict[str, str]:
    """What whoever finds the file should know: what it takes, and under which licence it is."""
    whole = isinstance(net, FaceEncoder)
    cfg = cfg_of(net.fnet if isinstance(net, FaceEncoder) else net)
    crop: Any = net.crop if hasattr(net, "crop") else None
    told = {
        "model": ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))),
        "channel_order": "rgb",
        "mean": "0.0, 0.0, 0.0" if whole else ", ".join(map(str, cfg.get("mean", ()))),
        "std": "1.0, 1.0, 1.0" if whole else ", ".join(map(str, cfg.get("std", ()))),
        "crop": getattr(crop, "name", crop),
        "licence": cfg.get("license"),
        "origin": cfg.get("origin_url"),
    }
    return {f"idloss.{key}": str(value) for key, value in told.items() if value}


def _write_onnx(
    program: ExportedProgram,
    path: Path,
    opset: int,
    inputs: tuple[int | str, ...],
    told: dict[str, str],
) -> None:
    free = {axis: name for axis, name in enumerate(inputs) if isinstance(name, str)}
    converted: Any = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=["output"],
        opset_version=opset,
        dynamic_shapes=(free,),  # the axes' names; they are free already
        dynamo=True,
        verbose=False,
    )
    converted.model.metadata_props.update(told)
    converted.save(path, external_data=False)


def _session(path: Path) -> Any:
    onnxruntime = import_extra("onnxruntime", "export", "ONNX files need")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantise(path: Path, faces: Tensor) -> None:
    """Weights of 7 bits, with which no processor's sums overflow, and activations of 8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(faces.split(_CALIBRATION))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.float().numpy()}

    prepared = path.with_name("prepared")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        path,
        Reader(),
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


@torch.no_grad()
def _compare(
    net: nn.Module,
    path: Path,
    suffix: str,
    size: tuple[int, int],
    inputs: tuple[int | str, ...],
) -> float:
    """The largest deviation, for one image and for three, of two sizes where it takes them."""
    again: Any = torch.export.load(path).module() if suffix == ".pt2" else Exported(path, net)
    other = (size[0] // 2 or 1, size[1]) if isinstance(inputs[2], str) else size
    generator, errors = torch.Generator().manual_seed(1), []
    for count, shape in ((1, size), (3, other)):
        images = torch.rand(count, 3, *shape, generator=generator)
        expected, got = net(images), again(images)
        errors.append(float((got - expected).abs().max() / expected.abs().max().clamp(min=1)))
    return max(errors)
