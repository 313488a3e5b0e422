"""Verification figures on bootstrap samples of the pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from idloss.evaluation.arrays import Floats
from idloss.evaluation.kfold import FoldResult
from idloss.evaluation.roc import FAR_TARGETS, UP, Ranked, area, equal_error, tar_name

BOOTSTRAP_DRAWS = 1000
BLOCK_BYTES = 64 * 2**20


def bootstrap(
    scores: ArrayLike,
    same: ArrayLike,
    *,
    far_targets: Sequence[float] = FAR_TARGETS,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Floats]:
    """The ROC figures on bootstrap samples of the pairs, same and different drawn separately.

    Pairs are sorted once; a sample is a vector of counts, and its curve two cumulative sums.

    Args:
        scores: Similarities `[N]`.
        same: Whether each pair is of one person, `[N]`.
        far_targets: False accept rates for TAR@FAR.
        draws: Number of samples.
        seed: Seed; the samples do not depend on `block_bytes`.
        block_bytes: Memory for the samples that are worked on at once.

    Returns:
        `auc`, `eer` and `tar@far=...`, each `[draws]`.

    Raises:
        ValueError: Shapes do not fit, a score is not finite, or one of the classes is empty.
    """
    ranked = Ranked(scores, same)
    names = ("auc", "eer", *map(tar_name, far_targets))
    figures = {name: np.empty(draws) for name in names}
    # an index, two counts, two sums and two shares of 8 bytes for each pair and sample
    block = max(1, block_bytes // (7 * 8 * ranked.same.size))
    genuine, strangers = np.random.default_rng(seed).spawn(2)
    for start in range(0, draws, block):
        part = slice(start, min(start + block, draws))
        size = part.stop - part.start
        tar = ranked.accepted(ranked.same, size, genuine) / ranked.n_same
        far = ranked.accepted(ranked.different, size, strangers) / ranked.n_different
        figures["auc"][part] = area(far, tar)
        figures["eer"][part] = equal_error(far, tar)
        for target in far_targets:
            place = np.count_nonzero(far <= target * UP, axis=1) - 1
            figures[tar_name(target)][part] = tar[np.arange(size), place]
    return figures


def bootstrap_accuracy(
    result: FoldResult, *, draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> Floats:
    """The mean accuracy on bootstrap samples of each fold's pairs, thresholds held.

    Drawing n answers with replacement from answers of which a share p is right gives a binomial
    number of right ones, so that is what is drawn.

    Args:
        result: The k-fold accuracy.
        draws: Number of samples.
        seed: Seed.

    Returns:
        Mean accuracies, `[draws]`.
    """
    sizes = np.bincount(result.folds)
    right = np.random.default_rng(seed).binomial(sizes, result.accuracies, size=(draws, len(sizes)))
    means: Floats = (right / sizes).mean(1)
    return means
