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


@app.command("search")
def benchmark_search(
    gallery: Annotated[int, typer.Option(min=1, help="Embeddings in the gallery.")] = 1_000_000,
    probes: Annotated[int, typer.Option(min=1, help="Embeddings searched for.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Features of an embedding.")] = 512,
    k: Annotated[int, typer.Option(min=1, help="Matches wanted for each probe.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 3,
) -> None:
    """Time the search of a large gallery beside FAISS, and identification after Table 2."""
    from idloss.benchmark import SearchCase, benchmark_search, format_search

    typer.echo(format_search(benchmark_search(SearchCase(gallery, probes, width, k), rounds)))


@app.command("train")
def benchmark_train(
    data: Annotated[Path, typer.Argument(help="Photos with landmarks, or CelebA.")],
    srnet: Annotated[str, typer.Option(help="SRNet.")] = "edsr16_64",
    fnet: Annotated[str, typer.Option(help="FNet, with random weights.")] = "mobilefacenet",
    batch: Annotated[int, typer.Option(min=1, help="Faces in a step.")] = 64,
    steps: Annotated[int, typer.Option(min=3, help="Steps to time.")] = 12,
    precision: Annotated[str, typer.Option(help="Of our way: fp32, tf32, bf16, fp16.")] = "bf16",
    compile_mode: Annotated[
        str, typer.Option("--compile", help="Of our way: no, default, reduce-overhead, ...")
    ] = "no",
    device: Annotated[str, typer.Option(help="'cpu' or 'cuda'.")] = "cpu",
) -> None:
    """Time a training step against the released loop's way of doing the same."""
    from idloss.benchmark.training import TrainingCase, benchmark_training, format_training

    case = TrainingCase(
        str(data),
        srnet,
        fnet,
        batch,
        steps,
        precision=precision,
        compile=compile_mode,
        device=device,
    )
    typer.echo(format_training(benchmark_training(case)))
