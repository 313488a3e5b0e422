"""Whether one run is really better than another: paired tests, cell by cell."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from idloss.evaluation.results import HR, Cell, Results
from idloss.evaluation.statistics import sign_test, student_t_two_sided


@dataclass(frozen=True)
class Comparison:
    """One cell of two runs, compared.

    Attributes:
        cell_a: The cell in the first run.
        cell_b: The cell in the second.
        metric: What was compared, `accuracy`, `rank1` or the first TPIR.
        a: The first run's figure.
        b: The second run's.
        wins_a: Pairs, probes or draws in which only, or more of, the first was right.
        wins_b: The same for the second.
        test: The test behind `p`.
        p: Two-sided p-value: how likely so large a difference is if neither is better.
        p_sign: The sign test's p-value over pairs or probes (where it is McNemar's) or draws.
        p_holm: `p` corrected for the number of cells compared (Holm).
    """

    cell_a: Cell
    cell_b: Cell
    metric: str
    a: float
    b: float
    wins_a: int
    wins_b: int
    test: str
    p: float
    p_sign: float
    p_holm: float = math.nan

    @property
    def difference(self) -> float:
        """How much better the second run is."""
        return self.b - self.a


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test on the same pairs judged twice.

    Args:
        correct_a: Whether the first judged each pair rightly, `[N]`.
        correct_b: The same for the second.

    Returns:
        Pairs that only the first got right, that only the second did, and the two-sided p-value.

    Raises:
        ValueError: The lengths differ.
    """
    first, second = _same_shape(correct_a, correct_b)
    only_a = int((first.astype(bool) & ~second.astype(bool)).sum())
    only_b = int((~first.astype(bool) & second.astype(bool)).sum())
    return only_a, only_b, sign_test(only_a, only_b)


def paired_t(a: ArrayLike, b: ArrayLike) -> float:
    """Student's paired t-test.

    Args:
        a: Figures of the first, `[R]`, R >= 2.
        b: Figures of the second in the same draws.

    Returns:
        The two-sided p-value; 1 where all draws are equal, 0 where all differ by the same amount.

    Raises:
        ValueError: The lengths differ, or there are fewer than two.
    """
    first, second = _same_shape(a, b)
    if first.size < 2:
        raise ValueError(f"a paired t-test needs two draws or more, got {first.size}")
    difference = second - first
    mean, error = difference.mean(), difference.std(ddof=1) / math.sqrt(difference.size)
    # differences that are equal but for rounding have no spread to test against
    if error <= 1e-12 * max(1.0, abs(float(mean))):
        return 1.0 if abs(mean) <= 1e-12 else 0.0
    return student_t_two_sided(float(mean / error), difference.size - 1)


def compare(
    a: Results | str | os.PathLike[str],
    b: Results | str | os.PathLike[str],
    *,
    srnets: tuple[str, str] | None = None,
) -> list[Comparison]:
    """Compare two runs cell by cell, on the same pairs and the same draws.

    Verification is tested pair by pair, and identification against a set's own gallery probe by
    probe (McNemar, exact); with drawn galleries draw by draw (paired t; the draws share images, so
    its p-value is too small rather than too large).

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
        ValueError: The runs share no cell, were made with other pairs, draws or protocols, or do
            not hold the scores.
    """
    first = a if isinstance(a, Results) else Results.load(a)
    second = b if isinstance(b, Results) else Results.load(b)
    _require_same(first.run, second.run)
    pairs = _matching(first, second, srnets)
    found = [_compare_cell(first, second, *pair) for pair in pairs]
    return _holm(found)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Comparisons as a Markdown table.

    Args:
        comparisons: From `compare`.

    Returns:
        One row for each, figures in per cent, differences in percentage points.
    """
    lines = [
        "| cell | metric | A | B | B - A | only A : only B | test | p | p (Holm) |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for found in comparisons:
        name = found.cell_a.label
        if found.cell_a.srnet != found.cell_b.srnet:
            name += f" → {found.cell_b.srnet}"
        lines.append(
            f"| {name} | {found.metric} | {100 * found.a:.2f} | {100 * found.b:.2f} | "
            f"{100 * found.difference:+.2f} | {found.wins_a} : {found.wins_b} | {found.test} | "
            f"{_p(found.p)} | {_p(found.p_holm)} |"
        )
    return "\n".join(lines) + "\n"


def _compare_cell(first: Results, second: Results, cell_a: Cell, cell_b: Cell) -> Comparison:
    ours, theirs = _arrays(first, cell_a), _arrays(second, cell_b)
    verified = cell_a.task == "verification"
    if verified and not np.array_equal(_of(ours, "same", cell_a), _of(theirs, "same", cell_b)):
        raise ValueError(f"{cell_a.label}: the runs hold other pairs; use one list for both")
    # the first of a cell's metrics: of an open set the laxest, on the most false positives
    metric = next(record.metric for record in first.records if record.cell == cell_a)
    a, b = first.value(cell_a, metric), second.value(cell_b, metric)
    if verified or "correct" in ours:
        correct_a, correct_b = _of(ours, "correct", cell_a), _of(theirs, "correct", cell_b)
        wins_a, wins_b, p = mcnemar(correct_a, correct_b)
        return Comparison(cell_a, cell_b, metric, a, b, wins_a, wins_b, "McNemar, exact", p, p)
    name = "rank1" if cell_a.task == "identification" else "tpir"
    draws_a, draws_b = _of(ours, name, cell_a), _of(theirs, name, cell_b)
    if draws_a.ndim > 1:
        draws_a, draws_b = draws_a[:, 0], draws_b[:, 0]
    p = paired_t(draws_a, draws_b)
    wins_a, wins_b = int((draws_a > draws_b).sum()), int((draws_b > draws_a).sum())
    p_sign = sign_test(wins_a, wins_b)
    return Comparison(cell_a, cell_b, metric, a, b, wins_a, wins_b, "paired t", p, p_sign)


def _matching(
    first: Results, second: Results, srnets: tuple[str, str] | None
) -> list[tuple[Cell, Cell]]:
    ours, theirs = first.cells(), second.cells()
    if srnets is None:
        single = [{cell.srnet for cell in cells} - {HR} for cells in (ours, theirs)]
        if single[0] != single[1] and all(len(names) == 1 for names in single):
            srnets = (single[0].pop(), single[1].pop())
    swap = {} if srnets is None else {srnets[0]: srnets[1]}
    known = set(theirs)
    pairs = []
    for cell in ours:
        if srnets is not None and cell.srnet not in swap:
            continue
        twin = Cell(cell.task, cell.fnet, swap.get(cell.srnet, cell.srnet), cell.height, cell.width)
        if twin in known:
            pairs.append((cell, twin))
    if not pairs:
        raise ValueError(
            "the runs share no cell"
            + (f" for {srnets[0]} against {srnets[1]}" if srnets else "")
            + f". A has {_listing(ours)}; B has {_listing(theirs)}. "
            "Name two SRNets to compare with srnets=(a, b)"
        )
    return pairs


def _require_same(run_a: Mapping[str, Any], run_b: Mapping[str, Any]) -> None:
    """Refuse runs that differ in what both of them state."""
    for key, what in (
        ("data", "the data sets"),
        ("protocol", "the protocol"),
        ("probe", "which faces are LR (the probe option)"),
        ("draws", "the gallery draws"),
    ):
        if key in run_a and key in run_b and _differ(run_a[key], run_b[key]):
            raise ValueError(
                f"{what} of the runs differ, so they cannot be paired: {run_a[key]} and "
                f"{run_b[key]}; run both alike"
            )


def _differ(a: Any, b: Any) -> bool:
    """Whether two descriptions differ in what both hold: one run may have more tasks."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        # what was left out shows in the lists and contents; its paths differ between machines
        shared = (a.keys() & b.keys()) - {"skipped"}
        return any(_differ(a[key], b[key]) for key in shared)
    return bool(a != b)


def _holm(found: Sequence[Comparison]) -> list[Comparison]:
    corrected = [math.nan] * len(found)
    so_far = 0.0
    for rank, place in enumerate(sorted(range(len(found)), key=lambda i: found[i].p)):
        so_far = max(so_far, min(1.0, found[place].p * (len(found) - rank)))
        corrected[place] = so_far
    return [replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True)]


def _arrays(results: Results, cell: Cell) -> Mapping[str, NDArray[Any]]:
    if cell not in results.arrays:
        raise ValueError(f"the run holds no scores for {cell.label}; evaluate it again")
    return results.arrays[cell]


def _of(arrays: Mapping[str, NDArray[Any]], name: str, cell: Cell) -> NDArray[Any]:
    if name not in arrays:
        raise ValueError(f"the run holds no {name!r} for {cell.label}; it has {sorted(arrays)}")
    return arrays[name]


def _same_shape(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"paired tests need two [N] of one length, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    return first, second


def _listing(cells: Sequence[Cell], most: int = 4) -> str:
    names = [cell.label for cell in cells[:most]]
    return "; ".join(names) + (f"; and {len(cells) - most} more" if len(cells) > most else "")


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}"
