"""Draws faces from tables of numbers: shapes with soft edges on a grid, a batch at a time.

A head is a sphere, stretched and narrowed towards the jaw. Every pixel is carried back through the
crop's similarity and the head's pose to the frontal face, where the features are drawn. Lengths are
pixels of the 112x96 crop from between the eyes, x right, y down; ranges are set by eye.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from idloss.geometry import fit_similarity

Layer = tuple[Tensor, Tensor]
"""Colour `[B, 3, 1, 1]`, or one a pixel, and how much of a pixel it covers, `[B, h, w]`."""


class Factors(dict[str, Tensor]):
    """Values `[B, 1, 1]` of a person and of a photo by name; attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


def _ranges(table: str) -> dict[str, tuple[float, float]]:
    words = table.split()
    bounds = zip(map(float, words[1::3]), map(float, words[2::3]), strict=True)
    return dict(zip(words[::3], bounds, strict=True))


IDENTITY = _ranges("""
    head_width 41 50        head_height 60 72       jaw 0.05 0.38           skin 0 1
    hair 0 1                hair_volume 1.02 1.24   hair_length -25 75      hair_part -24 24
    hairline -42 -24        hairline_peak -7 9      lip_red 0 1             brow_length 7.5 11.5
    eye_gap 15.4 19.8       eye_width 6 8.8         eye_height 2.2 4.2      eye_tilt -0.2 0.2
    iris 2.8 3.8            iris_hue 0 1            brow_height 7.5 12.5    brow_thickness 0.9 2.8
    brow_arch -0.5 3.5      brow_slope -0.2 0.22    brow_dark 0.35 1        lip_lower 2.2 5.4
    nose_length 16.5 23     nose_width 4.6 8.8      mouth_down 37.5 43.5    mouth_width 11 17
    lip_upper 1.4 4
""")
"""What a person keeps, with its range."""

PHOTO = _ranges("""
    yaw -0.42 0.42          pitch -0.2 0.2          light_x -0.9 0.9        light_y -0.9 0.25
    ambient 0.48 0.8        exposure 0.78 1.2       gamma 0.8 1.25          warmth -1 1
    smile -0.35 1           open -1 1               eye_open 0.55 1.2       gaze_x -1 1
    gaze_y -0.6 0.6         brow_raise -1 2         back_red 0.05 0.95      back_green 0.05 0.95
    back_blue 0.05 0.95     back_slope -0.4 0.4     noise 0.004 0.022
""")
"""What changes from photo to photo, with its range."""

POINT_NOISE = 0.6
"""Standard deviation in pixels of a detector's five points, which the alignment inherits."""
NOSE_HEIGHT = 0.22
"""How far the tip of the nose stands out of the head, in head radii."""

_SKIN = ((0.97, 0.80, 0.69), (0.80, 0.58, 0.43), (0.36, 0.22, 0.15))
_HAIR = ((0.86, 0.70, 0.42), (0.40, 0.25, 0.14), (0.07, 0.055, 0.05))
_IRIS = ((0.36, 0.52, 0.68), (0.38, 0.46, 0.28), (0.26, 0.14, 0.07))


def place_points(face: Factors, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Find and align the five points, as a detector and the released fit do.

    From standard normal errors `[B, 5, 2]`, the similarity from the picture plane to the 112x96
    crop, `[B, 2, 3]`, and the points in the crop, `[B, 5, 2]`, all float64.
    """
    zero = torch.zeros_like(face.eye_gap)
    width, down = _mouth_shape(face)
    x = torch.cat([-face.eye_gap, face.eye_gap, zero, -width, width], 2)[:, 0]
    y = torch.cat([zero, zero, face.nose_length, down, down], 2)[:, 0]
    lift = NOSE_HEIGHT * torch.tensor([0, 0, 1, 0, 0])
    detected = _project(face, x[:, None], y[:, None], lift).double() + POINT_NOISE * jitter
    matrix = fit_similarity(detected, "sphereface")
    return matrix, detected @ matrix[:, :, :2].transpose(1, 2) + matrix[:, :, 2][:, None]


def draw_portraits(face: Factors, matrix: Tensor, grid: Tensor) -> Tensor:
    """Draw a batch of faces, noise excepted: RGB in [0, 1], `[B, 3, h, w]`.

    `matrix` is that of `place_points`, and `grid` the picture's pixel centres in 112x96
    coordinates, `[2, h, w]`.
    """
    back, shift = torch.linalg.inv(matrix[:, :, :2]).float(), matrix[:, :, 2].float()
    u, v = torch.einsum("bij,bjhw->bihw", back, grid - shift[..., None, None]).unbind(1)
    x, y, inside, light = _unproject(face, u, v)
    base = _colour(face.back_red, face.back_green, face.back_blue)
    base = base.lerp(base.mean(1, keepdim=True), 0.6)
    image = (base + (face.back_slope * u / 48)[:, None]).clamp(0, 1)
    # fair hair on dark skin is rare, and colour must not give the person away too easily
    skin, hair = _between(_SKIN, face.skin), _between(_HAIR, face.hair + 0.5 * face.skin)
    # behind the head, an arch of hair: round above its middle, straight down the sides below it
    wide, high = face.head_width * (face.hair_volume + 0.04), face.head_height * face.hair_volume
    arch = torch.hypot(u / wide, (v - _centre(face)).clamp(max=0) / high)
    behind = _cover(_within((arch - 1) * wide, v - face.hair_length), 1.5)
    layers = chain(
        [(hair * 0.8, behind), (skin * light[:, None], inside)],
        _nose(face, x, y),
        _mouth(face, x, y, skin),
        _eyes(face, x, y),
        _brows_and_hair(face, x, y, hair, inside),
    )
    for colour, cover in layers:
        image = image.lerp(colour.expand_as(image), cover[:, None])
    warm = face.warmth * 0.12
    tone = face.exposure[:, None] * _colour(1 + warm, torch.ones_like(warm), 1 - warm)
    return image.mul(tone).clamp(1e-4, 1).pow(face.gamma[:, None])


def _cover(distance: Tensor, soft: float = 0.6) -> Tensor:
    """1 inside a shape (negative distance), 0 outside, a ramp of `2 * soft` pixels between."""
    return (0.5 - 0.5 / soft * distance).clamp(0, 1)


def _bump(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    # exp is ten times slower where its result is denormal, which is most of a picture
    return ((x / width) ** 2 + (y / height) ** 2).clamp(max=20).neg().exp()


def _within(*distances: Tensor) -> Tensor:
    """Distance to what several shapes share."""
    return torch.stack(torch.broadcast_tensors(*distances)).amax(0)


def _colour(*channels: Tensor) -> Tensor:
    return torch.stack(channels, 1)


def _grey(level: float) -> Tensor:
    return torch.full((1, 3, 1, 1), level, dtype=torch.float32)


def _between(stops: tuple[tuple[float, float, float], ...], place: Tensor) -> Tensor:
    """Colour `[B, 3, 1, 1]` at a place in [0, 1], beyond it at its end, along three stops."""
    first, middle, last = torch.tensor(stops)[..., None, None]
    at = place[:, None].clamp(0, 1) * 2
    return torch.where(at < 1, first.lerp(middle, at), middle.lerp(last, at - 1))


def _centre(face: Factors) -> Tensor:
    """Height of the head's middle: the eyes lie a sixth of its half-height above it."""
    return 0.17 * face.head_height


def _mouth_shape(face: Factors) -> tuple[Tensor, Tensor]:
    """Half-width of the mouth and height of its corners, both moved by a smile."""
    return face.mouth_width * (1 + 0.16 * face.smile), face.mouth_down - 1.8 * face.smile


def _narrowing(face: Factors, below: Tensor) -> Tensor:
    """Width of the head, relative to the cheeks', at a height in head radii below its middle."""
    return 1 - face.jaw * below.clamp(0, 1) ** 2


def _turn(first: Tensor, second: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return first * cos + second * sin, second * cos - first * sin


def _project(face: Factors, x: Tensor, y: Tensor, lift: Tensor) -> Tensor:
    """Points `[B, 1, 5]` of the frontal face, `lift` above it, as they are seen, `[B, 5, 2]`."""
    x, y = x / face.head_width, (y - _centre(face)) / face.head_height
    x, z = _turn(x, (1 - x**2 - y**2).clamp(min=0).sqrt() + lift, face.yaw)
    y, z = _turn(y, z, face.pitch)
    u = x * _narrowing(face, y) * face.head_width
    return torch.stack([u, y * face.head_height + _centre(face)], -1)[:, 0]


def _unproject(face: Factors, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The picture plane to the frontal face, with the head's coverage and the light on it."""
    down = (v - _centre(face)) / face.head_height
    across = u / (face.head_width * _narrowing(face, down))
    radius = torch.hypot(across, down)
    inside = _cover((radius - 1) * face.head_width, 1.0)
    depth = (1 - radius**2).clamp(min=0).sqrt()
    facing = across * face.light_x + down * face.light_y + depth * 0.75
    light = face.ambient + (1 - face.ambient) * 1.15 * facing.clamp(min=0)
    y, z = _turn(down, depth, -face.pitch)
    x, _ = _turn(across, z, -face.yaw)
    return x * face.head_width, y * face.head_height + _centre(face), inside, light


def _nose(face: Factors, x: Tensor, y: Tensor) -> Iterator[Layer]:
    # the nose stands out: what is drawn on the face shifts against it as the head turns
    rise = NOSE_HEIGHT * face.head_width * (y / face.nose_length).clamp(0, 1)
    x, y = x - face.yaw.tan() * rise, y - face.pitch.tan() * rise - face.nose_length
    length, width = face.nose_length, face.nose_width
    # relief: the side away from the light, the shade under the tip and the nostrils are dark
    ridge = _bump(x, y + length / 2, width * 0.6, length / 2)
    yield _grey(0), ridge * (face.light_x * -x / width * (1 - face.ambient)).clamp(0, 0.4)
    yield _grey(1), 0.2 * ridge
    yield _grey(0), 0.3 * _bump(x, y - 4, width, 2.2)
    yield _grey(0), 0.66 * _bump(x.abs() - width * 0.45, y - 3, width * 0.26, 1.4)


def _mouth(face: Factors, x: Tensor, y: Tensor, skin: Tensor) -> Iterator[Layer]:
    width, corner = _mouth_shape(face)
    bend = (1 - (x / width) ** 2).clamp(min=0)
    # the line between the lips sags in a smile, and splits when the mouth opens
    line, gape = y - corner - 3.4 * face.smile * bend, face.open.clamp(min=0) * 5
    upper, lower = line + 0.35 * gape * bend, line - 0.65 * gape * bend
    ends = x.abs() - width
    lips = _within(-face.lip_upper * bend - upper, lower - face.lip_lower * bend, ends)
    red = face.lip_red
    tone = 0.82 * _colour(0.86 + 0.04 * red, 0.72 - 0.22 * red, 0.74 - 0.2 * red)
    yield skin * tone, _cover(lips, 0.9)
    yield _grey(0.12), 0.85 * _cover(_within(-upper, lower, ends) - 0.35, 0.7)


def _eyes(face: Factors, x: Tensor, y: Tensor) -> Iterator[Layer]:
    outward = x.abs() - face.eye_gap
    yield _grey(0), 0.1 * _bump(outward, y + 2.5, face.eye_width + 2, 6.0)  # the socket's shade
    y = y + face.eye_tilt * outward
    height = face.eye_height * face.eye_open * (1 - 0.18 * face.smile.clamp(min=0))
    bend = (1 - (outward / face.eye_width) ** 2).clamp(min=0)
    upper, ends = -y - height * 1.15 * bend, outward.abs() - face.eye_width
    opening = _cover(_within(upper, y - height * 0.75 * bend, ends))
    yield _grey(0.85), opening
    aside = outward - torch.sign(x) * (face.gaze_x - face.yaw * 2) * 1.3
    away = torch.hypot(aside, y - face.gaze_y)
    iris = _between(_IRIS, face.iris_hue + 0.6 * face.skin)
    yield iris, _cover(away - face.iris) * opening
    yield _grey(0.03), _cover(away - face.iris * 0.42) * opening
    yield _grey(0), 0.72 * _cover(upper.abs() - 0.6) * _cover(ends - 0.5)  # the lashes


def _brows_and_hair(
    face: Factors, x: Tensor, y: Tensor, hair: Tensor, inside: Tensor
) -> Iterator[Layer]:
    outward = x.abs() - face.eye_gap - 0.8
    along = outward / face.brow_length
    arch = face.brow_height + face.brow_raise + face.brow_arch * (1 - along**2)
    # thick at the inner end, thin at the outer
    thickness = face.brow_thickness * (1.1 - 0.45 * along)
    off = (y + arch - face.brow_slope * outward).abs() - thickness
    yield hair * 0.75, _cover(_within(off, along.abs() * 4 - 4)) * face.brow_dark
    # the hairline rises to the parting and falls to the temples; long hair hides the head's sides
    peak = face.hairline_peak * (1 - ((x - face.hair_part) / 26) ** 2)
    edge = y - face.hairline - peak - 0.022 * x**2
    sides = _within(face.head_width * 0.93 - x.abs(), y - face.hair_length)
    # a little over the head's edge, or a rim of skin shows between front and back hair
    yield hair, _cover(torch.minimum(edge, sides), 1.3) * (2 * inside).clamp(max=1)
