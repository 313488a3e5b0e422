"""Folds against scikit-learn's and the released code's."""

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold

from idloss.data.pairs import balanced_folds, contiguous_folds


@pytest.mark.parametrize("count", [10, 17, 61, 600, 607, 6000])
def test_folds_equal_scikit_learn_and_released_code(count):
    first = contiguous_folds(count)
    for fold, (_, test) in enumerate(KFold(n_splits=10, shuffle=False).split(np.arange(count))):
        np.testing.assert_array_equal(np.flatnonzero(first == fold), test)
    spread = contiguous_folds(count, remainder="spread")
    for fold in range(10):
        cuts = range(int(fold * count / 10), int((fold + 1) * count / 10))
        np.testing.assert_array_equal(np.flatnonzero(spread == fold), list(cuts))


def test_balanced_folds_hold_both_kinds_whatever_their_order():
    same = torch.tensor([True] * 7 + [False] * 9)
    folds = balanced_folds(same, 3)
    assert folds[same].bincount().tolist() == [3, 2, 2]
    assert folds[~same].bincount().tolist() == [3, 3, 3]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert balanced_folds(same[order], 3)[same[order]].bincount().tolist() == [3, 2, 2]
