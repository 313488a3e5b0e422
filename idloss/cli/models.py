"""`idloss list`, `info` and `fetch`: what models there are and where their weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def list_models(
    pattern: Annotated[str, typer.Argument(help="Wildcard, such as 'edsr*'.")] = "",
    pretrained: Annotated[bool, typer.Option(help="Only those with weights.")] = False,
) -> None:
    """List FNets and SRNets."""
    from idloss.registry import list_fnets, list_srnets

    table = Table("model", "kind")
    for kind, names in (
        ("FNet", list_fnets(pattern, pretrained=pretrained)),
        ("SRNet", list_srnets(pattern, pretrained=pretrained)),
    ):
        for name in names:
            table.add_row(name, kind)
    Console().print(table)


def info(name: Annotated[str, typer.Argument(help="A model with its tag.")]) -> None:
    """Say where a model's weights come from, their hash, licence and training data."""
    from idloss.weights import describe

    for key, value in describe(name).items():
        for line in value if isinstance(value, list) else [value]:
            typer.echo(f"{key:<15}{line}")  # whole, however narrow the terminal


def fetch(
    name: Annotated[str, typer.Argument(help="A model with its tag.")],
    file: Annotated[
        Path | None, typer.Option(help="A copy you downloaded by hand, to verify and convert.")
    ] = None,
) -> None:
    """Download, verify and convert a model's weights; print where they are."""
    from idloss import weights

    typer.echo(weights.add(name, file) if file else weights.fetch(name))
