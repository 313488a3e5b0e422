import numpy as np
import pytest
import torch

from idloss.distances import DISTANCES


def pairs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 6, 32)).astype(np.float32)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


REFERENCE = {
    "cosine": lambda a, b: 1 - cosines(a, b),
    "euclidean": lambda a, b: 2 - 2 * cosines(a, b),
    "angular": lambda a, b: np.arccos(cosines(a, b)) / np.pi,
    "l1": lambda a, b: np.abs(a - b).sum(1),
}


def test_every_distance_has_a_reference():
    assert set(DISTANCES) == set(REFERENCE)


@pytest.mark.parametrize("name", DISTANCES)
def test_formula(name):
    a, b = pairs()
    ours = DISTANCES[name](torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(ours.numpy(), REFERENCE[name](a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("case", ["equal", "opposite", "zero", "tiny"])
def test_gradient_is_finite_where_formulas_break(name, case):
    b = torch.from_numpy(pairs()[0])
    a = {"equal": b, "opposite": -b, "zero": b * 0, "tiny": b * 1e-20}[case]
    a = a.clone().requires_grad_()
    DISTANCES[name](a, b).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTANCES)
def test_same_embedding_is_at_distance_zero(name):
    a = torch.from_numpy(pairs()[0])
    torch.testing.assert_close(DISTANCES[name](a, a), torch.zeros(6), atol=1e-6, rtol=0)
