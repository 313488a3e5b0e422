"""What decides the result: variants of a recipe at one budget, judged on people held out.

    idloss prepare folder photos faces --exclude-overlap lfw.tar
    python examples/study.py faces zoo/studies/transfer.yaml --seed 0 1 2 --out study
    python examples/study.py faces zoo/studies/transfer.yaml --seed 0 1 2 --out study --test lfw.tar

Of the faces that `idloss prepare` wrote, the photos of some people are held out of training. Each
variant of the study, a YAML file of recipe fields, is trained with each seed; each of its judges
then verifies pairs of the people held out, the second face made small and restored. What was
trained already is not trained again, and what was stopped goes on. LFW is for the end, when there
is nothing left to choose: `--test` judges the same networks on it.
"""

from __future__ import annotations

import argparse
import csv
import importlib
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

from idloss import create_fnet
from idloss.data import (
    EvaluationSet,
    Faces,
    PreparedFaces,
    draw_pairs,
    open_evaluation,
    open_prepared,
)
from idloss.degradation import get_degradation
from idloss.evaluation import Results, compare, evaluate
from idloss.evaluation.results import markdown_table
from idloss.metrics import grid_ratio
from idloss.resample import parse_size
from idloss.training import Recipe, load_recipe, train

console = Console()


def hold_out(faces: PreparedFaces, people: int, pairs: int, seed: int) -> EvaluationSet:
    """Pairs of some of the people who have five photos or more."""
    assert faces.labels is not None
    counts = torch.bincount(faces.labels[faces.labels >= 0], minlength=len(faces.identities))
    many = (counts >= 5).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = many[torch.randperm(len(many), generator=generator)[:people]]
    held = faces.select(torch.isin(faces.labels, chosen))
    return EvaluationSet("people held out", held, draw_pairs(held, pairs, seed=seed))


def others(faces: PreparedFaces, held: Faces, share: float) -> list[str]:
    """Whom to leave out of training: people held out, and all but a share of the rest."""
    rest = sorted(set(faces.identities) - set(held.identities))
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    return [*held.identities, *(rest[i] for i in order[round(share * len(rest)) :])]


def main(options: argparse.Namespace) -> None:
    """Train what is missing, judge, and write a row for each variant, seed, judge and size."""
    study = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    losses = importlib.import_module(study["module"]).LOSSES if "module" in study else {}
    faces = open_prepared(options.faces)
    held = hold_out(faces, options.people, options.pairs, seed=0)
    test = held if options.test is None else open_evaluation(options.test)
    common = [*study["fields"], f"data={options.faces}", *options.fields]
    shares = study.get("people", {})
    fnets = {label: create_fnet(name, pretrained=True) for label, name in study["judges"].items()}
    sizes = [parse_size(size) for size in study["sizes"]]
    rows: list[dict[str, Any]] = []
    for seed in options.seed:
        first: Results | None = None
        for variant, fields in study["variants"].items():
            exclude = f"exclude={others(faces, held.faces, shares.get(variant, 1))}"
            asked = [*common, exclude, *fields, f"seed={seed}"]
            recipe: Recipe = load_recipe(study["recipe"], asked)
            criterion = losses[variant](recipe) if variant in losses else None
            folder = options.out / f"{variant}_{seed}"
            network = train(recipe, folder, resume=True, criterion=criterion)
            results = evaluate(test, fnets, {"sr": network}, sizes, device=options.device)
            first = first or results
            rows += rows_of(variant, seed, results, first, grids(network, held.faces, sizes))
            write(rows, options.out / ("study.csv" if test is held else "test.csv"))
            console.print(Markdown(table(rows)))


def grids(network: nn.Module, faces: Faces, sizes: list[tuple[int, int]]) -> dict[str, float]:
    """The grid that a network leaves at each size, on some of the faces."""
    crops = faces.crops_at(torch.arange(0, len(faces), max(1, len(faces) // 128)))
    device = next(network.parameters()).device
    found = {}
    for rows, columns in sizes:
        lr = get_degradation("bicubic")(crops, (rows, columns), seeds=[0] * len(crops))
        with torch.inference_mode():
            found[f"{rows}x{columns}"] = grid_ratio(network.eval()(lr.to(device)))
    return found


def rows_of(
    variant: str, seed: int, results: Results, first: Results, grid: dict[str, float]
) -> list[dict[str, Any]]:
    """What each judge found at each size, and whether it is more than chance beside the first."""
    rows = []
    for found in compare(first, results):
        cell = found.cell_b
        if cell.size in grid:
            row = {"variant": variant, "seed": seed, "judge": cell.fnet, "size": cell.size}
            row |= {"accuracy": found.b, "auc": results.value(cell, "auc")}
            rows.append(
                row | {"over_first": found.difference, "p": found.p, "grid": grid[cell.size]}
            )
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """All rows so far."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [[*rows[0]]]
    for row in rows:
        shares = [f"{100 * row[key]:.2f}" for key in ("accuracy", "auc", "over_first")]
        told = [str(row[key]) for key in ("variant", "seed", "judge", "size")]
        lines.append([*told, *shares, f"{row['p']:.1e}", f"{row['grid']:.1f}"])
    return markdown_table(lines, left=(0, 2))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faces", type=Path, help="a folder that idloss prepare made")
    parser.add_argument("study", type=Path, help="a YAML file, such as those in zoo/studies")
    parser.add_argument("fields", nargs="*", help="fields of every recipe, such as iterations=1500")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--people", type=int, default=150, help="held out of training")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--test", type=Path, help="judge on this set, such as lfw.tar, instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    main(arguments)
