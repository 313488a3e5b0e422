"""Faces that the package draws itself: labelled, reproducible, no download.

Ellipses with soft edges are laid one over the other, where a 112x96 crop has its eyes, nose and
mouth. Lengths are pixels of that crop from between the eyes, x right, y down; ranges are by eye.
"""

from __future__ import annotations

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss.data.faces import AlignedFaces
from idloss.geometry import fit_similarity, get_template
from idloss.resample import to_uint8

Factors = dict[str, Tensor]
"""Values `[B, 1, 1]` of a person and of a photo by name."""


def _ranges(table: str) -> dict[str, tuple[float, float]]:
    words = table.split()
    bounds = zip(map(float, words[1::3]), map(float, words[2::3]), strict=True)
    return dict(zip(words[::3], bounds, strict=True))


PERSON = _ranges("""
    head_width 37 46      head_height 55 66     skin 0 1              hair 0 1
    hairline -42 -26      hair_length -15 60    eye_gap 15.5 19.5     eye_width 5.5 8.5
    eye_height 2.4 4.2    iris 0 1              brow_height 8 12.5    brow_thickness 1 3
    nose_length 17 23     nose_width 4.5 8.5    mouth_down 38 43      mouth_width 10.5 16.5
    lips 2 4.5            lip_red 0 1
""")
"""What a person keeps, with its range."""

PHOTO = _ranges("""
    angle -0.07 0.07      zoom 0.96 1.05        right -1.5 1.5        down -1.5 1.5
    yaw -4 4              smile -0.4 1          gaze -1.2 1.2         light_x -0.4 0.4
    light_y -0.35 0.1     exposure 0.75 1.15    red 0.1 0.9           green 0.1 0.9
    blue 0.1 0.9          noise 0.004 0.022
""")
"""What changes from photo to photo, with its range."""

BATCH = 32
"""Faces drawn at once: the work of a batch stays in the processor's caches."""


def draw_faces(
    identities: int,
    per_identity: int,
    seed: int = 0,
    *,
    size: tuple[int, int] = (112, 96),
    crop: str = "sphereface",
    first_identity: int = 0,
) -> AlignedFaces:
    """Draw persons that differ, in photos that vary.

    Photo number j of person number i depends on (seed, i, j) alone, so sets of any size share their
    beginnings. Sets with other seeds, or other ranges of persons, have no person in common.

    Args:
        identities: Number of persons K.
        per_identity: Photos of each.
        seed: Not negative.
        size: Rows and columns of the pictures, the whole crop whatever its size.
        crop: Name of the crops' template.
        first_identity: Number of the first person.

    Returns:
        The crops, labelled, and named by person and photo: `1/0`.

    Raises:
        ValueError: A number is out of range, or the template is unknown.
    """
    sizes = {"identities": identities, "per_identity": per_identity}
    sizes |= {"height": size[0], "width": size[1]}
    for name, value in (sizes | {"seed": seed, "first_identity": first_identity}).items():
        if value < (low := int(name in sizes)):
            raise ValueError(f"{name} must be at least {low}, got {value}")
    grid = _grid(size, crop)
    people = range(first_identity, first_identity + identities)
    photos = [(person, photo) for person in people for photo in range(per_identity)]
    crops = torch.empty(len(photos), 3, *size, dtype=torch.uint8)
    for start in tqdm(range(0, len(photos), BATCH), "drawing", unit="batch", delay=2):
        part = photos[start : start + BATCH]
        face = _factors(part, seed)
        grain = [np.random.default_rng([seed, *one, 1]).random((3, *size), "f4") for one in part]
        noise = face["noise"][:, None] * 12**0.5 * (torch.from_numpy(np.stack(grain)) - 0.5)
        crops[start : start + BATCH] = to_uint8(_draw(face, grid) + noise)
    names = tuple(f"{person}/{photo}" for person, photo in photos)
    labels = torch.arange(identities).repeat_interleave(per_identity)
    return AlignedFaces(crops, names, labels, tuple(map(str, people)), get_template(crop).name)


def _factors(photos: list[tuple[int, int]], seed: int) -> Factors:
    drawn = [
        np.random.default_rng([seed, *of]).random(len(ranges))
        for person, photo in photos
        for of, ranges in (((person,), PERSON), ((person, photo, 0), PHOTO))
    ]
    values = torch.from_numpy(np.concatenate(drawn).reshape(len(photos), -1)).float()
    both = zip((PERSON | PHOTO).items(), values[:, :, None, None].unbind(1), strict=True)
    return {name: low + (high - low) * value for (name, (low, high)), value in both}


def _grid(size: tuple[int, int], crop: str) -> Tensor:
    """Pixel centres of pictures from between the eyes of a 112x96 crop, `[2, H, W]`."""
    template = get_template(crop)
    rows, columns = (
        (torch.arange(count).double() + 0.5) * whole / count - 0.5
        for count, whole in zip(size, template.size, strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.as_tensor(template.points, dtype=torch.float64)
    matrix = fit_similarity(points[None], "sphereface")[0]
    eyes = torch.as_tensor(get_template("sphereface").points, dtype=torch.float64)[:2].mean(0)
    matrix[:, 2] -= eyes
    return torch.einsum("ij,jhw->ihw", matrix, torch.stack([x, y, torch.ones_like(x)])).float()


def _draw(face: Factors, grid: Tensor) -> Tensor:
    """A batch of faces at pixel centres `[2, H, W]`: RGB `[B, 3, H, W]`."""
    cos, sin = face["angle"].cos() / face["zoom"], face["angle"].sin() / face["zoom"]
    x = cos * grid[0] + sin * grid[1] - face["right"]
    y = cos * grid[1] - sin * grid[0] - face["down"]
    front = x - face["yaw"]  # what stands out of the head moves against it
    aside = front.abs() - face["eye_gap"]
    skin = _between((0.95, 0.77, 0.65), (0.42, 0.27, 0.19), face["skin"])
    hair = _between((0.78, 0.62, 0.38), (0.08, 0.06, 0.05), face["hair"])
    iris = _between((0.45, 0.55, 0.65), (0.16, 0.10, 0.06), face["iris"])
    lips = skin * _between((0.85, 0.72, 0.74), (0.88, 0.50, 0.54), face["lip_red"])
    light = 1 + face["light_x"] * x / 48 + face["light_y"] * y / 56
    wide, high = face["head_width"], face["head_height"]
    head = _ellipse(x, y - 0.17 * high, wide, high)
    behind = _ellipse(x, y - 0.15 * high, 1.13 * wide, 1.1 * high)
    mouth = y - face["mouth_down"] + 0.013 * face["smile"] * front**2
    eye = _ellipse(aside, y, face["eye_width"], face["eye_height"])
    ball = _ellipse(aside - front.sign() * face["gaze"], y, face["eye_height"], face["eye_height"])
    brow = _ellipse(aside, y + face["brow_height"], face["eye_width"] + 2, face["brow_thickness"])
    image = torch.stack([face["red"], face["green"], face["blue"]], 1)
    for colour, cover in (
        (0.8 * hair, behind * _inside(y - face["hair_length"])),
        (skin * light[:, None], head),
        (hair, head * _inside(y - face["hairline"] - 0.015 * x**2)),
        (0.4 * skin, 0.6 * _ellipse(aside, y + 2, 11.0, 8.0, soft=12.0)),  # the socket's shade
        (0.7 * hair, brow),
        (torch.tensor(0.88), eye),
        (iris, eye * ball),
        (torch.tensor(1.0), 0.2 * _ellipse(front, y - 10, face["nose_width"], 14.0, soft=8.0)),
        (0.6 * skin, 0.8 * _ellipse(front, y - face["nose_length"], face["nose_width"], 2.5)),
        (lips, _ellipse(front, mouth, face["mouth_width"], face["lips"])),
        (0.4 * lips, _ellipse(front, mouth, face["mouth_width"], 0.8)),
    ):
        image = image + (colour - image) * cover[:, None]
    return image * face["exposure"][:, None]


def _inside(distance: Tensor, soft: float = 2.0) -> Tensor:
    """1 where a distance is negative, 0 where it is positive, an edge of so many pixels between."""
    return (0.5 - distance / soft).clamp(0, 1)


def _ellipse(
    x: Tensor, y: Tensor, wide: Tensor | float, high: Tensor | float, soft: float = 2.0
) -> Tensor:
    return _inside((torch.hypot(x / wide, y / high) - 1) * high, soft)


def _between(first: tuple[float, ...], last: tuple[float, ...], place: Tensor) -> Tensor:
    """Colour `[B, 3, 1, 1]` at a place `[B, 1, 1]` between two."""
    ends = torch.tensor([first, last])[..., None, None]
    return ends[0].lerp(ends[1], place[:, None])
