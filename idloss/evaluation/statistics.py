"""How sure a figure is: an estimate with its intervals, and paired tests.

scipy, of the extra `eval`, is imported when first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from idloss.errors import import_extra

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

LEVEL = 0.95  # of all intervals
NOT_FINITE = "look for a network that overflowed (fp16?) or an image that failed to load"


@dataclass(frozen=True)
class Estimate:
    """One figure and how sure it is."""

    value: float  # on all the data
    mean: float  # over folds or draws
    std: float  # of the population, as the released code prints it
    low: float  # Student's interval of the mean, which may pass the range of the figure
    high: float
    repeats: int
    boot_low: float | None = None  # bootstrap interval of `value`
    boot_high: float | None = None


def estimate(
    repeats: Sequence[float] | NDArray[Any],
    value: float | None = None,
    *,
    resampled: NDArray[Any] | None = None,
) -> Estimate:
    """Sum up a figure `[R]` of folds or draws, on all the data (`value`), on B resampled sets."""
    figures = np.asarray(repeats, dtype=np.float64)
    if figures.ndim != 1 or not figures.size:
        raise ValueError(f"repeats must be [R] with R >= 1, got {list(figures.shape)}")
    mean = float(figures.mean())
    reach = math.nan
    # folds share their training pairs and draws their images: a bit too narrow
    if figures.size > 1:
        error = float(figures.std(ddof=1)) / math.sqrt(figures.size)
        reach = float(require_scipy().t.ppf((1 + LEVEL) / 2, figures.size - 1)) * error
    boot_low = boot_high = None
    if resampled is not None:
        boot_low, boot_high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    whole = mean if value is None else float(value)
    interval = (mean - reach, mean + reach)
    std = float(figures.std())
    return Estimate(whole, mean, std, *interval, figures.size, boot_low, boot_high)


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely; ties are left out."""
    if not wins + losses:
        return 1.0
    return float(require_scipy().binomtest(wins, wins + losses).pvalue)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test of answers `[N]`: how many only one, only the other got right, and p."""
    first, second = (side.astype(bool) for side in _same_shape(correct_a, correct_b))
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    return only_a, only_b, sign_test(only_a, only_b)


def paired_t(a: ArrayLike, b: ArrayLike) -> float:
    """Student's paired t-test of figures `[R]`, two-sided; 0 where all differ by one amount."""
    first, second = _same_shape(a, b)
    if first.size < 2:
        raise ValueError(f"a paired t-test needs two draws or more, got {first.size}")
    difference = second - first
    mean, error = abs(float(difference.mean())), difference.std(ddof=1) / math.sqrt(first.size)
    # differences that are equal but for rounding have no spread to test against
    if error <= 1e-12 * max(1.0, mean):
        return 1.0 if mean <= 1e-12 else 0.0
    return float(require_scipy().ttest_rel(first, second).pvalue)


def require_finite(values: Floats, what: str) -> None:
    """Raise `ValueError`, saying which `what` it is, where a number is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(int(finite.argmin()), values.shape)
        index = ", ".join(str(int(axis)) for axis in place)
        raise ValueError(f"{what} [{index}] is {values[place]}; {NOT_FINITE}")


def require_scipy() -> Any:
    """`scipy.stats`; raises `ModuleNotFoundError`, naming the extra, where it is missing."""
    return import_extra("scipy.stats", "eval", "intervals and tests need")


def _same_shape(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"paired tests need two [N] of one length, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    for side in (first, second):
        require_finite(side, "figure")
    return first, second
