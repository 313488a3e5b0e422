"""The receiver operating characteristic: TAR at FAR, AUC, EER.

A score is a similarity: larger means the same person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from idloss.evaluation.arrays import Bools, Floats, Ints, read_scored

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
UP = 1 + 1e-12
"""Room for rounding when a share is compared with a target such as 0.1."""


@dataclass(frozen=True)
class Roc:
    """Operating points, from the strictest threshold to the laxest.

    Attributes:
        far: Share of different-person pairs accepted, `[G + 1]`, rising from 0 to 1.
        tar: Share of same-person pairs accepted, `[G + 1]`, rising from 0 to 1.
        thresholds: A pair is accepted where its score is at least this, `[G + 1]`; the first is
            infinite.
    """

    far: Floats
    tar: Floats
    thresholds: Floats

    @property
    def auc(self) -> float:
        """Area under the curve."""
        return float(area(self.far, self.tar))

    @property
    def eer(self) -> float:
        """Error rate where false accepts and false rejects are equally frequent."""
        return float(equal_error(self.far, self.tar))

    def tar_at(self, far: float) -> float:
        """TAR at the laxest threshold whose FAR does not pass `far`; no interpolation."""
        return float(self.tar[np.count_nonzero(self.far <= far * UP) - 1])


def roc(scores: ArrayLike, same: ArrayLike) -> Roc:
    """The receiver operating characteristic, a point for each distinct score.

    Args:
        scores: Similarities `[N]`; larger means the same person.
        same: Whether each pair is of one person, `[N]`.

    Returns:
        The curve.

    Raises:
        ValueError: Shapes do not fit, a score is not finite, or one of the classes is empty.
    """
    ranked = Ranked(scores, same)
    far = np.concatenate(([0], np.cumsum(ranked.different)[ranked.ends])) / ranked.n_different
    tar = np.concatenate(([0], np.cumsum(ranked.same)[ranked.ends])) / ranked.n_same
    return Roc(far, tar, np.concatenate(([np.inf], ranked.scores[ranked.ends])))


def rejecting_threshold(scores: NDArray[Any], share: float) -> float:
    """The lowest of the scores that no more than a share of them exceed.

    Args:
        scores: Scores of those to reject, `[N]`.
        share: Share that may exceed it, in [0, 1].

    Returns:
        The threshold; minus infinity where all may exceed it.
    """
    allowed = int(share * len(scores) * UP)
    if allowed >= len(scores):
        return -np.inf
    place = len(scores) - 1 - allowed
    return float(np.partition(scores, place)[place])


def tar_name(far: float) -> str:
    """What TAR at a FAR is called, `tar@far=0.001` and the like."""
    return f"tar@far={far:g}"


class Ranked:
    """Pairs sorted by falling score, with the last place of each run of equal scores.

    Args:
        scores: Similarities `[N]`.
        same: Whether each pair is of one person, `[N]`.
    """

    def __init__(self, scores: ArrayLike, same: ArrayLike) -> None:
        values, truth = read_scored(scores, same)
        order = np.argsort(-values, kind="stable")
        self.scores = values[order]
        self.same = truth[order]
        self.different = ~self.same
        self.ends = np.flatnonzero(np.append(np.diff(self.scores) != 0, True))
        self.n_same = int(self.same.sum())
        self.n_different = int(self.different.sum())

    def accepted(self, members: Bools, draws: int, rng: np.random.Generator) -> Ints:
        """Members accepted at each operating point in each bootstrap sample, `[draws, G + 1]`."""
        places = np.flatnonzero(members)
        picked = places[rng.integers(places.size, size=(draws, places.size))]
        picked += np.arange(draws)[:, None] * members.size
        counts = np.bincount(picked.ravel(), minlength=draws * members.size)
        sums = counts.reshape(draws, -1).cumsum(1)[:, self.ends]
        return np.concatenate((np.zeros((draws, 1), dtype=sums.dtype), sums), axis=1)


def area(far: Floats, tar: Floats) -> Any:
    """Area under curves of operating points, `[..., G + 1]` each."""
    return (np.diff(far) * (tar[..., 1:] + tar[..., :-1]) / 2).sum(-1)


def equal_error(far: Floats, tar: Floats) -> Any:
    """Where FAR meets 1 - TAR, on the straight line between the operating points round it.

    Args:
        far: `[..., G + 1]`, rising.
        tar: `[..., G + 1]`, rising.

    Returns:
        The rate of each curve, `[...]`.
    """
    excess = far - (1 - tar)
    after = (excess >= 0).argmax(-1)[..., None]

    def at(values: Floats, places: Ints) -> Floats:
        return np.take_along_axis(values, places, -1)[..., 0]

    low, high = at(excess, after - 1), at(excess, after)
    start, end = at(far, after - 1), at(far, after)
    return start + (end - start) * -low / (high - low)
