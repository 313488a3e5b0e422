from functools import partial

import numpy as np
import pytest
import torch

from idloss.evaluation import identification
from idloss.evaluation.identification import draw_galleries, identify, identify_open_set, search


def people(n_subjects=30, width=16, noise=1.2, seed=0):
    """Embeddings of images of people, shuffled, some people with too few images."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 9, size=n_subjects)
    counts[:3] = (1, 3, 4)
    subjects = rng.permutation(np.repeat(np.arange(n_subjects), counts))
    centres = rng.standard_normal((n_subjects, width))
    gallery = centres[subjects] + noise * rng.standard_normal((subjects.size, width))
    probes = gallery + 0.5 * noise * rng.standard_normal(gallery.shape)
    names = np.array([f"person_{subject:03d}" for subject in subjects])
    return gallery.astype(np.float32), probes.astype(np.float32), names


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def slow_identify(gallery, probes, names, drawn, draw):
    """Table 2 with loops: rank of each probe in one draw."""
    enrolled = {names[i]: i for i in drawn.images[drawn.gallery[draw]]}
    ranks = []
    for place in drawn.images:
        if place in enrolled.values():
            continue
        scores = {name: cosine(probes[place], gallery[i]) for name, i in enrolled.items()}
        ranks.append(sorted(scores, key=scores.get, reverse=True).index(names[place]) + 1)
    return np.array(ranks)


@pytest.mark.parametrize("block_bytes", [1, 2000, 2**24])
def test_closed_set_equals_loops(monkeypatch, block_bytes):
    monkeypatch.setattr(identification, "BLOCK_BYTES", block_bytes)
    gallery, probes, names = people()
    summary, arrays = identify(gallery, probes, names, draws=3, seed=5)
    drawn = draw_galleries(names, draws=3, seed=5)
    reached = drawn.gallery.shape[1]
    assert arrays["cmc"].shape == (3, reached)
    for draw in range(3):
        ranks = slow_identify(gallery, probes, names, drawn, draw)
        expected = [(ranks <= rank).mean() for rank in range(1, reached + 1)]
        np.testing.assert_allclose(arrays["cmc"][draw], expected)
    assert list(summary) == ["rank1", "rank5", "rank10"]
    assert summary["rank1"].mean == pytest.approx(arrays["rank1"].mean())
    assert summary["rank1"].std == pytest.approx(arrays["rank1"].std())


def test_draws_take_one_image_of_each_subject_with_enough():
    _, _, names = people()
    drawn = draw_galleries(names, draws=200, seed=0)
    unique, counts = np.unique(names, return_counts=True)
    enough = unique[counts >= 4]
    assert set(names[drawn.images]) == set(enough)
    for gallery in drawn.gallery:
        np.testing.assert_array_equal(names[drawn.images[gallery]], enough)
    # every image is drawn about as often as the others of its subject
    for subject, images in enumerate(np.split(drawn.images, np.cumsum(counts[counts >= 4])[:-1])):
        picked = np.bincount(drawn.gallery[:, subject] - drawn.gallery[:, subject].min())
        assert len(picked) == len(images)
        assert picked.min() > 0.4 * 200 / len(images)


def test_draws_are_seeded_one_by_one():
    _, _, names = people()
    ten = draw_galleries(names, draws=10, seed=3)
    five = draw_galleries(names, draws=5, seed=3)
    np.testing.assert_array_equal(ten.gallery[:5], five.gallery)
    assert ten.digest == draw_galleries(names, draws=10, seed=3).digest
    assert len({ten.digest, five.digest, draw_galleries(names, draws=10, seed=4).digest}) == 3


def test_lfw_has_610_subjects(shared):
    """The people of Table 2: 610 with four images or more, 6,733 images, 6,123 probes."""
    lines = shared("data/lfw_landmarks.csv").read_text().splitlines()
    names = np.array([line.split(",")[0].split("/")[-2] for line in lines])
    drawn = draw_galleries(names, draws=1)
    assert drawn.gallery.shape == (1, 610)
    assert drawn.images.size == 6733


def test_perfect_and_worthless_embeddings():
    _, _, names = people()
    own = np.unique(names, return_inverse=True)[1]
    perfect = np.eye(own.max() + 1)[own]
    # the same embedding for everybody must not look perfect
    for embeddings, rate in ((np.ones((names.size, 4)), 0), (perfect, 1)):
        assert (identify(embeddings, embeddings, names)[1]["rank1"] == rate).all()
        assert (identify_open_set(embeddings, embeddings, names, draws=2)[1]["tpir"] == rate).all()


@pytest.mark.parametrize("block_bytes", [1, 2**24])
def test_open_set_equals_loops(monkeypatch, block_bytes):
    monkeypatch.setattr(identification, "BLOCK_BYTES", block_bytes)
    gallery, probes, names = people(40, noise=0.6)
    monkeypatch.setattr(identification, "FPIR_TARGETS", (0.3, 0.1, 0.01))
    monkeypatch.setattr(identification, "ENROLLED_SHARE", 0.4)
    rates, found = identify_open_set(gallery, probes, names, draws=3, seed=2)
    drawn = draw_galleries(names, draws=3, seed=2)
    n_able = drawn.gallery.shape[1]
    for draw in range(3):
        chosen = np.random.default_rng([2, draw, 1]).permutation(n_able)[: round(0.4 * n_able)]
        watch = {names[i]: i for i in drawn.images[drawn.gallery[draw][chosen]]}
        mated, strangers = [], []
        for place, name in enumerate(names):
            if place in watch.values():
                continue
            scores = {one: cosine(probes[place], gallery[i]) for one, i in watch.items()}
            best = max(scores, key=scores.get)
            if name in watch:
                mated.append(scores[best] if best == name else -np.inf)
            else:
                strangers.append(scores[best])
        for place, target in enumerate((0.3, 0.1, 0.01)):
            threshold = found["thresholds"][draw, place]
            assert (np.array(strangers) > threshold + 1e-6).mean() <= target
            # any lower threshold lets too many through
            assert (np.array(strangers) > threshold - 1e-6).mean() > target
            share = (np.array(mated) > threshold + 1e-6).mean()
            assert found["tpir"][draw, place] == pytest.approx(share)
    assert list(rates) == ["tpir@fpir=0.3", "tpir@fpir=0.1", "tpir@fpir=0.01"]


FOUR_OF_TWO = list("aaaabbbb")
ONES = np.ones((8, 2))


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        (identify, (ONES[:4], ONES[:4], list("aabb")), "0 of 2 subjects"),
        (identify, (ONES, ONES * np.nan, FOUR_OF_TWO), "probe embedding 0 is not finite"),
        (identify, (ONES, np.ones((8, 3)), FOUR_OF_TWO), "differ in width: 2 and 3"),
        (identify, (ONES[:7], ONES, FOUR_OF_TWO), r"gallery embeddings must be \[8, D\]"),
        (partial(draw_galleries, draws=0), (FOUR_OF_TWO,), "draws must be >= 1, got 0"),
        (draw_galleries, ([list("ab")],), r"\[N\]"),
        (search, (np.ones((5, 4)), np.ones((2, 3))), r"\[5, 4\] and \[2, 3\]"),
        (search, (ONES, ONES, 9), r"1\.\.8.*got 9"),
        (search, (np.array([[1.0], [np.nan]]), ONES[:, :1]), "gallery embedding 1 is not finite"),
    ],
)
def test_bad_arguments_are_named(call, arguments, says):
    with pytest.raises(ValueError, match=says):
        call(*arguments)


def drawn(gallery, probes, width):
    """Embeddings of any length."""
    rng = np.random.default_rng(0)
    lengths = rng.uniform(0.1, 10, (gallery, 1))
    return rng.standard_normal((gallery, width)) * lengths, rng.standard_normal((probes, width))


def unit(embeddings):
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


@pytest.mark.parametrize("block_bytes", [1, 5000, 60000, 2**24])
@pytest.mark.parametrize("k", [1, 7])
def test_search_equals_full_sort(monkeypatch, block_bytes, k):
    monkeypatch.setattr(identification, "BLOCK_BYTES", block_bytes)
    gallery, probes = drawn(501, 23, 12)
    found = search(gallery, probes, k)
    full = unit(probes) @ unit(gallery).T
    order = np.argsort(-full, axis=1)[:, :k]
    np.testing.assert_array_equal(found.places.numpy(), order)
    np.testing.assert_allclose(found.scores.numpy(), np.take_along_axis(full, order, 1), atol=1e-6)
    nothing = search(gallery, probes[:0], k)
    assert nothing.scores.shape == nothing.places.shape == (0, k)


def test_search_stays_within_its_memory(tmp_path, monkeypatch):
    """The rows read at once, and the scores, from a gallery on disk."""
    path = tmp_path / "gallery.npy"
    np.save(path, np.random.default_rng(0).standard_normal((20000, 32), dtype=np.float32))
    gallery = np.load(path, mmap_mode="r")
    taken = []
    norms = identification._norms_of

    def watched(embeddings, what, start=0):
        if what == "gallery":
            taken.append(embeddings.numel())
        return norms(embeddings, what, start)

    monkeypatch.setattr(identification, "_norms_of", watched)
    monkeypatch.setattr(identification, "BLOCK_BYTES", 2**18)
    probes = torch.from_numpy(gallery[::2000].copy())
    found = search(gallery, probes, 1)
    assert found.places.squeeze(1).tolist() == list(range(0, 20000, 2000))
    assert sum(taken) == gallery.size
    rows = max(taken) // 32
    assert 0.4 * 2**18 < 4 * rows * (32 + 1 + 2 * len(probes)) <= 2**18
