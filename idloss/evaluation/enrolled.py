"""Identification against the gallery that a data set comes with: one gallery, no draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from idloss.evaluation.arrays import Bools, Floats
from idloss.evaluation.bootstrap import BOOTSTRAP_DRAWS
from idloss.evaluation.intervals import Estimate, estimate
from idloss.evaluation.roc import rejecting_threshold
from idloss.evaluation.search import search

MAX_RANK = 20
RANKS = (1, 5, 10, 20)
# QMUL-SurvFace reports TPIR within rank 20 at these rates (Cheng, Zhu, Gong 2018, section 5).
FPIR_TARGETS = (0.3, 0.2, 0.1, 0.01)
TPIR_RANKS = (1, 20)


def found_within(
    gallery: NDArray[np.float32],
    gallery_labels: NDArray[np.int64],
    probes: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    max_rank: int = MAX_RANK,
) -> Bools:
    """Whether each probe's person is among the first r images of the gallery.

    Args:
        gallery: Embeddings `[G, D]`.
        gallery_labels: Who they are, `[G]`, -1 for nobody known.
        probes: Embeddings `[P, D]`.
        labels: Who they are, `[P]`.
        max_rank: Longest r; no more than G.

    Returns:
        `[P, R]`, r = 1..R.
    """
    matches = search(gallery, probes, min(max_rank, len(gallery)))
    right = gallery_labels[matches.places.numpy()] == labels[:, None]
    within: Bools = np.maximum.accumulate(right, axis=1)
    return within


def closed_set(
    within: Bools, *, seed: int = 0, ranks: Sequence[int] = RANKS
) -> tuple[dict[str, Estimate], Floats]:
    """Rates at some ranks with bootstrap intervals over the probes, and the CMC curve.

    Args:
        within: As from `found_within`, `[P, R]`.
        seed: Seed of the bootstrap.
        ranks: Ranks, from 1; those beyond the curve are left out.

    Returns:
        Estimates named `rank1` and the like, and the curve `[R]`.
    """
    curve: Floats = within.mean(0)
    figures = {}
    for rank in (rank for rank in ranks if rank <= within.shape[1]):
        figures[f"rank{rank}"] = share(curve[rank - 1], len(within), seed=seed)
    return figures, curve


def open_set(
    gallery: NDArray[np.float32],
    gallery_labels: NDArray[np.int64],
    mated: NDArray[np.float32],
    labels: NDArray[np.int64],
    strangers: NDArray[np.float32],
    *,
    fpir: Sequence[float] = FPIR_TARGETS,
    seed: int = 0,
) -> tuple[dict[str, Estimate], Bools]:
    """TPIR at FPIR: how many of the enrolled people are found when strangers are turned away.

    A mated probe counts where an image of its person is among the first r of the gallery and its
    score exceeds the threshold that no more than the wanted share of strangers exceed.

    Args:
        gallery: Embeddings `[G, D]`.
        gallery_labels: Who they are, `[G]`.
        mated: Embeddings of probes of enrolled people, `[P, D]`.
        labels: Who they are, `[P]`.
        strangers: Embeddings of probes of others, `[S, D]`.
        fpir: False positive identification rates aimed at.
        seed: Seed of the bootstrap.

    Returns:
        Estimates named `tpir@fpir=0.1` (rank 1) and `tpir20@fpir=0.1`, and whether each mated probe
        counts at the first of the rates and rank 1, `[P]`.
    """
    best = search(gallery, strangers, 1).scores[:, 0].numpy()
    matches = search(gallery, mated, min(max(TPIR_RANKS), len(gallery)))
    right = gallery_labels[matches.places.numpy()] == labels[:, None]
    # the best score of the own person within the first r
    own = np.maximum.accumulate(np.where(right, matches.scores.numpy(), -np.inf), axis=1)
    figures: dict[str, Estimate] = {}
    for rank in (rank for rank in TPIR_RANKS if rank <= own.shape[1]):
        for target in fpir:
            passed = own[:, rank - 1] > rejecting_threshold(best, target)
            name = f"tpir{'' if rank == 1 else rank}@fpir={target:g}"
            figures[name] = share(float(passed.mean()), len(mated), seed=seed)
    correct: Bools = own[:, 0] > rejecting_threshold(best, fpir[0])
    return figures, correct


def share(value: float, count: int, *, seed: int) -> Estimate:
    """A share of so many probes, with its bootstrap interval.

    Args:
        value: The share, in [0, 1].
        count: How many it is a share of.
        seed: Seed of the bootstrap.

    Returns:
        The estimate.
    """
    drawn = np.random.default_rng(seed).binomial(count, value, BOOTSTRAP_DRAWS) / count
    return estimate([value], resampled=drawn)
