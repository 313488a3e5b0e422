"""`idloss landmarks`: five points of photos that have none, for evaluate and prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def landmarks(
    data: Annotated[Path, typer.Argument(help="Folder, .tar or .tgz of photos.")],
    out: Annotated[Path, typer.Argument(help="Table to write; landmarks.csv beside the photos.")],
    detector: Annotated[str, typer.Option(help="mtcnn or yunet.")] = "mtcnn",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Find the main face of each photo, and write its five points."""
    from idloss.data.files import DataError
    from idloss.detection import create_detector
    from idloss.encoder import resolve_device
    from idloss.marking import mark

    finder = create_detector(detector, device=resolve_device(device))
    count, faults = mark(data, out, finder)
    typer.echo(f"five points of {count:,} photos in {out}")
    if faults:
        raise DataError(faults, "The rest is in the table.")
