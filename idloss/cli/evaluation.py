"""`idloss evaluate` and `idloss compare`: the bench of the paper's Tables 1 and 2."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from idloss.data import EvaluationSet
    from idloss.evaluation.run import Probe

# typer wants lists as defaults; nobody changes them
_FNETS = ["sface"]
_SRNETS = ["bilinear", "bicubic"]
_TASKS = ["verification"]


def evaluate(
    data: Annotated[Path, typer.Argument(help="LFW, .bin, pairs.csv, TinyFace, SCface, ...")],
    fnet: Annotated[list[str], typer.Option(help="FNet or LABEL=FNET, or several.")] = _FNETS,
    srnet: Annotated[
        list[str], typer.Option(help="SRNet or LABEL=SRNET, such as ours=local-dir:FOLDER.")
    ] = _SRNETS,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Probe size, such as 7x6, or hr for HR alone. [default: the paper's]"),
    ] = None,
    task: Annotated[list[str], typer.Option(help="Or identification, or open-set.")] = _TASKS,
    protocol: Annotated[
        str, typer.Option(help="paper, sphereface, standard or real_world.")
    ] = "paper",
    probe: Annotated[str, typer.Option(help="LR faces: the second of a pair, or both.")] = "second",
    data_set: Annotated[str | None, typer.Option(help="Kind. [default: by its layout]")] = None,
    pairs: Annotated[Path | None, typer.Option(help="LFW's pairs.txt.")] = None,
    landmarks: Annotated[Path | None, typer.Option(help="Five points of each photo.")] = None,
    people: Annotated[Path | None, typer.Option(help="LFW's list of people, to check.")] = None,
    crop: Annotated[
        str | None, typer.Option(help="The pictures are crops of this template: no landmarks.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random galleries.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the galleries and the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Faces at a time. [default: 8 a core, 32 on a GPU]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results and figures.")] = Path("results"),
    figures: Annotated[bool, typer.Option(help="Draw the figures.")] = True,
    faces: Annotated[int, typer.Option(min=0, help="Faces on the picture sheets.")] = 5,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out what cannot be read; recorded.")
    ] = False,
    cache: Annotated[bool, typer.Option(help="Keep embeddings on disk and reuse them.")] = True,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Where to keep them. [default: $HF_HOME/idloss/embeddings]")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch LFW into DATA.")] = False,
) -> None:
    """Measure FNets on low-resolution faces, restored by SRNets: Tables 1 and 2."""
    from idloss import create_fnet, create_srnet
    from idloss import evaluation as bench
    from idloss.cli.options import parse_networks, parse_sizes

    # what is wrong with these is told before gigabytes are read and hours are spent
    bench.get_protocol(protocol)
    _require_writable(out)
    sizes = () if size == ["hr"] else parse_sizes(size) if size else None
    found = _open(
        data,
        data_set,
        crop,
        skip_missing=skip_missing,
        pairs=pairs,
        landmarks=landmarks,
        people=people,
        download=download or None,
    )
    fnets = parse_networks("--fnet", fnet, create_fnet)
    srnets = parse_networks("--srnet", srnet, create_srnet)
    results = bench.evaluate(
        found,
        fnets,
        srnets,
        sizes,
        tasks=task,
        protocol=protocol,
        probe=cast("Probe", probe),
        draws=draws,
        seed=seed,
        device=device,
        batch_size=batch_size,
        skip_missing=skip_missing,
        cache=(cache_folder or True) if cache else False,
    )
    results.run["command"] = ["idloss", *sys.argv[1:]]
    written = results.save(out / "results.json")
    written += bench.write_calibration(results, out)
    tables = bench.write_tables(results, out)
    for table in tables.values():
        typer.echo(f"\n{table}", nl=False)
    typer.echo(f"\nIn {out}: {', '.join(path.name for path in (*written, *tables))}")
    drawn: list[Path] = []
    if figures:
        drawn += bench.write_figures(results, out / "figures")
        if faces:
            used = [(h, w) for own in results.run["sizes"].values() for h, w in own]
            options: dict[str, Any] = {"protocol": protocol, "device": device, "progress": True}
            drawn += bench.write_sheets(
                out / "figures", found, fnets, srnets, used, count=faces, **options
            )
    if drawn:
        typer.echo(f"In {out / 'figures'}: {len(drawn) // 2} figures, each as PNG and PDF")


def compare(
    a: Annotated[Path, typer.Argument(help="results.json of a run.")],
    b: Annotated[Path, typer.Argument(help="results.json of another.")],
    srnets: Annotated[
        tuple[str, str] | None, typer.Option(help="An SRNet of A and the one of B to set by it.")
    ] = None,
) -> None:
    """Say whether B is really better than A, cell by cell, on the same pairs or draws."""
    from idloss.evaluation import compare, comparison_table

    typer.echo(comparison_table(compare(a, b, srnets=srnets)), nl=False)


def _open(
    path: Path, kind: str | None, crop: str | None, *, skip_missing: bool, **given: Any
) -> EvaluationSet:
    """Open the data set with those options that were given, and only if it knows them."""
    from idloss.data import EVALUATIONS, open_evaluation
    from idloss.data.layouts import SUFFIXES

    options = {name: value for name, value in given.items() if value is not None}
    kind = kind or SUFFIXES.get(path.suffix.lower())
    if kind is None and options.keys() - {"landmarks"}:
        kind = "lfw"  # no other set has these options
    if kind is not None and kind in EVALUATIONS:
        known = inspect.signature(EVALUATIONS[kind]).parameters
        for name in options.keys() - known.keys():
            raise ValueError(f"the data set {kind!r} takes no --{name}")
    return open_evaluation(path, kind, crop=crop, skip_missing=skip_missing, **options)


def _require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise ValueError(f"--out {folder}: {there} {why}; name another folder")
