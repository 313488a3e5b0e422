"""Drawn faces: reproducible, in the template's geometry, and faces of persons."""

import pytest
import torch

from idloss.data import align_all, draw_faces
from idloss.data.synthetic import PERSON, PHOTO, _draw, _factors, _grid
from idloss.geometry import get_template
from idloss.resample import resize


@pytest.fixture(scope="module")
def faces():
    return draw_faces(20, 8, seed=3)


def test_shapes_labels_and_names(faces):
    wide = align_all(faces.select(torch.arange(3)), "arcface", progress=False)
    assert torch.equal(faces.crops_at(range(3), "arcface"), wide.crops)
    assert wide.crops.shape == (3, 3, 112, 112)
    assert faces.skipped == ()
    assert faces.crops.shape == (160, 3, 112, 96)
    assert faces.crops.dtype == torch.uint8
    assert faces.labels.bincount().tolist() == [8] * 20
    assert (faces.names[9], faces.identities[1]) == ("1/1", "1")
    assert len(set(faces.names)) == len(faces) == 160


def test_any_face_can_be_drawn_again_by_itself(faces):
    few = draw_faces(2, 3, seed=3, first_identity=4)
    assert torch.equal(few.crops[:3], faces.crops[32:35])
    assert few.names[:3] == faces.names[32:35]
    other = draw_faces(20, 8, seed=4)
    difference = (other.crops.int() - faces.crops.int()).abs().double().mean((1, 2, 3))
    assert difference.min() > 5  # another seed gives other people


def test_eyes_are_drawn_at_their_points(faces):
    """Around the eyes' points there is the contrast of an eye, and less of it on the cheeks."""
    grey = faces.crops.float().mean(1)
    (x, y), *_ = torch.tensor(get_template("sphereface").points).round().long().tolist()
    eye, cheek = (grey[:, b - 3 : b + 4, x - 6 : x + 7].flatten(1).std(1) for b in (y, y + 20))
    assert (eye > cheek).double().mean() > 0.9


@pytest.mark.parametrize(("template", "size"), [("arcface", (112, 112)), ("sphereface", (56, 48))])
def test_other_crops_show_the_same_picture(faces, template, size):
    theirs = draw_faces(20, 8, seed=3, size=size, crop=template).crops
    if template == "arcface":
        ours, theirs = faces.crops, theirs[..., 8:104]
    else:
        ours = resize(faces.crops.float() / 255, size, convention="antialias") * 255
    difference = (ours.float() - theirs.float()).abs().mean()
    assert difference < 6  # their grain is another


def test_photos_of_a_person_are_alike_and_differ(faces):
    small = resize(faces.crops.float() / 255, (28, 24), convention="antialias").flatten(1)
    small = (small - small.mean(1, keepdim=True)) / small.std(1, keepdim=True)
    distance = torch.cdist(small, small)
    same = faces.labels[:, None] == faces.labels[None]
    twin = torch.eye(160, dtype=torch.bool)
    assert distance[same & ~twin].mean() < 0.9 * distance[~same].mean()
    assert distance[same & ~twin].min() > 1


def test_every_factor_changes_the_picture():
    face = _factors([(person, 0) for person in range(8)], seed=3)
    grid = _grid((112, 96), "sphereface")
    base = _draw(face, grid)
    for name, (low, high) in (PERSON | PHOTO).items():
        moved = (face[name] - low + 0.5 * (high - low)) % (high - low) + low
        assert (_draw(face | {name: moved}, grid) - base).abs().max() > 0.02 or name == "noise", (
            name
        )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"identities": 0}, "identities must be at least 1, got 0"),
        ({"per_identity": 0}, "per_identity must be at least 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"size": (0, 96)}, "height must be at least 1"),
        ({"crop": "spherface"}, "sphereface"),
    ],
)
def test_wrong_numbers_are_refused(options, what):
    with pytest.raises(ValueError, match=what):
        draw_faces(**{"identities": 2, "per_identity": 2, **options})
