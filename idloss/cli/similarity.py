"""`idloss ids`: how much restored faces look like the people they are of."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer


def ids(
    restored: Annotated[Path, typer.Argument(help="Folder or tar of restored faces.")],
    references: Annotated[Path, typer.Argument(help="Those of the same names, unharmed.")],
    fnet: Annotated[str, typer.Option(help="FNet that judges.")] = "mobilefacenet",
    crop: Annotated[
        str | None,
        typer.Option(help="Template all are aligned to: ffhq, arcface, ... [default: by size]"),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV file for the value of each picture.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out what has no counterpart.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Measure IDS, the cosine of faces restored and of their references."""
    from idloss.evaluation import measure_folders
    from idloss.weights.files import written_whole

    metric, values = measure_folders(
        restored, references, crop=crop, fnet=fnet, device=device, skip_missing=skip_missing
    )
    if table is not None:
        with written_whole(table) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("picture", "similarity"), *values.items()])
    typer.echo(f"IDS {metric.compute():.4f}, deviation {metric.deviation():.4f}")
    typer.echo(f"{len(values):,} pictures; {fnet}: {metric.distance.encoders[0]}")
