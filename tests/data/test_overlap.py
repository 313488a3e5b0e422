"""People in both training and evaluation data: against brute force, and on planted twins."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from data.test_files import encoded
from data.test_preparation import thumbnail

from idloss.data import AlignedFaces, Exclusion, draw_faces
from idloss.data import overlap as overlap_module
from idloss.data.insightface import insightface_bin
from idloss.data.overlap import embed_faces, find_overlap, identity_means, matched_faces


def faces(labels, prefix):
    """Black crops; six of nobody known where there are no labels."""
    known = labels or []
    identities = tuple(f"{prefix}-person-{k}" for k in range(max(known, default=-1) + 1))
    count = 6 if labels is None else len(known)
    names = tuple(f"{prefix}{i}.jpg" for i in range(count))
    crops = torch.zeros(count, 3, 112, 96, dtype=torch.uint8)
    numbers = None if labels is None else torch.tensor(known, dtype=torch.int64)
    return AlignedFaces(crops, names, numbers, identities, "sphereface")


@pytest.fixture
def planted(seeded):
    """Twelve people of four photos; number 2 and a photo of number 7 are in the other set."""
    training = faces([i // 4 for i in range(48)], "t")
    evaluation = faces([0, 0, 1, 1, 2, -1], "e")
    people = torch.randn(12, 64, generator=seeded)
    ours = people[training.labels] + 0.3 * torch.randn(48, 64, generator=seeded)
    theirs = torch.randn(6, 64, generator=seeded)
    theirs[2:4] = people[2] + 0.3 * torch.randn(2, 64, generator=seeded)
    ours[29] = theirs[5] + 0.2 * torch.randn(64, generator=seeded)
    return training, F.normalize(ours), evaluation, F.normalize(theirs)


@pytest.mark.parametrize("block", [5, 40, 1 << 24])
def test_planted_people_and_photos_are_found(planted, block, monkeypatch):
    monkeypatch.setattr(overlap_module, "BLOCK", block)
    training, _, _, _ = planted
    matches = find_overlap(*planted)
    assert {(m.identity, m.photo, m.other) for m in matches} == {
        ("t-person-2", None, "e-person-1"),
        ("t-person-7", "t29.jpg", "e5.jpg"),
    }
    assert matches == sorted(matches, key=lambda match: -match.similarity)
    gone = matched_faces(training, matches)
    assert list(gone) == [8, 9, 10, 11, 29]
    assert re.fullmatch(r"t-person-7 is e5\.jpg there, cosine 0\.9\d", gone[29])


def test_similarities_are_those_of_brute_force(planted):
    training, ours, _, theirs = planted
    matches = find_overlap(*planted, threshold=-1.0)
    assert len(matches) == 12  # everybody matches someone, so no single photos are left
    for match in matches:
        number = training.identities.index(match.identity)
        mine = F.normalize(ours[training.labels == number].mean(0), dim=0)
        means = [F.normalize(theirs[start : start + 2].mean(0), dim=0) for start in (0, 2)]
        everyone = [*theirs, *means]
        best = max(float(mine @ other) for other in everyone)
        assert match.similarity == pytest.approx(best, abs=1e-5)
        assert match.photo is None


def test_evaluation_faces_without_labels_are_people_of_their_own(planted):
    training, ours, _, theirs = planted
    matches = find_overlap(training, ours, faces(None, "e"), theirs)
    assert {m.other for m in matches} <= {"e2.jpg", "e3.jpg", "e5.jpg"}
    assert "t-person-2" in {m.identity for m in matches}


def test_nothing_in_common_and_nothing_to_compare(planted):
    assert find_overlap(*planted, threshold=0.999) == []
    assert matched_faces(planted[0], []) == {}
    assert find_overlap(faces([], "t"), torch.empty(0, 64), *planted[2:]) == []
    assert find_overlap(*planted[:2], faces([], "e"), torch.empty(0, 64)) == []
    planted[1][3] = torch.nan
    with pytest.raises(ValueError, match="of training faces are not finite"):
        find_overlap(*planted)


def test_means_leave_nobody_out_of_account(seeded):
    embeddings = F.normalize(torch.randn(5, 8, generator=seeded))
    means = identity_means(embeddings, torch.tensor([1, -1, 0, 1, -1]), 2)
    expected = F.normalize(torch.stack([embeddings[2], embeddings[0] + embeddings[3]]))
    torch.testing.assert_close(means, expected)


class Elsewhere(torch.nn.Module):
    """An encoder on another device."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(1, device="meta"))

    def forward(self, images):
        assert images.device.type == "meta"
        return torch.ones(len(images), 4)


def test_embeddings_whatever_the_batch_and_the_device(seeded, monkeypatch):
    some = faces([0] * 10, "t")
    some.crops.random_(0, 256, generator=seeded)
    weight = torch.randn(16, 3, generator=seeded)

    def encoder(images):
        assert 0 <= images.min() <= images.max() <= 1
        return images.mean((2, 3)) @ weight.T

    one, _ = embed_faces(some, encoder, "sphereface", progress=False)
    monkeypatch.setattr(overlap_module, "BATCH", 3)
    two, _ = embed_faces(some, encoder, "sphereface", threads=3, progress=False)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(10))
    assert not one.requires_grad
    assert embed_faces(some, Elsewhere(), "sphereface", progress=False)[0].shape == (10, 4)


def test_photos_of_nobody_known_are_compared_one_by_one(planted):
    """A label of -1 is no index: it stood for the last person, found or not."""
    training, ours, _, theirs = planted
    training.labels[[8, 9, 30]] = -1
    ours[30] = theirs[4]
    ours[44:] = theirs[0]  # the last person, all of whose photos go
    found = {(m.identity, m.photo, m.other) for m in find_overlap(*planted)}
    assert {m for m in found if m[0] == ""} == {
        ("", "t8.jpg", "e-person-1"),
        ("", "t9.jpg", "e-person-1"),
        ("", "t30.jpg", "e-person-2"),
    }
    assert ("t-person-11", None, "e-person-0") in found


@pytest.mark.parametrize("side", [112, 128, 160])
def test_crops_of_a_bin_may_have_any_size(side, tmp_path):
    """Verification sets come as 112x112 crops, and as 128x128 or 160x160 ones."""
    crops = draw_faces(4, 1, size=(side, side), crop="arcface").crops
    files = [encoded(crop.permute(1, 2, 0).numpy()) for crop in crops]
    (tmp_path / "set.bin").write_bytes(pickle.dumps((files, [False, False])))
    evaluation = insightface_bin(tmp_path / "set.bin")

    training = draw_faces(3, 1, first_identity=2)
    exclude = Exclusion("set", evaluation.faces, thumbnail, "thumbnail", 0.97)
    options = {"skip_missing": False, "threads": 1, "progress": False}
    matches, unread = exclude.find(training, tmp_path, **options)
    assert sorted((m.identity, m.other) for m in matches) == [("2", "00002"), ("3", "00003")]
    assert unread == ()
