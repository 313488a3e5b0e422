import numpy as np
import pytest
import torch

from idloss.evaluation import search as search_module
from idloss.evaluation.search import search


def drawn(gallery, probes, width):
    """Embeddings of any length."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.1, 10, (gallery, 1))
    return rng.standard_normal((gallery, width)) * lengths, rng.standard_normal((probes, width))


def unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@pytest.mark.parametrize("block_bytes", [1, 5000, 60000, 2**24])
@pytest.mark.parametrize("k", [1, 7])
def test_search_equals_full_sort(block_bytes, k):
    gallery, probes = drawn(501, 23, 12)
    found = search(gallery, probes, k, block_bytes=block_bytes)
    full = unit(probes) @ unit(gallery).T
    order = np.argsort(-full, axis=1)[:, :k]
    np.testing.assert_array_equal(found.places.numpy(), order)
    np.testing.assert_allclose(found.scores.numpy(), np.take_along_axis(full, order, 1), atol=1e-6)


def test_search_equals_faiss():
    faiss = pytest.importorskip("faiss")
    gallery, probes = (unit(side).astype(np.float32) for side in drawn(4000, 50, 64))
    scores, places = faiss.knn(probes, gallery, 5, metric=faiss.METRIC_INNER_PRODUCT)
    found = search(gallery, torch.from_numpy(probes), 5, block_bytes=2**18)
    np.testing.assert_array_equal(found.places.numpy(), places)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=1e-6)


def test_search_stays_within_its_memory(tmp_path, monkeypatch):
    """The rows read at once, and the scores, from a gallery on disk."""
    path = tmp_path / "gallery.npy"
    np.save(path, np.random.default_rng(0).standard_normal((20000, 32), dtype=np.float32))
    gallery = np.load(path, mmap_mode="r")
    taken = []
    norms = search_module.norms_of

    def watched(embeddings, what, start=0):
        if what == "gallery":
            taken.append(embeddings.numel())
        return norms(embeddings, what, start)

    monkeypatch.setattr(search_module, "norms_of", watched)
    probes = torch.from_numpy(gallery[::2000].copy())
    found = search(gallery, probes, 1, block_bytes=2**18)
    assert found.places.squeeze(1).tolist() == list(range(0, 20000, 2000))
    assert sum(taken) == gallery.size
    rows = max(taken) // 32
    assert 0.4 * 2**18 < 4 * rows * (32 + 1 + 2 * len(probes)) <= 2**18


def test_search_of_nothing():
    found = search(np.ones((3, 2)), np.ones((0, 2)), 2)
    assert found.scores.shape == found.places.shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: search(np.ones((5, 4)), np.ones((2, 3))), r"\[5, 4\] and \[2, 3\]"),
        (lambda: search(np.ones((5, 4)), np.ones((2, 4)), 6), r"1\.\.5.*got 6"),
        (lambda: search(np.ones((5, 4)), np.ones((2, 4)), block_bytes=0), "positive, got 0"),
        (
            lambda: search(np.array([[1.0], [np.nan]]), np.ones((2, 1))),
            "gallery embedding 1 is not finite",
        ),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
