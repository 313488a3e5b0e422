"""`idloss upscale`: the faces of photos, cut out, super-resolved and told of in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upscale(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders of them, or patterns.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; a stopped run goes on.")],
    srnet: Annotated[str, typer.Option(help="SRNet.")] = "edsr16_64_id",
    detector: Annotated[str, typer.Option(help="mtcnn or yunet.")] = "mtcnn",
    crop: Annotated[
        str | None, typer.Option(help="The photos are crops of this template: nothing to find.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Rows x columns of pictures. [default: 4 x the template]"),
    ] = None,
    paste: Annotated[
        bool, typer.Option("--paste", help="Also lay the faces over their enlarged photos.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Find the faces of photos, cut them out, and super-resolve them."""
    from idloss.cli.options import parse_sizes
    from idloss.evaluation.cache import digest_weights
    from idloss.pipeline import FacePipeline
    from idloss.upscaling import FOUND, SHEET, Processes
    from idloss.upscaling import upscale as run

    rows = parse_sizes([size])[0] if size else None
    processes = Processes.join(device)
    finder = detector if crop is None else None
    pipeline = FacePipeline(finder, srnet, None, size=rows, device=processes.device)
    weights = digest_weights(pipeline.srnet)  # a folder's may be replaced
    settings = {"srnet": srnet, "weights": weights, "detector": detector, "size": size}
    summary = run(
        pipeline, paths, out, crop=crop, paste=paste, settings=settings, processes=processes
    )
    if processes.rank:
        return
    if not summary.photos + summary.failed:
        raise FileNotFoundError(f"there are no pictures in {', '.join(paths)}")
    told = f"{summary.faces:,} faces in {summary.photos:,} photos"
    if large := summary.faces - summary.restored:
        told += f", {large:,} of them with pixels enough without an SRNet"
    typer.echo(f"{told}; {FOUND} and {SHEET} in {out}")
    if error := summary.error():
        raise error
