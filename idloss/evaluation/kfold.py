"""K-fold accuracy: each fold is judged at the threshold that is best on the others.

Arrays in, arrays out: nothing here knows of images or networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from idloss.data.folds import FOLDS, Remainder, contiguous_folds
from idloss.evaluation.arrays import Bools, Floats, Ints, read_labels, require_finite
from idloss.evaluation.scores import centred_scores, pair_scores


@dataclass(frozen=True)
class ThresholdRule:
    """How a verification protocol turns pairs into an accuracy.

    Attributes:
        name: Its name.
        measure: What is compared with the threshold: the cosine, the cosine after the training
            folds' mean embedding was subtracted, or the squared Euclidean distance of the
            normalised embeddings.
        grid: Gives the candidate thresholds, rising.
        pick: Which of the equally good thresholds of the training folds is used.
        same: On which side of the threshold a pair is called the same person.
        ties: Whether a score equal to the threshold is called different, or wrong in any case.
        remainder: Where pairs go that do not divide evenly: spread over the folds, or one more to
            each of the first ones.
    """

    name: str
    measure: Literal["cosine", "centred_cosine", "squared_euclidean"]
    grid: Callable[[], Floats]
    pick: Literal["first", "last", "mean"]
    same: Literal["above", "below"] = "above"
    ties: Literal["different", "wrong"] = "different"
    remainder: Remainder = "spread"


def _paper_grid() -> Floats:
    return np.linspace(-10000, 10000, 10001) / 10000


def _sphereface_grid() -> Floats:
    return np.arange(-10000, 10001) / 10000


def _standard_grid() -> Floats:
    return np.arange(0, 4, 0.01)


# johnnysclai/SR_LRFR, src/lfw_verification.py and src/common/util.py: 10,001 thresholds over
# [-1, 1], and `>=` in the search, so that the last of the best wins.
PAPER_RULE = ThresholdRule("paper", "cosine", _paper_grid, pick="last")
# wy1iu/sphereface, test/code/evaluation.m: 20,001 thresholds, both comparisons strict, the mean of
# the best thresholds.
SPHEREFACE_RULE = ThresholdRule(
    "sphereface", "centred_cosine", _sphereface_grid, pick="mean", ties="wrong"
)
# deepinsight/insightface, recognition/arcface_torch/eval/verification.py: 400 thresholds, argmax.
STANDARD_RULE = ThresholdRule(
    "standard", "squared_euclidean", _standard_grid, pick="first", same="below", remainder="first"
)


@dataclass(frozen=True)
class FoldResult:
    """Accuracy of each fold at the threshold its training folds chose.

    Attributes:
        accuracies: Share of right answers in each fold, `[F]`.
        thresholds: Threshold of each fold, `[F]`.
        correct: Whether each pair was answered rightly, `[N]`.
        folds: Fold of each pair, `[N]`.
    """

    accuracies: Floats
    thresholds: Floats
    correct: Bools
    folds: Ints

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the folds, the figure that papers print."""
        return float(self.accuracies.mean())


def kfold(
    scores: ArrayLike,
    same: ArrayLike,
    rule: ThresholdRule = PAPER_RULE,
    *,
    folds: ArrayLike | None = None,
    n_folds: int = FOLDS,
) -> FoldResult:
    """K-fold accuracy: each fold is judged at the threshold that is best on the others.

    One pass for all thresholds and folds: each pair's place among the thresholds says from where
    on, or up to where, it is answered rightly; a histogram of the places and one cumulative sum
    give the right answers at every threshold.

    Args:
        scores: Scores `[N]`, in the rule's measure; or `[F, N]` where each fold has its own, as
            from `centred_scores`.
        same: Whether each pair is of one person, `[N]`, bool or 0/1.
        rule: The threshold rule.
        folds: Fold of each pair, `[N]` in 0..F-1; None for contiguous ones.
        n_folds: Number of contiguous folds.

    Returns:
        The accuracies, thresholds and right answers.

    Raises:
        ValueError: Shapes do not fit, a score is not finite, a label is not 0 or 1, or a fold is
            empty.
    """
    truth = read_labels(same)
    values = np.asarray(scores, dtype=np.float64)
    fold_of = _folds(folds, truth.size, n_folds, rule.remainder)
    n = int(fold_of.max()) + 1
    if values.shape not in ((truth.size,), (n, truth.size)):
        raise ValueError(
            f"scores must be [{truth.size}] or [{n}, {truth.size}], got {list(values.shape)}"
        )
    require_finite(values, "score")
    rows = np.atleast_2d(values)

    grid = rule.grid()
    training = np.arange(n)[:, None] != fold_of
    right = _right_answers(rows, truth, training, grid, rule)
    thresholds = _pick(grid, right == right.max(1, keepdims=True), rule.pick)

    own = rows[fold_of, np.arange(truth.size)] if len(rows) > 1 else rows[0]
    correct = _correct(own, truth, thresholds[fold_of], rule)
    sizes = np.bincount(fold_of, minlength=n)
    accuracies = np.bincount(fold_of, weights=correct, minlength=n) / sizes
    return FoldResult(accuracies, thresholds, correct, fold_of)


def verify(
    left: ArrayLike,
    right: ArrayLike,
    same: ArrayLike,
    rule: ThresholdRule = PAPER_RULE,
    *,
    folds: ArrayLike | None = None,
    n_folds: int = FOLDS,
) -> FoldResult:
    """K-fold accuracy from embeddings, in whatever measure the rule asks for.

    Args:
        left: Embeddings of each pair's first image, `[N, D]`.
        right: Embeddings of each pair's second image, `[N, D]`.
        same: Whether each pair is of one person, `[N]`.
        rule: The threshold rule.
        folds: Fold of each pair, `[N]`; None for contiguous ones.
        n_folds: Number of contiguous folds.

    Returns:
        The accuracies, thresholds and right answers.

    Raises:
        ValueError: See `kfold` and `pair_scores`.
    """
    fold_of = _folds(folds, len(np.asarray(same)), n_folds, rule.remainder)
    if rule.measure == "centred_cosine":
        scores = centred_scores(left, right, fold_of)
    else:
        scores = pair_scores(left, right, rule.measure)
    return kfold(scores, same, rule, folds=fold_of)


def _right_answers(
    rows: Floats, truth: Bools, training: Bools, grid: Floats, rule: ThresholdRule
) -> Ints:
    """Right answers among each fold's training pairs at each threshold, `[F, T]`."""
    under = np.searchsorted(grid, rows, side="left")  # thresholds below the score
    up_to = np.searchsorted(grid, rows, side="right")  # thresholds below it or equal
    if rule.same == "above":  # same where the threshold is below the score
        until, since = under, up_to if rule.ties == "wrong" else under
        falling, rising = training & truth, training & ~truth
    else:  # same where the threshold is above the score
        until, since = under if rule.ties == "wrong" else up_to, up_to
        falling, rising = training & ~truth, training & truth
    n, width = len(training), grid.size + 1
    offsets = np.arange(n)[:, None] * width

    def histogram(places: Ints, members: Bools) -> Ints:
        chosen = np.broadcast_to(places + offsets, members.shape)[members]
        return np.bincount(chosen, minlength=n * width).reshape(n, width)

    # a falling pair is right from the first threshold on until its place, a rising one from there
    change = histogram(since, rising) - histogram(until, falling)
    right: Ints = (falling.sum(1, keepdims=True) + change.cumsum(1))[:, :-1]
    return right


def _pick(grid: Floats, best: Bools, pick: Literal["first", "last", "mean"]) -> Floats:
    if pick == "mean":
        return np.array([grid[places].mean() for places in best])
    place = 0 if pick == "first" else -1
    return np.array([grid[places][place] for places in best])


def _correct(scores: Floats, truth: Bools, thresholds: Floats, rule: ThresholdRule) -> Bools:
    called_same = scores > thresholds if rule.same == "above" else scores < thresholds
    correct: Bools = called_same == truth
    if rule.ties == "wrong":
        correct &= scores != thresholds
    return correct


def _folds(folds: ArrayLike | None, count: int, n_folds: int, remainder: Remainder) -> Ints:
    if folds is None:
        if n_folds < 2 or count < n_folds:
            raise ValueError(f"{count} pairs cannot be cut into {n_folds} folds; give 2 to {count}")
        return contiguous_folds(count, n_folds, remainder).numpy()
    given = np.asarray(folds, dtype=np.int64)
    if given.shape != (count,):
        raise ValueError(f"folds must be [{count}], one for each pair, got {list(given.shape)}")
    if given.min() < 0 or given.max() < 1 or not np.bincount(given).all():
        raise ValueError(f"folds must be numbered 0, 1, ... without gaps, got {np.unique(given)}")
    return given
