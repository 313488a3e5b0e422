"""People in both training and evaluation data: against brute force, and on planted twins."""

import pytest
import torch
import torch.nn.functional as F

from idloss.data import AlignedFaces, Match, embed_faces, find_overlap, without_overlap
from idloss.data import overlap as overlap_module
from idloss.data.overlap import identity_means


def faces(labels, prefix, identities=None):
    labels = torch.tensor(labels) if labels is not None else None
    count = len(labels) if labels is not None else 6
    names = tuple(f"{prefix}{i}.jpg" for i in range(count))
    if identities is None and labels is not None:
        identities = tuple(f"{prefix}-person-{k}" for k in range(int(labels.max()) + 1))
    crops = torch.zeros(count, 3, 112, 96, dtype=torch.uint8)
    return AlignedFaces(crops, names, labels, identities or (), "sphereface")


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


@pytest.mark.parametrize("block", [5, 4096])
def test_planted_people_and_photos_are_found(planted, block, monkeypatch):
    monkeypatch.setattr(overlap_module, "BLOCK", block)
    training, _, _, _ = planted
    matches = find_overlap(*planted)
    assert {(m.identity, m.photo, m.other) for m in matches} == {
        ("t-person-2", None, "e-person-1"),
        ("t-person-7", "t29.jpg", "e5.jpg"),
    }
    assert matches == sorted(matches, key=lambda match: -match.similarity)
    left = without_overlap(training, matches)
    assert len(left) == 48 - 4 - 1
    assert "t-person-2" not in left.identities
    assert "t29.jpg" not in left.names
    assert len(left.identities) == 11
    assert left.labels.max() == 10


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


def test_nothing_in_common(planted):
    assert find_overlap(*planted, threshold=0.999) == []
    assert len(without_overlap(planted[0], [])) == 48


def test_means_leave_nobody_out_of_account(seeded):
    embeddings = F.normalize(torch.randn(5, 8, generator=seeded))
    means = identity_means(embeddings, torch.tensor([1, -1, 0, 1, -1]), 2)
    expected = F.normalize(torch.stack([embeddings[2], embeddings[0] + embeddings[3]]))
    torch.testing.assert_close(means, expected)


def test_wrong_input_is_refused(planted):
    training, ours, evaluation, theirs = planted
    with pytest.raises(ValueError, match="47 embeddings for 48 training faces"):
        find_overlap(training, ours[:-1], evaluation, theirs)
    with pytest.raises(ValueError, match="no identities"):
        find_overlap(faces(None, "t"), theirs, evaluation, theirs)
    with pytest.raises(ValueError, match="no identities"):
        without_overlap(faces(None, "t"), [Match("a", None, "b", 1.0)])


def test_embedding_batches_do_not_matter(seeded):
    some = faces([0] * 10, "t")
    some.crops.random_(0, 256, generator=seeded)
    weight = torch.randn(16, 3, generator=seeded)

    def encoder(images):
        assert 0 <= images.min() <= images.max() <= 1
        return images.mean((2, 3)) @ weight.T

    one = embed_faces(some, encoder, batch_size=3, progress=False)
    two = embed_faces(some, encoder, progress=False)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(10))
    assert not one.requires_grad
