"""Face verification from ready embeddings: k-fold accuracy, ROC, and how sure each figure is.

Arrays in, arrays out: nothing here knows of images or networks. A score is a similarity, larger
meaning the same person, but for the squared Euclidean distance of the `standard` rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from idloss.data.pairs import FOLDS, Remainder, contiguous_folds
from idloss.evaluation.statistics import Bools, Estimate, Floats, Ints, estimate, require_finite

FAR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)
BOOTSTRAP_DRAWS = 1000
BLOCK_BYTES = 64 * 2**20
# The norm under which an embedding counts as zero (torch.nn.CosineSimilarity's default, which the
# released code uses).
_EPS = 1e-8
# Room for rounding when a share is compared with a target such as 0.1.
_UP = 1 + 1e-12
# The same for scores that float32 carried out of their range.
_ROOM = 1e-3

Measure = Literal["cosine", "centred_cosine", "squared_euclidean"]


@dataclass(frozen=True)
class ThresholdRule:
    """How a verification protocol turns pairs into an accuracy."""

    name: str
    measure: Measure
    grid: Callable[[], Floats]  # candidate thresholds, rising
    pick: Literal["first", "last", "mean"]  # which of the equally good ones
    # the side of the threshold on which pairs are called the same
    same: Literal["above", "below"] = "above"
    ties: Literal["different", "wrong"] = "different"  # what a score equal to the threshold is
    remainder: Remainder = "spread"  # the folds that pairs left over go to


# johnnysclai/SR_LRFR, src/lfw_verification.py and src/common/util.py: 10,001 thresholds over
# [-1, 1], and `>=` in the search, so that the last of the best wins.
PAPER_RULE = ThresholdRule(
    "paper", "cosine", lambda: np.linspace(-10000, 10000, 10001) / 10000, pick="last"
)
# wy1iu/sphereface, test/code/evaluation.m: 20,001 thresholds, both comparisons strict, the mean of
# the best thresholds.
SPHEREFACE_RULE = ThresholdRule(
    "sphereface",
    "centred_cosine",
    lambda: np.arange(-10000, 10001) / 10000,
    pick="mean",
    ties="wrong",
)
# deepinsight/insightface, recognition/arcface_torch/eval/verification.py: 400 thresholds, argmax.
STANDARD_RULE = ThresholdRule(
    "standard",
    "squared_euclidean",
    lambda: np.arange(0, 4, 0.01),
    pick="first",
    same="below",
    remainder="first",
)


def pair_scores(left: ArrayLike, right: ArrayLike, measure: Measure = "cosine") -> Floats:
    """Scores `[N]` in float64 of embeddings `[N, D]`; the cosine with a zero embedding is 0."""
    if measure == "centred_cosine":
        raise ValueError("centred cosines differ from fold to fold; call verify")
    first, second = (
        side / np.maximum(np.sqrt(_dot(side, side))[:, None], _EPS)
        for side in _embedding_pairs(left, right)
    )
    if measure == "cosine":
        return _dot(first, second)
    return _dot(first - second, first - second)


def centred_scores(left: ArrayLike, right: ArrayLike, folds: ArrayLike) -> Floats:
    """Cosines `[F, N]` after the mean embedding of each fold's training pairs was subtracted."""
    first, second = _embedding_pairs(left, right)
    fold_of = np.asarray(folds)
    # Shifting everything by one vector changes nothing in exact arithmetic, and here spares the
    # digits that would cancel when all embeddings lie close together, as those of 7x6 probes do.
    # All folds are one matrix product: (a - m)(b - m) = ab - am - bm + mm.
    centre = (first.mean(0) + second.mean(0)) / 2
    first, second = first - centre, second - centre
    training = np.arange(fold_of.max() + 1)[:, None] != fold_of
    means = training @ (first + second) / (2 * training.sum(1, keepdims=True))

    first_mean, second_mean = means @ first.T, means @ second.T
    mean_mean = _dot(means, means)[:, None]
    product = _dot(first, second) - first_mean - second_mean + mean_mean
    first_norm = np.sqrt(np.maximum(_dot(first, first) - 2 * first_mean + mean_mean, 0))
    second_norm = np.sqrt(np.maximum(_dot(second, second) - 2 * second_mean + mean_mean, 0))
    scores: Floats = product / np.maximum(first_norm * second_norm, _EPS)
    return scores


@dataclass(frozen=True)
class FoldResult:
    """Accuracy of each of F folds at the threshold that its training folds chose."""

    accuracies: Floats  # [F]
    thresholds: Floats  # [F]
    correct: Bools  # [N]
    folds: Ints  # [N], in 0..F-1

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the folds, the figure that papers print."""
        return float(self.accuracies.mean())


def verify(
    left: ArrayLike,
    right: ArrayLike,
    same: ArrayLike,
    rule: ThresholdRule = PAPER_RULE,
    folds: ArrayLike | None = None,
) -> FoldResult:
    """K-fold accuracy of pairs of embeddings `[N, D]`, in whatever measure the rule asks for."""
    fold_of = _folds(folds, len(np.asarray(same)), rule.remainder)
    if rule.measure == "centred_cosine":
        scores = centred_scores(left, right, fold_of)
    else:
        scores = pair_scores(left, right, rule.measure)
    return kfold(scores, same, rule, fold_of)


def kfold(
    scores: ArrayLike,
    same: ArrayLike,
    rule: ThresholdRule = PAPER_RULE,
    folds: ArrayLike | None = None,
) -> FoldResult:
    """K-fold accuracy of scores `[N]`, or `[F, N]`; a fold at the best threshold of the others."""
    truth = _labels(same)
    values = np.asarray(scores, dtype=np.float64)
    fold_of = _folds(folds, truth.size, rule.remainder)
    n = int(fold_of.max()) + 1
    if values.shape not in ((truth.size,), (n, truth.size)):
        raise ValueError(
            f"scores must be [{truth.size}] or [{n}, {truth.size}], got {list(values.shape)}"
        )
    require_finite(values, "score")
    low, high = (0, 4) if rule.measure == "squared_euclidean" else (-1, 1)
    if values.min() < low - _ROOM or values.max() > high + _ROOM:
        raise ValueError(
            f"scores from {values.min():.4g} to {values.max():.4g} are no {rule.measure}, which "
            f"the rule {rule.name!r} judges and which lies in [{low}, {high}]"
        )
    rows = np.atleast_2d(values)

    grid = rule.grid()
    training = np.arange(n)[:, None] != fold_of
    right = _right_answers(rows, truth, training, grid, rule)
    picks: dict[str, Callable[[Floats], Any]] = {"first": np.min, "last": np.max, "mean": np.mean}
    best = right == right.max(1, keepdims=True)
    thresholds = np.array([picks[rule.pick](grid[places]) for places in best])

    own = rows[fold_of, np.arange(truth.size)] if len(rows) > 1 else rows[0]
    limits = thresholds[fold_of]
    correct = (own > limits if rule.same == "above" else own < limits) == truth
    if rule.ties == "wrong":
        correct &= own != limits
    accuracies = np.bincount(fold_of, weights=correct, minlength=n) / np.bincount(fold_of)
    return FoldResult(accuracies, thresholds, correct, fold_of)


def _right_answers(
    rows: Floats, truth: Bools, training: Bools, grid: Floats, rule: ThresholdRule
) -> Ints:
    """Right answers among each fold's training pairs at each threshold, `[F, T]`."""
    # a pair's place among the thresholds says from where on, or up to where, it is answered rightly
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

    change = histogram(since, rising) - histogram(until, falling)
    right: Ints = (falling.sum(1, keepdims=True) + change.cumsum(1))[:, :-1]
    return right


def _folds(folds: ArrayLike | None, count: int, remainder: Remainder) -> Ints:
    if folds is None:
        if count < FOLDS:
            raise ValueError(f"{count} pairs cannot be cut into {FOLDS} folds; give folds or more")
        return contiguous_folds(count, FOLDS, remainder).numpy()
    given = np.asarray(folds, dtype=np.int64)
    if given.shape != (count,):
        raise ValueError(f"folds must be [{count}], one for each pair, got {list(given.shape)}")
    if given.min() < 0 or given.max() < 1 or not np.bincount(given).all():
        raise ValueError(f"folds must be numbered 0, 1, ... without gaps, got {np.unique(given)}")
    return given


@dataclass(frozen=True)
class Roc:
    """Operating points `[G + 1]`, from the strictest threshold to the laxest."""

    far: Floats
    tar: Floats

    @property
    def auc(self) -> float:
        """Area under the curve."""
        return float(_area(self.far, self.tar))

    @property
    def eer(self) -> float:
        """Error rate where false accepts and false rejects are equally frequent."""
        return float(_equal_error(self.far, self.tar))

    def tar_at(self, far: float) -> float:
        """TAR at the laxest threshold whose FAR does not pass `far`; no interpolation."""
        return float(self.tar[np.count_nonzero(self.far <= far * _UP) - 1])


def roc(scores: ArrayLike, same: ArrayLike) -> Roc:
    """The receiver operating characteristic of similarities `[N]`: a point for each of them."""
    ranked = _Ranked(*_scored(scores, same))
    far = np.concatenate(([0], np.cumsum(ranked.different)[ranked.ends])) / ranked.different.sum()
    tar = np.concatenate(([0], np.cumsum(ranked.same)[ranked.ends])) / ranked.same.sum()
    return Roc(far, tar)


def rejecting_threshold(scores: NDArray[Any], share: float) -> float:
    """The lowest of the scores `[N]` that no more than a share exceed; -inf where all may."""
    allowed = int(share * len(scores) * _UP)
    if allowed >= len(scores):
        return -np.inf
    place = len(scores) - 1 - allowed
    return float(np.partition(scores, place)[place])


class _Ranked:
    """Pairs sorted by falling score, with the last place of each run of equal scores."""

    def __init__(self, scores: Floats, same: Bools) -> None:
        order = np.argsort(-scores, kind="stable")
        self.same = same[order]
        self.different = ~self.same
        self.ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))

    def accepted(self, members: Bools, draws: int, rng: np.random.Generator) -> Ints:
        """Members accepted at each operating point in each bootstrap sample, `[draws, G + 1]`."""
        places = np.flatnonzero(members)
        picked = places[rng.integers(places.size, size=(draws, places.size))]
        picked += np.arange(draws)[:, None] * members.size
        counts = np.bincount(picked.ravel(), minlength=draws * members.size)
        sums = counts.reshape(draws, -1).cumsum(1)[:, self.ends]
        return np.concatenate((np.zeros((draws, 1), dtype=sums.dtype), sums), axis=1)


def _area(far: Floats, tar: Floats) -> Any:
    """Area under curves of operating points, `[..., G + 1]` each."""
    return (np.diff(far) * (tar[..., 1:] + tar[..., :-1]) / 2).sum(-1)


def _equal_error(far: Floats, tar: Floats) -> Any:
    """Where FAR meets 1 - TAR, `[...]`, on the line between the operating points round it."""
    excess = far - (1 - tar)
    after = (excess >= 0).argmax(-1)[..., None]

    def at(values: Floats, places: Ints) -> Floats:
        return np.take_along_axis(values, places, -1)[..., 0]

    low, high = at(excess, after - 1), at(excess, after)
    start, end = at(far, after - 1), at(far, after)
    return start + (end - start) * -low / (high - low)


def bootstrap(
    scores: ArrayLike, same: ArrayLike, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> dict[str, Floats]:
    """AUC, EER and TAR@FAR, `[draws]` each, on samples of the pairs, drawn for each class apart."""
    ranked = _Ranked(*_scored(scores, same))
    names = ("auc", "eer", *map(_tar_name, FAR_TARGETS))
    figures = {name: np.empty(draws) for name in names}
    # an index, two counts, two sums and two shares of 8 bytes for each pair and sample
    block = max(1, BLOCK_BYTES // (7 * 8 * ranked.same.size))
    genuine, strangers = np.random.default_rng(seed).spawn(2)
    for start in range(0, draws, block):
        part = slice(start, min(start + block, draws))
        size = part.stop - part.start
        tar = ranked.accepted(ranked.same, size, genuine) / ranked.same.sum()
        far = ranked.accepted(ranked.different, size, strangers) / ranked.different.sum()
        figures["auc"][part] = _area(far, tar)
        figures["eer"][part] = _equal_error(far, tar)
        for target in FAR_TARGETS:
            place = np.count_nonzero(far <= target * _UP, axis=1) - 1
            figures[_tar_name(target)][part] = tar[np.arange(size), place]
    return figures


def bootstrap_accuracy(
    result: FoldResult, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Floats:
    """The mean accuracy on samples of each fold's pairs, `[draws]`, thresholds held."""
    sizes = np.bincount(result.folds)
    right = np.random.default_rng(seed).binomial(sizes, result.accuracies, size=(draws, len(sizes)))
    return np.asarray((right / sizes).mean(1))


def summarise(
    scores: ArrayLike,
    same: ArrayLike,
    result: FoldResult,
    *,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Accuracy, AUC, EER and TAR@FAR by name, with intervals over folds and from the bootstrap."""
    values, truth = _scored(scores, same)
    if result.folds.shape != truth.shape:
        raise ValueError(f"the result is of {result.folds.size} pairs, the scores of {truth.size}")
    whole = roc(values, truth)
    figures = {"accuracy": result.accuracy, "auc": whole.auc, "eer": whole.eer}
    figures |= {_tar_name(target): whole.tar_at(target) for target in FAR_TARGETS}
    folds: dict[str, list[float]] = {name: [] for name in figures}
    folds["accuracy"] = result.accuracies.tolist()
    for fold in range(len(result.accuracies)):
        held_out = result.folds == fold
        own = roc(values[held_out], truth[held_out])
        folds["auc"].append(own.auc)
        folds["eer"].append(own.eer)
        strangers = values[~held_out & ~truth]  # thresholds are those of the other folds
        for target in FAR_TARGETS:
            passed = values[held_out & truth] > rejecting_threshold(strangers, target)
            folds[_tar_name(target)].append(float(passed.mean()))
    resampled = bootstrap(values, truth, draws=draws, seed=seed)
    resampled["accuracy"] = bootstrap_accuracy(result, draws=draws, seed=seed)
    return {
        name: estimate(folds[name], value, resampled=resampled[name])
        for name, value in figures.items()
    }


def _tar_name(far: float) -> str:
    return f"tar@far={far:g}"


def _labels(same: ArrayLike) -> Bools:
    """Labels of pairs `[N]` as truth values."""
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


def _scored(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, Bools]:
    """Finite scores in float64 and labels, `[N]` each, of pairs of both kinds."""
    truth = _labels(same)
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


def _embedding_pairs(left: ArrayLike, right: ArrayLike) -> tuple[Floats, Floats]:
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"embeddings must be two [N, D] of one shape, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    for name, side in (("left", first), ("right", second)):
        require_finite(side, f"{name} embedding")
    return first, second


def _dot(first: Floats, second: Floats) -> Floats:
    return np.asarray(np.einsum("nd,nd->n", first, second))
