"""Whether one run is really better than another: paired tests, cell by cell."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from idloss.errors import some_of
from idloss.evaluation.results import HR, Cell, Results, markdown_table
from idloss.evaluation.statistics import mcnemar, paired_t, sign_test


@dataclass(frozen=True)
class Comparison:
    """One cell of two runs, A and B, compared."""

    cell_a: Cell
    cell_b: Cell
    metric: str
    a: float
    b: float
    wins_a: int  # pairs, probes or draws in which only, or more of, A was right
    wins_b: int
    test: str
    p: float  # two-sided
    p_sign: float  # of the sign test, over pairs, probes or draws
    p_holm: float = math.nan  # corrected for the number of cells (Holm)

    @property
    def difference(self) -> float:
        """How much better the second run is."""
        return self.b - self.a


def compare(
    a: Results | str | os.PathLike[str],
    b: Results | str | os.PathLike[str],
    *,
    srnets: tuple[str, str] | None = None,
) -> list[Comparison]:
    """Compare two runs cell by cell, on the same pairs, probes (McNemar, exact) or draws.

    Draws share images, so the p-value of their paired t-test is too small rather than too large.

    Args:
        a: The first run, or its result file.
        b: The second.
        srnets: Compare this SRNet of the first with that of the second, as in
            `compare(run, run, srnets=("edsr32_256", "edsr32_256_id"))`; None for equal names, or,
            where each run has a single one, that one.

    Returns:
        Comparisons in the first run's order.

    Raises:
        FileNotFoundError: A result file is missing.
        ValueError: The runs share no cell, were made with other pairs, faces, draws or protocols,
            or do not hold the scores.
        ModuleNotFoundError: scipy is missing.
    """
    first, second = (run if isinstance(run, Results) else Results.load(run) for run in (a, b))
    for key, what in (
        ("data", "the data sets"),
        ("protocol", "the protocol"),
        ("probe", "which faces are LR (the probe option)"),
    ):
        _require_same(what, first.run.get(key), second.run.get(key))
    pairs = _matching(first, second, srnets)
    found = [_compare_cell(first, second, *pair) for pair in pairs]
    corrected = [math.nan] * len(found)
    so_far = 0.0
    for rank, place in enumerate(sorted(range(len(found)), key=lambda i: found[i].p)):
        so_far = max(so_far, min(1.0, found[place].p * (len(found) - rank)))
        corrected[place] = so_far
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as a Markdown table.

    Args:
        comparisons: From `compare`.

    Returns:
        One row for each, figures in per cent, differences in percentage points.
    """
    lines = [["cell", "metric", "A", "B", "B - A", "only A : only B", "test", "p", "p (Holm)"]]
    for found in comparisons:
        name = found.cell_a.label
        if found.cell_a.srnet != found.cell_b.srnet:
            name += f" → {found.cell_b.srnet}"
        figures = [f"{100 * share:.2f}" for share in (found.a, found.b)]
        ps = (f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}" for p in (found.p, found.p_holm))
        wins = f"{found.wins_a} : {found.wins_b}"
        difference = f"{100 * found.difference:+.2f}"
        lines.append([name, found.metric, *figures, difference, wins, found.test, *ps])
    return markdown_table(lines, left=(0, 1, 6))


def _compare_cell(first: Results, second: Results, cell_a: Cell, cell_b: Cell) -> Comparison:
    def both(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        return _array(first, cell_a, name), _array(second, cell_b, name)

    task = cell_a.task
    draws = (run.run.get("draws") for run in (first, second))
    draws = (one.get(task) if isinstance(one, Mapping) else one for one in draws)
    _require_same("the gallery draws", *draws)
    verified = task == "verification"
    if verified and not np.array_equal(*both("same")):
        raise ValueError(f"{cell_a.label}: the runs hold other pairs; use one list for both")
    # the first of a cell's metrics: of an open set the laxest, on the most false positives
    metric = next(record.metric for record in first.records if record.cell == cell_a)
    try:
        a, b = first.value(cell_a, metric), second.value(cell_b, metric)
    except KeyError as error:
        raise ValueError(f"the second run has {error.args[0]}; evaluate both alike") from error
    try:
        if verified or "correct" in first.arrays.get(cell_a, ()):
            right = both("correct")
            if verified and right[0].shape != _array(first, cell_a, "same").shape:
                raise ValueError("'correct' and 'same' hold different numbers of pairs")  # noqa: TRY301
            wins_a, wins_b, p = mcnemar(*right)
            return Comparison(cell_a, cell_b, metric, a, b, wins_a, wins_b, "McNemar, exact", p, p)
        # of the open set, [draws, T], the first of its rates
        draws_a, draws_b = (
            draws if draws.ndim < 2 else draws[:, 0]
            for draws in both("rank1" if task == "identification" else "tpir")
        )
        p = paired_t(draws_a, draws_b)
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{cell_a.label}: {error}") from error
    wins_a, wins_b = int((draws_a > draws_b).sum()), int((draws_b > draws_a).sum())
    p_sign = sign_test(wins_a, wins_b)
    return Comparison(cell_a, cell_b, metric, a, b, wins_a, wins_b, "paired t", p, p_sign)


def _array(results: Results, cell: Cell, name: str) -> NDArray[Any]:
    arrays = results.arrays.get(cell, {})
    if name not in arrays:
        raise ValueError(
            f"the run holds no {name!r} for {cell.label}, but {some_of(sorted(arrays))}; evaluate "
            "it again"
        )
    return arrays[name]


def _matching(
    first: Results, second: Results, srnets: tuple[str, str] | None
) -> list[tuple[Cell, Cell]]:
    ours, theirs = first.cells(), second.cells()
    if srnets is None:
        single = [{cell.srnet for cell in cells} - {HR} for cells in (ours, theirs)]
        if single[0] != single[1] and all(len(names) == 1 for names in single):
            srnets = (single[0].pop(), single[1].pop())
    swap = {} if srnets is None else {srnets[0]: srnets[1]}
    pairs = [
        (cell, replace(cell, srnet=swap.get(cell.srnet, cell.srnet)))
        for cell in ours
        if not swap or cell.srnet in swap
    ]
    pairs = [pair for pair in pairs if pair[1] in theirs]
    if not pairs:
        wanted = f" for {srnets[0]} against {srnets[1]}" if srnets else ""
        held = [some_of([cell.label for cell in cells], 4) for cells in (ours, theirs)]
        raise ValueError(
            f"the runs share no cell{wanted}. A has {held[0]}; B has {held[1]}. Name two SRNets to "
            "compare with srnets= or --srnets A B"
        )
    return pairs


def _require_same(what: str, a: Any, b: Any) -> None:
    """Refuse runs that differ in a circumstance; those of which neither states it are believed."""
    if (a is None) != (b is None):
        lacking = "first" if a is None else "second"
        raise ValueError(
            f"the {lacking} run does not state {what}, the other does, so they cannot be paired; "
            "run both alike"
        )
    if found := _difference(a, b):
        raise ValueError(
            f"{what} of the runs differ, so they cannot be paired: {found}; run both alike"
        )


def _difference(a: Any, b: Any, of: str = "") -> str:
    """The first thing in which two descriptions differ that both hold: one may have more tasks."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        # what was left out shows in the lists and contents; its paths differ between machines
        shared = [key for key in a if key in b and key != "skipped"]
        found = (_difference(a[key], b[key], f"{of}{key} ") for key in shared)
        return next(filter(None, found), "")
    return "" if a == b else f"{of}{str(a)[:80]!r} and {str(b)[:80]!r}"
