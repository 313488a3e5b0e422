"""Folds of a list of pairs, for cross-validation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

FOLDS = 10
"""Folds of a verification list that does not say its own, as in LFW's View 2 and insightface."""

Remainder = Literal["first", "spread"]


def contiguous_folds(count: int, folds: int = FOLDS, remainder: Remainder = "first") -> Tensor:
    """Cut a list, in its order, into folds.

    Args:
        count: pairs.
        folds: parts.
        remainder: where it does not go evenly, `"first"` makes each of the first folds a pair
            longer (scikit-learn's `KFold`, insightface), `"spread"` cuts at `i * count // folds`
            (the paper's code).

    Returns:
        The fold of each pair, int64 `[count]`, rising from 0.
    """
    places = torch.arange(folds + 1)
    if remainder == "spread":
        cuts = places * count // folds
    else:
        cuts = places * (count // folds) + places.clamp(max=count % folds)
    return torch.arange(folds).repeat_interleave(cuts.diff())


def balanced_folds(same: Tensor, folds: int = FOLDS) -> Tensor:
    """Cut the pairs of each kind into contiguous folds, whatever order the kinds come in.

    Args:
        same: bool `[P]`.
        folds: parts.

    Returns:
        The fold of each pair, int64 `[P]`; LFW's own on LFW's list.
    """
    fold = torch.empty(len(same), dtype=torch.int64)
    for kind in (same, ~same):
        fold[kind] = contiguous_folds(int(kind.sum()), folds)
    return fold
