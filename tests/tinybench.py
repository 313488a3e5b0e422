"""An evaluation small enough for a test: drawn people in sixteen pairs, and a run over them."""

import numpy as np
import torch

from idloss.data import EvaluationSet, Pairs, draw_faces
from idloss.evaluation import Cell, evaluate

SIZES = ((14, 12), (28, 24))


def drawn_pairs():
    """Five people with four crops each, and sixteen pairs in two folds."""
    faces = draw_faces(5, 4, seed=2)
    first = torch.tensor([0, 4, 8, 12, 0, 4, 8, 12] * 2)
    second = torch.tensor([1, 5, 9, 13, 5, 9, 13, 17, 2, 6, 10, 14, 6, 10, 14, 18])
    same = faces.labels[first] == faces.labels[second]
    return EvaluationSet("drawn", faces, Pairs(first, second, same, torch.arange(16) // 8))


def run(data, fnets, srnets, **options):
    """`evaluate` at two sizes."""
    return evaluate(data, fnets, srnets, SIZES, progress=False, **{"device": "cpu", **options})


def scores(results, fnet, srnet, size):
    """Cosines of the pairs in one cell, `[N]`."""
    return results.arrays[Cell("verification", fnet, srnet, *size)]["scores"]


def assert_same_scores(found, expected, atol=2e-6):
    """All cells of the one run are in the other, with the same cosines."""
    assert found.arrays.keys() >= expected.arrays.keys()
    for cell, arrays in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[cell]["scores"], arrays["scores"], 0, atol)
