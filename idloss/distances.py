"""Distances between embeddings, each a function from two `[B, D]` tensors to `[B]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine of two embeddings (paper, equation 3).

    Args:
        a: Embeddings `[B, D]`.
        b: Embeddings `[B, D]`.

    Returns:
        Distances `[B]` in [0, 2], 1 where an embedding is zero; the gradient is finite there too.
    """
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)


def euclidean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance of the normalised embeddings: twice the cosine distance.

    Args:
        a: Embeddings `[B, D]`.
        b: Embeddings `[B, D]`.

    Returns:
        Distances `[B]` in [0, 4].
    """
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between two embeddings as a share of half a turn.

    Written with `atan2`, whose gradient stays finite at 0 and 180 degrees, where that of the arc
    cosine does not.

    Args:
        a: Embeddings `[B, D]`.
        b: Embeddings `[B, D]`.

    Returns:
        Distances `[B]` in [0, 1].
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)) * (2 / math.pi)


def l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 norm of the difference of the raw embeddings: a sum over features, not a mean.

    Args:
        a: Embeddings `[B, D]`.
        b: Embeddings `[B, D]`.

    Returns:
        Distances `[B]`, not bounded.
    """
    return (a - b).abs().sum(dim=1)


DISTANCES: Mapping[str, Distance] = {
    "cosine": cosine_distance,
    "euclidean": euclidean_distance,
    "angular": angular_distance,
    "l1": l1_distance,
}
