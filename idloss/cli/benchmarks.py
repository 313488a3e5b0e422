"""`idloss benchmark`: speed and memory against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Speed and memory against a reference.", no_args_is_help=True)


@app.command("loss")
def benchmark_loss(
    fnet: Annotated[str, typer.Option(help="FNet, with random weights.")] = "sface",
    batch: Annotated[int, typer.Option(help="Faces in a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 7,
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
) -> None:
    """Time the identity loss against the bare arithmetic it cannot do without."""
    from idloss.benchmark import LossCase, benchmark_loss, format_timings

    typer.echo(format_timings(benchmark_loss(LossCase(fnet, batch, device=device), rounds=rounds)))


@app.command("evaluate")
def benchmark_evaluate(
    data: Annotated[Path, typer.Argument(help="LFW, with pairs.txt and landmarks beside it.")],
    fnet: Annotated[str, typer.Option(help="FNet.")] = "mobilefacenet",
    size: Annotated[
        list[str] | None,
        typer.Option(help="Probe size, rows x columns. [default: those of Table 1]"),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(min=20, help="How many pairs. [default: all]")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the FNet's weights.")] = True,
) -> None:
    """Time verification against the released evaluation's way, image by image."""
    from idloss.benchmark import EvaluationCase, benchmark_evaluation, format_evaluation
    from idloss.cli.options import parse_sizes

    case = EvaluationCase(str(data), fnet, pairs=pairs, pretrained=pretrained)
    if size:
        case = case._replace(sizes=parse_sizes(size))
    typer.echo(format_evaluation(benchmark_evaluation(case)))
