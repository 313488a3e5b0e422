"""Face identification from ready embeddings: search of a gallery, rank-1 and CMC, the open set.

With one gallery image drawn for each person, several times, as in the paper's Table 2; or against
the gallery that a data set comes with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from idloss.evaluation.statistics import NOT_FINITE, Bools, Estimate, Floats, Ints, estimate
from idloss.evaluation.verification import BOOTSTRAP_DRAWS, rejecting_threshold

# Paper, section 4.4: subjects with at least four images, ten runs.
MIN_IMAGES = 4
DRAWS = 10
MAX_RANK = 20
FPIR_TARGETS = (1e-1, 1e-2, 1e-3)
ENROLLED_SHARE = 0.5
# QMUL-SurvFace reports TPIR within rank 20 at these rates (Cheng, Zhu, Gong 2018, section 5).
SURVFACE_FPIR_TARGETS = (0.3, 0.2, 0.1, 0.01)
TPIR_RANKS = (1, 20)
# PyTorch, not FAISS, whose exact search takes as long in the same memory. A block of 512-d
# embeddings and its scores stays about in a core's share of the cache; larger ones were slower.
BLOCK_BYTES = 16 * 2**20
# Matrix products run a third faster on whole vector registers of columns.
_ALIGNED_ROWS = 64
_EPS = 1e-12

Array = ArrayLike | Tensor


class GalleryDraws(NamedTuple):
    """Which images are the gallery in each draw."""

    images: Ints  # [M], those that take part, sorted by subject
    subjects: Ints  # [M], in 0..S-1
    gallery: Ints  # [draws, S], places in `images`

    @property
    def digest(self) -> str:
        """SHA-256 of the draws, equal where two runs used the same galleries."""
        parts = b"".join(np.ascontiguousarray(part, dtype="<i8").tobytes() for part in self)
        return hashlib.sha256(parts).hexdigest()


def draw_galleries(subjects: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> GalleryDraws:
    """Draw one gallery image for each of the subjects `[N]` with enough images, several times."""
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    labels = np.asarray(subjects)
    if labels.ndim != 1:
        raise ValueError(f"subjects must be [N], got shape {list(labels.shape)}")
    _, subject_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    enough = counts >= MIN_IMAGES
    if enough.sum() < 2:
        raise ValueError(
            f"{int(enough.sum())} of {counts.size} subjects have {MIN_IMAGES} images or more, "
            "identification needs two; give more images"
        )
    number = np.cumsum(enough) - 1
    images = np.flatnonzero(enough[subject_of])
    images = images[np.argsort(subject_of[images], kind="stable")]
    starts = np.cumsum(counts[enough]) - counts[enough]
    gallery = [
        starts + (np.random.default_rng([seed, draw]).random(starts.size) * counts[enough])
        for draw in range(draws)
    ]
    return GalleryDraws(images, number[subject_of[images]], np.stack(gallery).astype(np.int64))


def identify(
    gallery: Array, probes: Array, subjects: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> tuple[dict[str, Estimate], dict[str, Floats]]:
    """Rates, `rank1` `[draws]` and `cmc` `[draws, R]` of `[N, D]`, as in the paper's Table 2."""
    drawn = draw_galleries(subjects, draws=draws, seed=seed)
    enrolled, searched = _both(gallery, probes, len(np.asarray(subjects)), drawn.images)
    subject_of = torch.from_numpy(drawn.subjects)
    n_subjects = drawn.gallery.shape[1]
    is_probe = np.ones((draws, len(searched)), dtype=np.bool_)
    np.put_along_axis(is_probe, drawn.gallery, values=False, axis=1)
    counts = np.zeros((draws, n_subjects + 1), dtype=np.int64)
    for part, draw, scores in _score_blocks(searched, enrolled, drawn.gallery):
        own = scores.gather(1, subject_of[part, None])
        # every other subject that scores as high counts: one embedding for all gets no rank 1
        rank = torch.count_nonzero(scores >= own, dim=1).numpy()[is_probe[draw, part]]
        counts[draw] += np.bincount(rank, minlength=n_subjects + 1)
    cmc = counts.cumsum(1)[:, 1 : MAX_RANK + 1] / counts.sum(1, keepdims=True)
    rates = {f"rank{r}": estimate(cmc[:, r - 1]) for r in (1, 5, 10) if r <= cmc.shape[1]}
    return rates, {"rank1": cmc[:, 0], "cmc": cmc}


def identify_open_set(
    gallery: Array, probes: Array, subjects: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> tuple[dict[str, Estimate], dict[str, Floats]]:
    """TPIR at FPIR, `tpir` and `thresholds` `[draws, T]`: some of those who pass are enrolled.

    Their other images are mated probes, all of everybody else non-mated ones, whose best scores
    give the threshold. A mated probe counts where its own subject is the best and exceeds it.
    """
    labels = np.asarray(subjects)
    drawn = draw_galleries(labels, draws=draws, seed=seed)
    n_able = drawn.gallery.shape[1]
    n_enrolled = round(ENROLLED_SHARE * n_able)
    # those who can be enrolled keep their places, everybody else comes after them
    others = np.setdiff1d(np.arange(labels.size), drawn.images)
    order = np.concatenate((drawn.images, others))
    enrolled, searched = _both(gallery, probes, labels.size, order)
    able_of = np.concatenate((drawn.subjects, np.full(others.size, n_able)))

    watched = np.empty((draws, n_enrolled), dtype=np.int64)
    columns = np.full((draws, n_able + 1), -1)
    for draw, places in enumerate(drawn.gallery):
        # a stream of its own, so that the galleries are those of the closed set
        chosen = np.random.default_rng([seed, draw, 1]).permutation(n_able)[:n_enrolled]
        watched[draw] = places[chosen]
        columns[draw, chosen] = np.arange(n_enrolled)
    column_of = columns[:, able_of]

    best = np.empty((draws, labels.size), dtype=np.float32)
    found = np.empty((draws, labels.size), dtype=np.bool_)
    for part, draw, scores in _score_blocks(searched, enrolled, watched):
        best[draw, part] = scores.amax(1).numpy()
        own = scores.gather(1, torch.from_numpy(column_of[draw, part, None].clip(0)))
        found[draw, part] = torch.count_nonzero(scores >= own, dim=1).numpy() == 1

    non_mated = column_of < 0
    mated = ~non_mated
    np.put_along_axis(mated, watched, values=False, axis=1)
    strangers = [best[draw][non_mated[draw]] for draw in range(draws)]
    thresholds = np.array(
        [[rejecting_threshold(one, t) for t in FPIR_TARGETS] for one in strangers]
    )
    passed = (mated & found)[:, None] & (best[:, None] > thresholds[:, :, None])
    tpir = passed.sum(2) / mated.sum(1)[:, None]
    rates = zip(FPIR_TARGETS, tpir.T, strict=True)
    named = {f"tpir@fpir={target:g}": estimate(shares) for target, shares in rates}
    return named, {"tpir": tpir, "thresholds": thresholds}


def _both(gallery: Array, probes: Array, count: int, places: Ints) -> tuple[Tensor, Tensor]:
    """Normalised embeddings of some images as gallery and as probes."""
    sides = []
    for name, embeddings in (("gallery", gallery), ("probe", probes)):
        side = _as_tensor(embeddings).cpu()
        if side.ndim != 2 or len(side) != count:
            raise ValueError(
                f"{name} embeddings must be [{count}, D], one for each subject label, got "
                f"{list(side.shape)}"
            )
        sides.append(_normalised(side, name)[places])
    if sides[0].shape != sides[1].shape:
        raise ValueError(
            f"gallery and probe embeddings differ in width: {sides[0].shape[1]} and "
            f"{sides[1].shape[1]}"
        )
    return sides[0], sides[1]


def _score_blocks(
    probes: Tensor, images: Tensor, galleries: Ints
) -> Iterator[tuple[slice, int, Tensor]]:
    """Cosines of blocks of probes with each draw's gallery: the block, the draw, the scores."""
    # draws share many of their images: each that is ever in a gallery is compared once
    ever, columns = np.unique(galleries, return_inverse=True)
    enrolled = images[ever].T
    picks = torch.from_numpy(columns.reshape(galleries.shape))
    rows = max(1, BLOCK_BYTES // (4 * len(ever)))
    for start in range(0, len(probes), rows):
        part = slice(start, start + rows)
        scores = probes[part] @ enrolled
        for draw, pick in enumerate(picks):
            yield part, draw, scores.index_select(1, pick)


def found_within(
    gallery: NDArray[np.float32], gallery_labels: Ints, probes: NDArray[np.float32], labels: Ints
) -> Bools:
    """Whether each probe's person is among the first r of a set's own gallery, `[P, R]`."""
    matches = search(gallery, probes, min(MAX_RANK, len(gallery)))
    right = gallery_labels[matches.places.numpy()] == labels[:, None]
    return np.asarray(np.maximum.accumulate(right, axis=1))


def closed_set(within: Bools, *, seed: int = 0) -> tuple[dict[str, Estimate], Floats]:
    """Rates named `rank1` and the like with bootstrap intervals over probes, and the CMC `[R]`."""
    curve: Floats = within.mean(0)
    ranks = [rank for rank in (1, 5, 10, 20) if rank <= within.shape[1]]
    return {f"rank{rank}": _share(curve[rank - 1], len(within), seed) for rank in ranks}, curve


def open_set(
    gallery: NDArray[np.float32],
    gallery_labels: Ints,
    mated: NDArray[np.float32],
    labels: Ints,
    strangers: NDArray[np.float32],
    *,
    seed: int = 0,
) -> tuple[dict[str, Estimate], Bools]:
    """TPIR at FPIR by rank, and whether each mated probe counts at the first and rank 1, `[P]`.

    A probe counts where an image of its person is among the first r of the gallery and its score
    exceeds what no more than the wanted share of strangers do.
    """
    best = search(gallery, strangers, 1).scores[:, 0].numpy()
    thresholds = {target: rejecting_threshold(best, target) for target in SURVFACE_FPIR_TARGETS}
    matches = search(gallery, mated, min(max(TPIR_RANKS), len(gallery)))
    right = gallery_labels[matches.places.numpy()] == labels[:, None]
    # the best score of the own person within the first r
    own = np.maximum.accumulate(np.where(right, matches.scores.numpy(), -np.inf), axis=1)
    figures: dict[str, Estimate] = {}
    for rank in (rank for rank in TPIR_RANKS if rank <= own.shape[1]):
        for target, threshold in thresholds.items():
            name = f"tpir{'' if rank == 1 else rank}@fpir={target:g}"
            passed = own[:, rank - 1] > threshold
            figures[name] = _share(float(passed.mean()), len(mated), seed)
    correct: Bools = own[:, 0] > thresholds[SURVFACE_FPIR_TARGETS[0]]
    return figures, correct


def _share(value: float, count: int, seed: int) -> Estimate:
    """A share of so many probes, with its bootstrap interval."""
    drawn = np.random.default_rng(seed).binomial(count, value, BOOTSTRAP_DRAWS) / count
    return estimate([value], resampled=drawn)


class Matches(NamedTuple):
    """The best matches of each probe, best first."""

    scores: Tensor  # cosines, [P, k]
    places: Tensor  # rows of the gallery, [P, k]


def search(gallery: Array, probes: Array, k: int = 1) -> Matches:
    """Find the k nearest of a gallery `[G, D]` of any size by cosine, exactly, in blocks.

    The gallery may be a memory-mapped array, is read once for each block of probes, and need not be
    normalised; the search runs where the probes `[P, D]` are. Beyond arguments and answer it takes
    `BLOCK_BYTES`, but never less than one row against one probe. Of equal scores any may be given.
    """
    source = gallery if isinstance(gallery, Tensor) else np.asanyarray(gallery)
    searched = _as_tensor(probes)
    if source.ndim != 2 or searched.ndim != 2 or source.shape[1] != searched.shape[1]:
        raise ValueError(
            f"gallery and probes must be [G, D] and [P, D] with one D, got {list(source.shape)} "
            f"and {list(searched.shape)}"
        )
    size, width = int(source.shape[0]), int(source.shape[1])
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in 1..{size}, the size of the gallery, got {k}")
    # In float32 a probe takes its features, and k scores with their rows (twice as wide) both old
    # and new; a row of the gallery its features, its norm and a score with each probe, which is
    # copied for those probes that are better.
    per_probe = 4 * (width + 6 * k)
    n_probes = max(1, min(len(searched), BLOCK_BYTES // 4 // per_probe))
    rows = (BLOCK_BYTES - n_probes * per_probe) // (4 * (width + 1 + 2 * n_probes))
    if rows > _ALIGNED_ROWS:
        rows -= rows % _ALIGNED_ROWS
    rows = max(1, min(size, rows))
    answers = [_search_block(source, block, k, rows) for block in searched.split(n_probes)]
    return Matches(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def _search_block(source: Tensor | NDArray[Any], probes: Tensor, k: int, rows: int) -> Matches:
    searched = _normalised(probes, "probe")
    scores = searched.new_full((len(searched), k), -torch.inf)
    places = torch.zeros(scores.shape, dtype=torch.int64, device=searched.device)
    for start in range(0, len(source), rows):
        part = _as_tensor(source[start : start + rows]).to(searched.device, torch.float32)
        # cheaper than to normalise the rows where probes are fewer than features
        found = (searched @ part.T).div_(_norms_of(part, "gallery", start))
        # a maximum costs a fraction of a top k, and few blocks hold anything better
        better = (found.amax(1) > scores[:, -1]).nonzero().squeeze(1)
        if len(better):
            best, place = found[better].topk(min(k, found.shape[1]), dim=1)
            merged = torch.cat((scores[better], best), 1)
            scores[better], order = merged.topk(k, dim=1)
            places[better] = torch.cat((places[better], place + start), 1).gather(1, order)
    return Matches(scores, places)


def _as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """Embeddings as a tensor, without their history; copied only where they are read-only."""
    if isinstance(values, Tensor):
        return values.detach()
    # a memory-mapped array is read-only, which a tensor cannot be: read it here
    return torch.from_numpy(np.require(values, requirements="W"))


def _norms_of(embeddings: Tensor, what: str, start: int = 0) -> Tensor:
    """Norms `[B]` of embeddings `[B, D]`, never quite zero; `start` is the first one's number."""
    norms: Tensor = torch.linalg.vector_norm(embeddings, dim=1)
    if not norms.isfinite().all():
        row = start + int(norms.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{what} embedding {row} is not finite; {NOT_FINITE}")
    return norms.clamp_(min=_EPS)


def _normalised(embeddings: Tensor, what: str) -> Tensor:
    exact = embeddings.float()
    return exact / _norms_of(exact, what)[:, None]
