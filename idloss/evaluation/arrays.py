"""The arrays that figures are made of: their types, and what is asked of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

NOT_FINITE = "look for a network that overflowed (fp16?) or an image that failed to load"
"""What to do about a number that is not finite."""


def read_labels(same: ArrayLike) -> Bools:
    """Labels of pairs as truth values.

    Args:
        same: Whether each pair is of one person, `[N]`, bool or 0/1.

    Returns:
        The same, bool.

    Raises:
        ValueError: There are none, or one is neither 0 nor 1.
    """
    labels = np.asarray(same)
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"same must be [N] with N >= 1, got shape {list(labels.shape)}")
    known = np.isin(labels, (0, 1))
    if not known.all():
        place = int(known.argmin())
        raise ValueError(
            f"same must hold 0 or 1 (or bool), pair {place} has {labels[place]!r}; "
            "turn labels of -1 into 0"
        )
    return labels.astype(bool)


def read_scored(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, Bools]:
    """Scores of pairs of both kinds, with their labels.

    Args:
        scores: Similarities `[N]`.
        same: Whether each pair is of one person, `[N]`.

    Returns:
        Scores in float64 and labels.

    Raises:
        ValueError: Shapes do not fit, a score is not finite, or one of the classes is empty.
    """
    truth = read_labels(same)
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != truth.shape:
        raise ValueError(f"scores are {list(values.shape)}, same is {list(truth.shape)}")
    require_finite(values, "score")
    if truth.all() or not truth.any():
        raise ValueError(
            f"all {truth.size} pairs have the label {int(truth[0])}; these figures need both pairs "
            "of one person and pairs of two"
        )
    return values, truth


def require_finite(values: Floats, what: str) -> None:
    """Raise `ValueError`, saying which `what` it is, where a number is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(int(finite.argmin()), values.shape)
        index = ", ".join(str(int(axis)) for axis in place)
        raise ValueError(f"{what} [{index}] is {values[place]}; {NOT_FINITE}")
