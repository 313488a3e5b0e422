"""The `idloss` command: thin wrappers, one function of the library each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:  # pragma: no cover - needs an install without extras
    sys.exit(f"the idloss command needs {missing.name}: pip install 'idloss[eval]'")

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
benchmark = typer.Typer(help="Speed and memory against a reference.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


@app.command("list")
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


@app.command()
def info(name: Annotated[str, typer.Argument(help="A model with its tag.")]) -> None:
    """Say where a model's weights come from, their hash, licence and training data."""
    from idloss.weights import describe

    table = Table(show_header=False)
    for key, value in describe(name).items():
        table.add_row(key, str(value))
    Console().print(table)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model with its tag.")],
    file: Annotated[
        Path | None, typer.Option(help="A copy you downloaded by hand, to verify and convert.")
    ] = None,
) -> None:
    """Download, verify and convert a model's weights; print where they are."""
    from idloss import weights

    typer.echo(weights.add(name, file) if file else weights.fetch(name))


@benchmark.command("loss")
def benchmark_loss(
    fnet: Annotated[str, typer.Option(help="FNet, with random weights.")] = "sface",
    batch: Annotated[int, typer.Option(help="Faces in a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 7,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
) -> None:
    """Time the identity loss against the bare arithmetic it cannot do without."""
    from idloss.benchmark import LossCase, benchmark_loss, format_timings

    typer.echo(format_timings(benchmark_loss(LossCase(fnet, batch, device=device), rounds=rounds)))


def main() -> None:
    """Run the command; an error of the user's is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"idloss: {error}")


if __name__ == "__main__":
    main()
