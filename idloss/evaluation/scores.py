"""Embeddings of pairs to scores, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from idloss.evaluation.arrays import Floats, require_finite

# The norm under which an embedding counts as zero (torch.nn.CosineSimilarity's default, which the
# released code uses).
_EPS = 1e-8


def pair_scores(
    left: ArrayLike,
    right: ArrayLike,
    measure: Literal["cosine", "squared_euclidean"] = "cosine",
) -> Floats:
    """Compare the two embeddings of each pair, in float64.

    Args:
        left: Embeddings `[N, D]`.
        right: Embeddings `[N, D]`.
        measure: `"cosine"` in [-1, 1], or `"squared_euclidean"` of the normalised embeddings, in
            [0, 4].

    Returns:
        Scores `[N]`; the cosine with a zero embedding is 0.

    Raises:
        ValueError: The shapes differ, or an embedding is not finite.
    """
    first, second = _embedding_pairs(left, right)
    first, second = _normalised(first), _normalised(second)
    if measure == "cosine":
        return _dot(first, second)
    difference = first - second
    return _dot(difference, difference)


def centred_scores(left: ArrayLike, right: ArrayLike, folds: ArrayLike) -> Floats:
    """Cosines after the mean embedding of the other folds was subtracted, for each fold.

    SphereFace's evaluation. All folds are one matrix product: with the mean `m` of a fold's
    training pairs, `(a - m)(b - m) = ab - am - bm + mm`.

    Args:
        left: Embeddings `[N, D]`.
        right: Embeddings `[N, D]`.
        folds: Fold of each pair, `[N]`.

    Returns:
        Scores `[F, N]`: row f holds all pairs as fold f's training set sees them.

    Raises:
        ValueError: The shapes differ, or an embedding is not finite.
    """
    first, second = _embedding_pairs(left, right)
    fold_of = np.asarray(folds)
    # Shifting everything by one vector changes nothing in exact arithmetic, and here spares the
    # digits that would cancel when all embeddings lie close together, as those of 7x6 probes do.
    centre = (first.mean(0) + second.mean(0)) / 2
    first, second = first - centre, second - centre
    held_out = np.arange(fold_of.max() + 1)[:, None] == fold_of
    training = ~held_out
    means = training @ (first + second) / (2 * training.sum(1, keepdims=True))

    first_mean, second_mean = means @ first.T, means @ second.T
    mean_mean = _dot(means, means)[:, None]
    product = _dot(first, second) - first_mean - second_mean + mean_mean
    first_norm = np.sqrt(np.maximum(_dot(first, first) - 2 * first_mean + mean_mean, 0))
    second_norm = np.sqrt(np.maximum(_dot(second, second) - 2 * second_mean + mean_mean, 0))
    scores: Floats = product / np.maximum(first_norm * second_norm, _EPS)
    return scores


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


def _normalised(embeddings: Floats) -> Floats:
    norms = np.sqrt(_dot(embeddings, embeddings))[:, None]
    scaled: Floats = embeddings / np.maximum(norms, _EPS)
    return scaled


def _dot(first: Floats, second: Floats) -> Floats:
    product: Floats = np.einsum("nd,nd->n", first, second)
    return product
