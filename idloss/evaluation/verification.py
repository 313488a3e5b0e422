"""All verification figures of one cell, and how sure each is."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.typing import ArrayLike

from idloss.evaluation.arrays import Floats, read_scored
from idloss.evaluation.bootstrap import BOOTSTRAP_DRAWS, bootstrap, bootstrap_accuracy
from idloss.evaluation.intervals import Estimate, estimate
from idloss.evaluation.kfold import FoldResult
from idloss.evaluation.roc import FAR_TARGETS, rejecting_threshold, roc, tar_name


def summarise(
    scores: ArrayLike,
    same: ArrayLike,
    result: FoldResult,
    *,
    far_targets: Sequence[float] = FAR_TARGETS,
    draws: int = BOOTSTRAP_DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Every verification figure with its intervals over folds and from the bootstrap.

    TAR@FAR over folds takes its threshold from the other folds; AUC and EER are each fold's own.
    With n different-person pairs no FAR below 1/n can be measured: there TAR is that of no false
    accept at all, and its bootstrap interval shows how little that says.

    Args:
        scores: Similarities `[N]`; larger means the same person.
        same: Whether each pair is of one person, `[N]`.
        result: The k-fold accuracy of the same pairs.
        far_targets: False accept rates for TAR@FAR.
        draws: Bootstrap samples; 0 for none.
        seed: Seed of the bootstrap.
        level: Share of the probability the intervals are to hold.

    Returns:
        Estimates named `accuracy`, `auc`, `eer` and `tar@far=0.001` and the like.

    Raises:
        ValueError: Shapes do not fit, a score is not finite, or a fold lacks one of the classes.
    """
    values, truth = read_scored(scores, same)
    if result.folds.shape != truth.shape:
        raise ValueError(f"the result is of {result.folds.size} pairs, the scores of {truth.size}")
    names = ("auc", "eer", *map(tar_name, far_targets))
    fold_figures: dict[str, list[float]] = {name: [] for name in names}
    for fold in range(len(result.accuracies)):
        held_out = result.folds == fold
        own = roc(values[held_out], truth[held_out])
        fold_figures["auc"].append(own.auc)
        fold_figures["eer"].append(own.eer)
        genuine = values[held_out & truth]
        strangers = values[~held_out & ~truth]
        for target in far_targets:
            threshold = rejecting_threshold(strangers, target)
            fold_figures[tar_name(target)].append(float((genuine > threshold).mean()))

    whole = roc(values, truth)
    figures = {"auc": whole.auc, "eer": whole.eer}
    figures |= {tar_name(target): whole.tar_at(target) for target in far_targets}
    resampled: dict[str, Floats] = {}
    if draws:
        resampled = bootstrap(values, truth, far_targets=far_targets, draws=draws, seed=seed)
        resampled["accuracy"] = bootstrap_accuracy(result, draws=draws, seed=seed)
    summary = {
        "accuracy": estimate(
            result.accuracies, result.accuracy, level=level, resampled=resampled.get("accuracy")
        )
    }
    for name, value in figures.items():
        summary[name] = estimate(
            fold_figures[name], value, level=level, resampled=resampled.get(name)
        )
    return summary
