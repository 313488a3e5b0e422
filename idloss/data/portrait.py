"""Draws faces from tables of numbers: shapes with soft edges on a grid, a batch at a time.

A head is a sphere, stretched and narrowed towards the jaw. Every pixel is carried back through the
crop's similarity and the head's pose to the frontal face, where the features are drawn; so they
turn with the head, and the five points fall where the alignment puts them. Lengths are in pixels
of the 112x96 crop, from the midpoint between the eyes, x right and y down. All ranges
below are our own choices, set by eye: persons that differ, photos of one person that vary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from idloss.geometry import fit_similarity


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
    skin_red -1 1           hair 0 1                hair_red 0 1            hair_grey -2.5 1
    hairline -42 -24        hairline_peak -7 9      hair_part -24 24        hair_volume 1.02 1.24
    hair_length -25 75      hair_wave 0.1 0.6       beard -2.4 1            moustache -2.4 1
    eye_gap 15.4 19.8       eye_width 6 8.8         eye_height 2.2 4.2      eye_tilt -0.2 0.2
    eye_socket 0 1          iris 2.8 3.8            iris_hue 0 1            brow_height 7.5 12.5
    brow_thickness 0.9 2.8  brow_arch -0.5 3.5      brow_slope -0.2 0.22    brow_length 7.5 11.5
    brow_dark 0.35 1        glasses -3 1            glasses_width 10 13.5   glasses_height 7 10.5
    glasses_round 2 5       glasses_dark 0 1        nose_length 16.5 23     nose_width 4.6 8.8
    nose_bridge 1.8 4.2     nose_tip 0.2 1          mouth_down 37.5 43.5    mouth_width 11 17
    lip_upper 1.4 4         lip_lower 2.2 5.4       lip_bow 0 1.2           lip_red 0 1
    fold 0 1                freckles -1.5 1         mole_x -30 30           mole_y -20 52
    mole -1 1
""")
"""What a person keeps, with its range; marks are absent where their value is below zero."""

PHOTO = _ranges("""
    yaw -0.42 0.42          pitch -0.2 0.2          light_x -0.9 0.9        light_y -0.9 0.25
    ambient 0.48 0.8        exposure 0.78 1.2       gamma 0.8 1.25          warmth -1 1
    tint -1 1               smile -0.35 1           open -1 1               eye_open 0.55 1.2
    gaze_x -1 1             gaze_y -0.6 0.6         brow_raise -1 2         hair_up -3 3
    hair_part_shift -4 4    back_red 0.05 0.95      back_green 0.05 0.95    back_blue 0.05 0.95
    back_slope -0.4 0.4     back_x -48 48           back_y -56 56           back_blob -0.5 0.5
    noise 0.004 0.022
""")
"""What changes from photo to photo, with its range."""

POINT_NOISE = 0.6
"""Standard deviation in pixels of a detector's five points, which the alignment inherits."""
MARKS = 14
"""Freckles on a face that has them."""
NOSE_HEIGHT = 0.22
"""How far the tip of the nose stands out of the head, in head radii."""

_SKIN = ((0.97, 0.80, 0.69), (0.80, 0.58, 0.43), (0.36, 0.22, 0.15))
_HAIR = ((0.86, 0.70, 0.42), (0.40, 0.25, 0.14), (0.07, 0.055, 0.05))
_IRIS = ((0.36, 0.52, 0.68), (0.38, 0.46, 0.28), (0.26, 0.14, 0.07))


@dataclass(frozen=True)
class _Canvas:
    """The picture so far, where on the frontal face its pixels lie, and how the light falls."""

    image: Tensor  # RGB [B, 3, h, w], painted in place
    height: Tensor  # of each row in the 112x96 crop, [h]
    x: Tensor  # [B, h, w]
    y: Tensor
    inside: Tensor  # how much of a pixel the head covers, [B, h, w]
    light_x: Tensor  # the light's direction times what relief it shows, [B, 1, 1]
    light_y: Tensor

    def rows(self, low: float, high: float) -> _Canvas:
        """A band of the picture, painted in place: features need not look at every pixel."""
        band = slice(int((self.height < low).sum()), int((self.height <= high).sum()))
        x, y, inside = self.x[:, band], self.y[:, band], self.inside[:, band]
        return replace(
            self, image=self.image[:, :, band], height=self.height[band], x=x, y=y, inside=inside
        )

    def paint(self, colour: Tensor, cover: Tensor) -> None:
        """Lay a colour `[B, 3, 1, 1]` (or one a pixel) over the picture where `cover` is 1."""
        self.image.lerp_(colour.expand_as(self.image), cover[:, None].expand_as(self.image))

    def shade(self, gain: Tensor) -> None:
        """Multiply the picture by a gain `[B, h, w]`."""
        self.image.mul_(gain[:, None])


def place_points(face: Factors, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Find and align the five points, as a detector and the released fit do.

    From standard normal errors `[B, 5, 2]`, the similarity from the picture plane to the 112x96
    crop, `[B, 2, 3]`, and the points in the crop, `[B, 5, 2]`, all float64.
    """
    detected = _project(face, _frontal_points(face)) + POINT_NOISE * jitter
    matrix = fit_similarity(detected, "sphereface")
    return matrix, detected @ matrix[:, :, :2].transpose(1, 2) + matrix[:, :, 2][:, None]


def draw_portraits(face: Factors, marks: Tensor, matrix: Tensor, grid: Tensor) -> Tensor:
    """Draw a batch of faces, noise excepted: RGB in [0, 1], `[B, 3, h, w]`.

    `marks` are places of freckles in [0, 1], `[B, MARKS, 2]`, `matrix` is that of `place_points`,
    and `grid` the picture's pixel centres in 112x96 coordinates, `[2, h, w]`, rows level.
    """
    back, shift = torch.linalg.inv(matrix[:, :, :2]).float(), matrix[:, :, 2].float()
    u, v = torch.einsum("bij,bjhw->bihw", back, grid - shift[..., None, None]).unbind(1)
    x, y, depth, inside = _unproject(face, u, v)
    canvas = _Canvas(
        image=_background(face, u, v),
        height=grid[1, :, 0],
        x=x * face.head_width,
        y=y * face.head_height + _centre(face),
        inside=inside,
        light_x=face.light_x * (1 - face.ambient),
        light_y=face.light_y * (1 - face.ambient),
    )
    _back_hair(canvas, face, u, v)
    _neck(canvas, face, u, v)
    _skin(canvas, face, (u, v, depth))
    _marks(canvas.rows(34, 112), face, marks)
    _nose(canvas.rows(36, 92), face)
    _mouth(canvas.rows(70, 112), face)
    _beard(canvas.rows(60, 112), face)
    _eyes(canvas.rows(38, 66), face)
    _brows(canvas.rows(24, 58), face)
    _front_hair(canvas, face)
    _glasses(canvas.rows(32, 74), face)
    warm, tint = face.warmth * 0.12, face.tint * 0.05
    light = face.exposure[:, None] * _colour(1 + warm, 1 + tint, 1 - warm)
    return canvas.image.mul_(light).clamp_(1e-4, 1).pow_(face.gamma[:, None])


def _cover(distance: Tensor, soft: float = 0.6) -> Tensor:
    """1 inside a shape (negative distance), 0 outside, a ramp of `2 * soft` pixels between."""
    return distance.mul(-0.5 / soft).add_(0.5).clamp_(0, 1)


def _bump(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    return _hill((x / width).square_() + (y / height).square_())


def _hill(square: Tensor) -> Tensor:
    # exp is ten times slower where its result is denormal, which is most of a picture
    return square.clamp(max=20.0).neg_().exp_()


def _oval(x: Tensor, y: Tensor, width: Tensor | float, height: Tensor | float) -> Tensor:
    """Distance to an ellipse, exact on it and good near it."""
    radius = torch.minimum(torch.as_tensor(width), torch.as_tensor(height))
    return (torch.sqrt((x / width) ** 2 + (y / height) ** 2) - 1) * radius


def _colour(*channels: Tensor) -> Tensor:
    return torch.stack(channels, 1)


def _rgb(*channels: float) -> Tensor:
    return torch.tensor(channels).view(1, 3, 1, 1)


def _between(stops: tuple[tuple[float, float, float], ...], place: Tensor) -> Tensor:
    """Colour `[B, 3, 1, 1]` at a place in [0, 1] along three stops."""
    first, middle, last = (_rgb(*stop) for stop in stops)
    at = place[:, None] * 2
    return torch.where(at < 1, first.lerp(middle, at.clamp(max=1)), middle.lerp(last, at - 1))


def _skin_colour(face: Factors) -> Tensor:
    red = face.skin_red * 0.04
    return _between(_SKIN, face.skin) + _colour(red, -0.4 * red, -red)


def _hair_colour(face: Factors) -> Tensor:
    # fair hair on dark skin is rare, and colour must not give the person away too easily
    place = (face.hair + 0.5 * face.skin).clamp(0, 1)
    colour = _between(_HAIR, place)
    red = face.hair_red**3 * (1 - place)
    colour = colour + _colour(0.18 * red, -0.08 * red, -0.1 * red)
    return colour.lerp(torch.full_like(colour, 0.68), face.hair_grey.clamp(0, 1)[:, None] ** 2)


def _centre(face: Factors) -> Tensor:
    """Height of the head's middle: the eyes lie a sixth of its half-height above it."""
    return 0.17 * face.head_height


def _mouth_shape(face: Factors) -> tuple[Tensor, Tensor]:
    """Half-width of the mouth and height of its corners, both moved by a smile."""
    smile = face.smile
    return face.mouth_width * (1 + 0.16 * smile), face.mouth_down - 1.8 * smile


def _frontal_points(face: Factors) -> Tensor:
    """The five points on the frontal face, with the nose's height above the head: `[B, 5, 3]`."""
    zero = torch.zeros_like(face.eye_gap)
    width, down = _mouth_shape(face)
    places = (
        (-face.eye_gap, zero, zero),
        (face.eye_gap, zero, zero),
        (zero, face.nose_length, zero + NOSE_HEIGHT),
        (-width, down, zero),
        (width, down, zero),
    )
    return torch.stack([torch.cat(place, 2)[:, 0] for place in places], 1).double()


def _turns(face: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    yaw, pitch = face.yaw, face.pitch
    return yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()


def _narrowing(face: Factors, below: Tensor) -> Tensor:
    """Width of the head, relative to the cheeks', at a height in head radii below its middle."""
    return 1 - face.jaw * below.clamp(0, 1) ** 2


def _project(face: Factors, points: Tensor) -> Tensor:
    """Points of the frontal face to the picture plane, `[B, 5, 2]`."""
    x = points[..., 0:1] / face.head_width
    y = (points[..., 1:2] - _centre(face)) / face.head_height
    z = (1 - x**2 - y**2).clamp(min=0).sqrt() + points[..., 2:3]
    cos, sin, cos_pitch, sin_pitch = _turns(face)
    x, z = x * cos + z * sin, z * cos - x * sin
    y, z = y * cos_pitch + z * sin_pitch, z * cos_pitch - y * sin_pitch
    u = x * _narrowing(face, y) * face.head_width
    v = y * face.head_height + _centre(face)
    return torch.cat([u, v], 2)


def _unproject(face: Factors, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The picture plane to the frontal face in head radii, with depth and the head's coverage."""
    y = (v - _centre(face)) / face.head_height
    x = u / (face.head_width * _narrowing(face, y))
    radius = torch.sqrt(x**2 + y**2)
    inside = _cover((radius - 1) * face.head_width, 1.0)
    depth = (1 - radius**2).clamp(min=0.0).sqrt()
    cos, sin, cos_pitch, sin_pitch = _turns(face)
    y, z = y * cos_pitch - depth * sin_pitch, depth * cos_pitch + y * sin_pitch
    return x * cos - z * sin, y, depth, inside


def _background(face: Factors, u: Tensor, v: Tensor) -> Tensor:
    base = _colour(face.back_red, face.back_green, face.back_blue)
    base = base.lerp(base.mean(1, keepdim=True), 0.6)
    blob = _bump(u - face.back_x, v - face.back_y, 24.0, 24.0)
    light = face.back_slope * u / 48 + face.back_blob * blob
    return (base + light[:, None]).clamp_(0, 1).contiguous()


def _strands(canvas: _Canvas, face: Factors) -> Tensor:
    """Hair colour a pixel, `[B, 3, h, w]`: strands, lit from the light's side."""
    wave = face.hair_wave
    bent = canvas.x + 3 * torch.sin(canvas.y * wave * 0.4)
    gain = 0.8 + 0.07 * torch.sin(bent * 2.3) + 0.07 * torch.sin(bent * 0.9 + 1)
    gain = gain - 0.006 * canvas.light_y * canvas.y + 0.01 * canvas.light_x * canvas.x
    return _hair_colour(face) * gain.clamp_(0.35, 1.4)[:, None]


def _back_hair(canvas: _Canvas, face: Factors, u: Tensor, v: Tensor) -> None:
    volume = face.hair_volume
    wide, high = face.head_width * (volume + 0.04), face.head_height * volume
    below = v - _centre(face)
    # an arch: round above the head's middle, straight down the sides below it
    arch = _oval(u, below.clamp(max=0), wide, high)
    taper = 1.2 * (u.abs() - face.head_width * 0.95).clamp(min=0)
    cover = _cover(torch.maximum(arch, v - face.hair_length + taper), 1.5)
    canvas.paint(_strands(canvas, face) * 0.8, cover)


def _neck(canvas: _Canvas, face: Factors, u: Tensor, v: Tensor) -> None:
    below = v - _centre(face) - 0.55 * face.head_height
    neck = torch.maximum(u.abs() - 0.66 * face.head_width, -below)
    canvas.paint(_skin_colour(face) * (face.ambient * 0.75)[:, None], _cover(neck, 1.5))


def _skin(canvas: _Canvas, face: Factors, plane: tuple[Tensor, Tensor, Tensor]) -> None:
    u, v, depth = plane
    across = u / face.head_width
    down = (v - _centre(face)) / face.head_height
    facing = across * face.light_x + down * face.light_y + depth * 0.75
    gain = face.ambient + (1 - face.ambient) * 1.15 * facing.clamp(min=0)
    x, y, side = canvas.x, canvas.y, canvas.x.abs()
    socket = _bump(side - face.eye_gap, y + 2.5, face.eye_width + 2, 6.0)
    gain = gain - 0.1 * face.eye_socket * socket
    # cheeks, and the folds from the nose to the mouth that a smile deepens
    cheek = _bump(side - 24, y - 22, 11.0, 9.0)
    width, corner = _mouth_shape(face)
    fold_line = side - (face.nose_width + 3 + (y - 18).clamp(min=0) * (width / 40))
    fold = _bump(fold_line, y - (corner + 20) / 2, 1.6, 10.0)
    depth_of_fold = face.fold * (0.35 + 0.65 * face.smile.clamp(min=0))
    gain = gain - 0.16 * depth_of_fold * fold + 0.05 * cheek
    gain = gain - 0.09 * _bump(x, y - corner - 9, 9.0, 2.2)
    blush = 0.05 * cheek[:, None] * torch.tensor([1.0, -0.6, -0.5]).view(1, 3, 1, 1)
    skin = (_skin_colour(face) + blush) * gain.clamp(0.08, 1.5)[:, None]
    canvas.paint(skin, canvas.inside)


def _marks(canvas: _Canvas, face: Factors, marks: Tensor) -> None:
    mole = _bump(canvas.x - face.mole_x, canvas.y - face.mole_y, 1.1, 1.1)
    canvas.shade(1 - 0.6 * face.mole.clamp(min=0).sqrt() * mole)
    freckled = face.freckles.clamp(min=0).sqrt() * 0.3
    some = (freckled.flatten() > 0).nonzero().flatten()
    if not len(some):
        return
    places = marks[some] * torch.tensor([56.0, 22.0]) + torch.tensor([-28.0, 8.0])
    x, y = canvas.x[some], canvas.y[some]
    spots = torch.zeros_like(x)
    for place in places.unbind(1):
        spots += _bump(x - place[:, :1, None], y - place[:, 1:, None], 1.0, 1.0)
    canvas.image[some] *= (1 - freckled[some] * spots.clamp_(max=1))[:, None]


def _nose(canvas: _Canvas, face: Factors) -> None:
    # the nose stands out: what is drawn on the face shifts against it as the head turns
    lift = NOSE_HEIGHT * face.head_width
    rise = (canvas.y / face.nose_length).clamp(0, 1)
    x = canvas.x - lift * face.yaw.tan() * rise
    y = canvas.y - lift * face.pitch.tan() * rise - face.nose_length
    length, width = face.nose_length, face.nose_width
    spread = face.nose_bridge + (width * 0.62 - face.nose_bridge) * rise**2
    ridge = _hill((x / spread) ** 2) * _cover(-y - length * 0.9, 5.0) * _cover(y - 3, 2.5)
    # relief: the slope of the ridge against the light, a sheen along it, shade under the tip
    gain = 1 + (1.3 * canvas.light_x * (x / spread) + 0.13) * ridge
    gain += 0.22 * face.nose_tip * _bump(x, y + 1.5, width * 0.38, 2.8)
    gain -= 0.3 * _bump(x, y - 5.0, width * 0.9, 2.0)
    side = x.abs()
    wing = _oval(side - width * 0.74, y - 1.0, width * 0.3, 3.2).abs()
    gain -= 0.34 * _cover(wing - 0.5, 1.0) * _cover(width * 0.78 - side, 1.0)
    canvas.shade(gain)
    nostril = _cover(_oval(side - width * 0.42, y - 3.2, width * 0.24, 1.3), 0.8)
    canvas.shade(1 - 0.66 * nostril)


def _mouth(canvas: _Canvas, face: Factors) -> None:
    width, corner = _mouth_shape(face)
    smile, gape = face.smile, face.open.clamp(min=0) * 5.0
    across = canvas.x / width
    bend = (1 - across**2).clamp(min=0)
    # the line between the lips sags in a smile, and splits when the mouth opens
    line = canvas.y - corner - 3.4 * smile * bend
    upper, lower = line + 0.35 * gape * bend, line - 0.65 * gape * bend
    bow = 1 - face.lip_bow * 0.45 * _hill((across / 0.16) ** 2)
    top = -face.lip_upper * (bend**0.6) * bow - upper
    bottom = lower - face.lip_lower * bend**0.75
    ends = (canvas.x.abs() - width) * 0.8
    red = face.lip_red
    lip = _skin_colour(face) * _colour(0.86 + 0.04 * red, 0.72 - 0.22 * red, 0.74 - 0.2 * red)
    lit = 1 + 0.12 * _hill(((lower - face.lip_lower * 0.5) / 1.2) ** 2) * bend
    side = 0.82 + 0.25 * canvas.light_x * across - 0.2 * canvas.light_y
    lit = (lit - 0.12 * (upper < 0)) * side
    whole = torch.maximum(torch.maximum(top, bottom), ends)
    canvas.paint(lip * lit[:, None], _cover(whole, 0.9))
    gap = torch.maximum(torch.maximum(-upper, lower), ends)
    canvas.paint(_rgb(0.12, 0.12, 0.12), _cover(gap - 0.35, 0.7) * 0.85)
    teeth = torch.maximum(torch.maximum(-upper + 0.4, upper - 2.8), gap + 0.8)
    canvas.paint(_rgb(0.88, 0.86, 0.8), _cover(teeth, 0.6))


def _beard(canvas: _Canvas, face: Factors) -> None:
    width, corner = _mouth_shape(face)
    side = canvas.x.abs()
    jaw = _cover(corner - 6 - canvas.y + (30 - side).clamp(min=0) * 0.55, 5.0)
    lips = _cover(_oval(canvas.x, canvas.y - corner - 1, width * 1.08, 6.5), 1.5)
    hair = face.beard.clamp(min=0).sqrt() * jaw * (1 - lips)
    # two wings that hang from below the nose to the corners of the mouth
    along = side / (width * 1.1)
    middle = corner - 4.6 - face.lip_upper * 0.5 + 3.4 * along**2
    wings = (canvas.y - middle).abs() - 2.6 * (1 - along**2).clamp(min=0) - 0.2
    strip = torch.maximum(wings, (along - 1) * 8)
    hair = torch.maximum(hair, face.moustache.clamp(min=0).sqrt() * _cover(strip, 1.0))
    canvas.paint(_strands(canvas, face) * 0.9, hair * 0.85 * canvas.inside)


def _eyes(canvas: _Canvas, face: Factors) -> None:
    outward = canvas.x.abs() - face.eye_gap
    y = canvas.y + face.eye_tilt * outward
    width = face.eye_width
    height = face.eye_height * face.eye_open * (1 - 0.18 * face.smile.clamp(min=0))
    bend = (1 - (outward / width) ** 2).clamp(min=0)
    upper = -y - height * 1.15 * bend**0.7
    lower = y - height * 0.75 * bend**0.9
    ends = outward.abs() - width
    opening = _cover(torch.maximum(torch.maximum(upper, lower), ends))
    canvas.paint(_rgb(0.86, 0.84, 0.82), opening)
    right = torch.sign(canvas.x)
    gaze_x = outward - right * (face.gaze_x - face.yaw * 2) * 1.3
    gaze_y = y - face.gaze_y
    away = torch.sqrt(gaze_x**2 + gaze_y**2)
    iris = _between(_IRIS, (face.iris_hue + 0.6 * face.skin).clamp(0, 1))
    canvas.paint(iris, _cover(away - face.iris) * opening)
    canvas.paint(_rgb(0.03, 0.03, 0.03), _cover(away - face.iris * 0.42) * opening)
    glint = _bump(gaze_x * right - 0.9, gaze_y + 0.9, 0.7, 0.7) * opening
    canvas.paint(_rgb(1.0, 1.0, 1.0), 0.85 * glint)
    lash = _cover((upper + 0.2).abs() - 0.55, 0.6) * _cover(ends - 0.5)
    canvas.shade(1 - 0.72 * lash)
    crease = _cover((upper - 2.0).abs() - 0.3, 0.9) * _cover(ends - 0.5)
    bag = _cover((lower - 0.8).abs() - 0.3, 0.9) * _cover(ends)
    canvas.shade((1 - 0.22 * crease) * (1 - 0.12 * bag))


def _brows(canvas: _Canvas, face: Factors) -> None:
    outward = canvas.x.abs() - face.eye_gap - 0.8
    along = outward / face.brow_length
    height = face.brow_height + face.brow_raise
    middle = -height - face.brow_arch * (1 - along**2) + face.brow_slope * outward
    # thick at the inner end, thin at the outer
    thickness = face.brow_thickness * (1.1 - 0.45 * along)
    cover = _cover(torch.maximum((canvas.y - middle).abs() - thickness, (along.abs() - 1) * 4), 0.8)
    canvas.paint(_hair_colour(face) * 0.75, cover * face.brow_dark)


def _front_hair(canvas: _Canvas, face: Factors) -> None:
    x = canvas.x - face.hair_part - face.hair_part_shift
    line = face.hairline + face.hair_up
    # rises to the parting, falls to the temples
    edge = line + face.hairline_peak * (1 - (x / 26) ** 2) + 0.022 * canvas.x**2
    wave = 1.2 * torch.sin(canvas.x * face.hair_wave)
    sides = face.head_width * 0.93 - canvas.x.abs()
    below = canvas.y - face.hair_length
    cover = torch.minimum(canvas.y - edge - wave, torch.maximum(sides, below))
    # a little over the head's edge, or a rim of skin shows between front and back hair
    canvas.paint(_strands(canvas, face), _cover(cover, 1.3) * (2 * canvas.inside).clamp(max=1))


def _glasses(canvas: _Canvas, face: Factors) -> None:
    worn = (face.glasses.flatten() > 0).nonzero().flatten()
    if not len(worn):
        return
    face = Factors({name: value[worn] for name, value in face.items()})
    x, y = canvas.x[worn], canvas.y[worn] - 1.0
    outward, power = x.abs() - face.eye_gap - 0.5, face.glasses_round
    corner = (outward / face.glasses_width).abs() ** power
    radius = (corner + (y / face.glasses_height).abs() ** power + 1e-9) ** (1 / power)
    rim = ((radius - 1) * face.glasses_height).abs() - 0.9
    bridge = torch.maximum((y + 2.5).abs() - 0.8, x.abs() - face.eye_gap + face.glasses_width)
    frame = _cover(torch.minimum(rim, bridge), 0.7)[:, None]
    colour = _rgb(0.08, 0.07, 0.07).lerp(_rgb(0.55, 0.38, 0.2), face.glasses_dark[:, None])
    canvas.image[worn] = canvas.image[worn].lerp(colour.expand_as(canvas.image[worn]), frame)
