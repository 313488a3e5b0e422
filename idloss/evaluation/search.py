"""Search of a gallery of any size, in blocks within a stated memory.

By PyTorch: in the same memory FAISS's exact search takes as long, and three times as long for few
probes; with memory as it likes it saves a fifth (`idloss benchmark search` sets them side by side).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from idloss.evaluation.arrays import NOT_FINITE

# A block of 512-d embeddings and its scores then stay about in a core's share of the cache; larger
# blocks were slower.
BLOCK_BYTES = 16 * 2**20
# Matrix products run a third faster on whole vector registers of columns.
_ALIGNED_ROWS = 64
_EPS = 1e-12


class Matches(NamedTuple):
    """The best matches of each probe, best first.

    Attributes:
        scores: Cosines, `[P, k]`.
        places: Rows of the gallery, `[P, k]`.
    """

    scores: Tensor
    places: Tensor


def search(
    gallery: ArrayLike | Tensor,
    probes: ArrayLike | Tensor,
    k: int = 1,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Matches:
    """Find the k nearest of a gallery of any size by cosine, exactly, in blocks.

    The gallery may be a memory-mapped array; it is read once for each block of probes and never
    copied whole. Beyond the arguments and the answer the search takes `block_bytes`, but never
    less than one row of the gallery against one probe. Among equal scores any may be given.

    Args:
        gallery: Embeddings `[G, D]`, not necessarily normalised.
        probes: Embeddings `[P, D]`, on the device the search is to run on.
        k: Matches wanted for each probe.
        block_bytes: Working memory, in bytes.

    Returns:
        Cosines and rows, on the probes' device.

    Raises:
        ValueError: Shapes do not fit, `k` is not in 1..G, an embedding is not finite, or
            `block_bytes` is not positive.
    """
    source = gallery if isinstance(gallery, Tensor) else np.asanyarray(gallery)
    searched = as_tensor(probes)
    if source.ndim != 2 or searched.ndim != 2 or source.shape[1] != searched.shape[1]:
        raise ValueError(
            f"gallery and probes must be [G, D] and [P, D] with one D, got {list(source.shape)} "
            f"and {list(searched.shape)}"
        )
    size, width = int(source.shape[0]), int(source.shape[1])
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in 1..{size}, the size of the gallery, got {k}")
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be positive, got {block_bytes}")
    # In float32 a probe takes its features, and k scores with their rows (twice as wide) both old
    # and new; a row of the gallery its features, its norm and a score with each probe, which is
    # copied for those probes that are better.
    per_probe = 4 * (width + 6 * k)
    n_probes = max(1, min(len(searched), block_bytes // 4 // per_probe))
    rows = (block_bytes - n_probes * per_probe) // (4 * (width + 1 + 2 * n_probes))
    if rows > _ALIGNED_ROWS:
        rows -= rows % _ALIGNED_ROWS
    rows = max(1, min(size, rows))
    answers = [
        _search_block(source, searched[start : start + n_probes], k, rows)
        for start in range(0, len(searched), n_probes)
    ]
    if not answers:
        return Matches(searched.new_zeros(0, k).float(), searched.new_zeros(0, k).long())
    return Matches(*(torch.cat(parts) for parts in zip(*answers, strict=True)))


def _search_block(source: Tensor | NDArray[Any], probes: Tensor, k: int, rows: int) -> Matches:
    searched = normalised(probes, "probe")
    scores = searched.new_full((len(searched), k), -torch.inf)
    places = torch.zeros(scores.shape, dtype=torch.int64, device=searched.device)
    for start in range(0, len(source), rows):
        part = as_tensor(source[start : start + rows]).to(searched.device, torch.float32)
        # cheaper than to normalise the rows where probes are fewer than features
        found = (searched @ part.T).div_(norms_of(part, "gallery", start))
        # a maximum costs a fraction of a top k, and few blocks hold anything better
        better = (found.amax(1) > scores[:, -1]).nonzero().squeeze(1)
        if len(better):
            best, place = found[better].topk(min(k, found.shape[1]), dim=1)
            merged = torch.cat((scores[better], best), 1)
            scores[better], order = merged.topk(k, dim=1)
            places[better] = torch.cat((places[better], place + start), 1).gather(1, order)
    return Matches(scores, places)


def as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """Embeddings as a tensor, without their history; copied only where they are read-only."""
    if isinstance(values, Tensor):
        return values.detach()
    # a memory-mapped array is read-only, which a tensor cannot be: read it here
    return torch.from_numpy(np.require(values, requirements="W"))


def norms_of(embeddings: Tensor, what: str, start: int = 0) -> Tensor:
    """Norms of embeddings.

    Args:
        embeddings: `[B, D]`.
        what: Whose they are, for messages.
        start: Number of the first, for messages.

    Returns:
        `[B]`, never quite zero.

    Raises:
        ValueError: One is not finite.
    """
    norms: Tensor = torch.linalg.vector_norm(embeddings, dim=1)
    if not norms.isfinite().all():
        row = start + int(norms.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"{what} embedding {row} is not finite; {NOT_FINITE}")
    return norms.clamp_(min=_EPS)


def normalised(embeddings: Tensor, what: str) -> Tensor:
    """Embeddings of length one in float32; see `norms_of`."""
    exact = embeddings.float()
    return exact / norms_of(exact, what)[:, None]
