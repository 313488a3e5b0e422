"""How sure a figure is: an estimate with its intervals, and the tests behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

NOT_FINITE = "look for a network that overflowed (fp16?) or an image that failed to load"
"""What to do about a number that is not finite."""


def require_finite(values: Floats, what: str) -> None:
    """Raise `ValueError`, saying which `what` it is, where a number is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(int(finite.argmin()), values.shape)
        index = ", ".join(str(int(axis)) for axis in place)
        raise ValueError(f"{what} [{index}] is {values[place]}; {NOT_FINITE}")


# Lentz's continued fraction gains about a digit a step here; it has always settled long before.
_STEPS = 1000
_TINY = 1e-300
_CLOSE = 1e-15


@dataclass(frozen=True)
class Estimate:
    """One figure and how sure it is.

    Attributes:
        value: The figure on all the data.
        mean: Its mean over the folds or draws.
        std: Its standard deviation over them (of the population, as the released code prints it).
        low: Lower end of Student's interval of the mean; it may pass the range of the figure.
        high: Upper end of it.
        repeats: How many folds or draws there are.
        boot_low: Lower end of the bootstrap interval of `value`, where one was made.
        boot_high: Upper end of it.
    """

    value: float
    mean: float
    std: float
    low: float
    high: float
    repeats: int
    boot_low: float | None = None
    boot_high: float | None = None


def estimate(
    repeats: Sequence[float] | NDArray[Any],
    value: float | None = None,
    *,
    level: float = 0.95,
    resampled: NDArray[Any] | None = None,
) -> Estimate:
    """Sum up a figure's repeats: mean, deviation, Student's interval and bootstrap percentiles.

    Folds share their training pairs and draws share their images, so the repeats are not
    independent and Student's interval is a little too narrow.

    Args:
        repeats: The figure in each fold or draw, `[R]`.
        value: The figure on all the data; None for the mean of the repeats.
        level: Share of the probability the intervals are to hold, in (0, 1).
        resampled: The figure on each bootstrap sample, `[B]`.

    Returns:
        The estimate.

    Raises:
        ValueError: There are no repeats, or the level is not in (0, 1).
    """
    figures = np.asarray(repeats, dtype=np.float64)
    if figures.ndim != 1 or not figures.size:
        raise ValueError(f"repeats must be [R] with R >= 1, got shape {list(figures.shape)}")
    mean = float(figures.mean())
    reach = math.nan
    if figures.size > 1:
        error = float(figures.std(ddof=1)) / math.sqrt(figures.size)
        reach = student_t_quantile(level, figures.size - 1) * error
    boot_low = boot_high = None
    if resampled is not None:
        tails = ((1 - level) / 2, (1 + level) / 2)
        boot_low, boot_high = (float(end) for end in np.quantile(resampled, tails))
    return Estimate(
        value=mean if value is None else float(value),
        mean=mean,
        std=float(figures.std()),
        low=mean - reach,
        high=mean + reach,
        repeats=figures.size,
        boot_low=boot_low,
        boot_high=boot_high,
    )


def student_t_two_sided(t: float, degrees: float) -> float:
    """Probability that Student's t is at least as far from zero as `t`.

    Args:
        t: The statistic.
        degrees: Degrees of freedom, > 0.

    Returns:
        The two-sided p-value in [0, 1], with full relative precision in the tail.

    Raises:
        ValueError: If the degrees of freedom are not positive.
    """
    if degrees <= 0:
        raise ValueError(f"degrees of freedom must be > 0, got {degrees}")
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def student_t_quantile(level: float, degrees: float) -> float:
    """The t that Student's |t| stays under with probability `level`.

    Args:
        level: Probability in (0, 1), 0.95 for the usual interval.
        degrees: Degrees of freedom, > 0.

    Returns:
        The quantile, > 0.

    Raises:
        ValueError: If the level is not in (0, 1) or the degrees of freedom are not positive.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}; 0.95 is usual")
    low, high = 0.0, 1.0
    while student_t_two_sided(high, degrees) > 1 - level:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if student_t_two_sided(middle, degrees) > 1 - level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided binomial test that wins and losses are equally likely; ties are left out.

    With the pairs that only one of two methods gets right it is McNemar's exact test.

    Args:
        wins: How often the one was better.
        losses: How often the other was.

    Returns:
        The p-value in (0, 1]; 1 where neither ever was.

    Raises:
        ValueError: If a count is negative.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"counts must not be negative, got {wins} wins and {losses} losses")
    trials = wins + losses
    # whole numbers all the way: no rounding until the one division
    ways = term = 1
    for taken in range(min(wins, losses)):
        term = term * (trials - taken) // (taken + 1)
        ways += term
    return min(1.0, float(2 * ways / 2**trials))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):  # the fraction settles quickly on the other side only
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    fraction = upper = 1.0
    lower = 0.0
    for step in range(1, _STEPS):
        half = step // 2
        scale = x / ((a + step - 1) * (a + step))
        term = scale * (-(a + half) * (a + b + half) if step % 2 else half * (b - half))
        lower = 1 / ((1 + term * lower) or _TINY)
        upper = (1 + term / upper) or _TINY
        fraction *= upper * lower
        if abs(upper * lower - 1) < _CLOSE:
            break
    return front / (a * fraction)
