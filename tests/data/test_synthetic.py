"""Drawn faces: reproducible, in the template's geometry, and faces of persons."""

import pytest
import torch

from idloss.data import Faces, SyntheticFaces, align_all
from idloss.data.portrait import IDENTITY, PHOTO, Factors, draw_portraits, place_points
from idloss.geometry import get_template
from idloss.resample import resize


@pytest.fixture(scope="module")
def faces():
    return SyntheticFaces(20, 8, seed=3)


@pytest.fixture(scope="module")
def rendered(faces):
    return faces.render(progress=False)


def test_shapes_labels_and_names(faces, rendered):
    source: Faces = faces
    wide = align_all(source.select(torch.arange(3)), "arcface", progress=False)
    assert torch.equal(faces.crops_at(range(3), "arcface"), wide.crops)
    assert wide.crops.shape == (3, 3, 112, 112)
    assert source.skipped == ()
    assert rendered.crops.shape == (160, 3, 112, 96)
    assert rendered.crops.dtype == torch.uint8
    assert rendered.labels.bincount().tolist() == [8] * 20
    assert rendered.names[9] == "1/1"
    assert rendered.identities[1] == "1"
    assert len(set(rendered.names)) == len(faces) == 160


def test_any_face_can_be_drawn_again_by_itself(faces, rendered):
    for index in (0, 37, 159):
        assert torch.equal(faces.read(index), rendered.crops[index])
    few = SyntheticFaces(2, 3, seed=3, first_identity=4).render(progress=False)
    assert torch.equal(few.crops[:3], rendered.crops[32:35])
    assert few.names[:3] == rendered.names[32:35]
    some = torch.tensor([159, 37, 40])
    chosen, drawn = faces.select(some), rendered.select(some)
    assert torch.equal(chosen.crops, drawn.crops)
    assert (chosen.names, chosen.identities) == (drawn.names, drawn.identities)
    assert torch.equal(chosen.labels, drawn.labels)
    assert len(faces.select(torch.zeros(160, dtype=torch.bool))) == 0
    other = SyntheticFaces(20, 8, seed=4).render(progress=False)
    difference = (other.crops.int() - rendered.crops.int()).abs().double().mean((1, 2, 3))
    assert difference.min() > 5  # another seed gives other people
    threaded = SyntheticFaces(20, 8, seed=3).render(threads=3, progress=False)
    assert torch.equal(threaded.crops, rendered.crops)


def test_points_are_where_the_alignment_puts_them(faces):
    points = faces.landmarks
    template = torch.tensor(get_template("sphereface").points, dtype=torch.float64)
    assert points.shape == (160, 5, 2)
    assert (points.mean(0) - template).abs().max() < 1.5
    # real faces deviate from the template by 1 to 4 pixels, the nose most, as the head turns
    spread = points.std(0)
    assert spread.min() > 0.5
    assert spread.max() < 6
    assert spread[2].max() == spread.max()


def test_eyes_are_drawn_at_their_points(faces):
    """Around the eyes' points there is the contrast of an eye, and less of it on the cheeks."""
    points = faces.landmarks.round().long()
    crops = faces.render(progress=False).crops.float().mean(1)

    def contrast(x, y):
        places = zip(crops, x.tolist(), y.tolist(), strict=True)
        return torch.stack([c[b - 3 : b + 4, a - 6 : a + 7].std() for c, a, b in places])

    eye = contrast(points[:, 0, 0], points[:, 0, 1])
    cheek = contrast(points[:, 0, 0], points[:, 0, 1] + 14)
    assert (eye > cheek).double().mean() > 0.9


@pytest.mark.parametrize(("template", "size"), [("arcface", (112, 112)), ("sphereface", (56, 48))])
def test_other_crops_show_the_same_picture(faces, rendered, template, size):
    other = SyntheticFaces(20, 8, seed=3, size=size, crop=template)
    crops = other.render(progress=False).crops
    if template == "arcface":
        ours, theirs = rendered.crops, crops[..., 8:104]
        assert (other.landmarks - faces.landmarks - torch.tensor([8.0, 0.0])).abs().max() < 1e-9
    else:
        ours = resize(rendered.crops.float() / 255, size, convention="antialias") * 255
        theirs = crops
        scaled = (faces.landmarks + 0.5) / 2 - 0.5
        assert (other.landmarks - scaled).abs().max() < 1e-9
    difference = (ours.float() - theirs.float()).abs().mean()
    assert difference < 6  # their grain is another


def test_photos_of_a_person_are_alike_and_differ(rendered):
    small = resize(rendered.crops.float() / 255, (28, 24), convention="antialias").flatten(1)
    small = (small - small.mean(1, keepdim=True)) / small.std(1, keepdim=True)
    distance = torch.cdist(small, small)
    same = rendered.labels[:, None] == rendered.labels[None]
    twin = torch.eye(160, dtype=torch.bool)
    assert distance[same & ~twin].mean() < 0.9 * distance[~same].mean()
    assert distance[same & ~twin].min() > 1


def test_every_factor_changes_the_picture(faces):
    face, jitter = faces._factors(range(8))

    def picture(**values):
        changed = Factors(face | values)
        return draw_portraits(changed, place_points(changed, jitter)[0], faces._grid)

    base = picture()
    for name, (low, high) in (IDENTITY | PHOTO).items():
        moved = (face[name] - low + 0.5 * (high - low)) % (high - low) + low
        assert (picture(**{name: moved}) - base).abs().max() > 0.02 or name == "noise", name


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
        SyntheticFaces(**{"identities": 2, "per_identity": 2, **options})
