"""Face geometry: templates, the fit of a photo to them, the warp, and crops turned into others.

Coordinates are pixels, `(x, y)`, with the centre of the first pixel at (0, 0), as in OpenCV. The
five points are the left eye, the right eye, the tip of the nose and the left and right corners of
the mouth, left and right as seen in the photo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from idloss.errors import did_you_mean
from idloss.plugins import Registry
from idloss.resample import Mode, check_images, resize

Point: TypeAlias = tuple[float, float]
Fill: TypeAlias = float | Literal["edge"]
# One number, or a batch of them [B]: the least-squares fit is written once for both.
_Number: TypeAlias = float | Tensor
_Conversion: TypeAlias = tuple[
    tuple[int, int],
    tuple[int, int],
    tuple[int, int] | None,
    tuple[tuple[float, float, float], tuple[float, float, float]],
]
_Points: TypeAlias = Sequence[tuple[_Number, _Number]]

_MIN_EXTENT = 1.0  # pixels; a face smaller than that is normalised coordinates or one point
_MIN_FLATNESS = 0.05  # smaller over larger spread; 0.41 or more on LFW, 0.34 or more on CelebA
_ASPECT_SLACK = 0.75  # pixels by which rounding (18x16 from 112x96) may change an aspect
_WHOLE = 1e-4  # pixels; a translation this close to whole numbers is a pad or a crop


@dataclass(frozen=True)
class Template:
    """Where the five points of a face lie in a crop, and how large the crop is.

    Args:
        name: Name for messages and look-ups.
        size: Rows and columns of the crop, `(H, W)`.
        points: Five `(x, y)` in pixels of the crop.
    """

    name: str
    size: tuple[int, int]
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        lengths = [len(point) for point in self.points]
        if len(self.size) != 2 or min(self.size) < 1 or lengths != [2] * 5:
            raise ValueError(f"a template has a size (H, W) and five (x, y), got {self}")
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "points", tuple((float(x), float(y)) for x, y in self.points))
        left, right, nose, mouth_left, mouth_right = self.points
        upright = left[0] < right[0] and mouth_left[0] < mouth_right[0]
        upright &= max(left[1], right[1]) < min(mouth_left[1], mouth_right[1])
        inside = 0 <= nose[0] < self.size[1] and 0 <= nose[1] < self.size[0]
        if not (upright and inside and all(map(math.isfinite, sum(self.points, ())))):
            raise ValueError(
                f"no upright face in its crop (eyes, nose, corners of the mouth, left as seen "
                f"before right, in pixels): {self}"
            )


# wy1iu/sphereface, preprocess/code/face_align_demo.m; the paper's authors use the same.
_SPHEREFACE: Final[tuple[Point, ...]] = (
    (30.2946, 51.6963),
    (65.5318, 51.5014),
    (48.0252, 71.7366),
    (33.5493, 92.3655),
    (62.7299, 92.2041),
)
# xinntao/facexlib, utils/face_restoration_helper.py: FFHQ's mean points at 512
_FFHQ: Final[tuple[Point, ...]] = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)


def _moved(points: Sequence[Point], scale: float, right: float, down: float) -> tuple[Point, ...]:
    return tuple((scale * x + right, scale * y + down) for x, y in points)


# Nobody has published five points for VGG-Face or FaceNet: their crops are detector boxes. Ours are
# SphereFace's, moved by the similarity to the mean landmarks of 193 LFW photos (every 60th) in the
# boxes of MTCNN: for vggface enlarged by 0.3, shorter side 256, centre 224 (the ReadMe.txt of
# Oxford's VGGFace2 models); for facenet with 32 px of margin, at 160 (davidsandberg/facenet, wiki
# "Validate on LFW"), not stretched to a square. The paper stretches 112x96 crops for VGG-Face.
_ARCFACE: Final = _moved(_SPHEREFACE, 1.0, 8.0, 0.0)
# FNets of pSp and e4e see rows 35 to 223 and columns 32 to 220 of a 256 px face, shrunk to 112x112
# (eladrich/pixel2style2pixel, criteria/id_loss.py); pixels have their centres at whole numbers.
_PSP: Final = 188 / 112
TEMPLATES: Final[Registry[Template]] = Registry("template")
"""Crops by name."""


def register_template(template: Template) -> Template:
    """Let a template be asked for by its name wherever a `crop` is, and give it back.

    Args:
        template: The template, whose name no other has.
    """
    TEMPLATES.register(template.name, template)
    return template


for _template in (
    Template("sphereface", (112, 96), _SPHEREFACE),
    # deepinsight/insightface, python-package/insightface/utils/face_align.py: + 8 px in x
    Template("arcface", (112, 112), _ARCFACE),
    Template("vggface", (224, 224), _moved(_SPHEREFACE, 2.433, -1.2, -44.4)),
    Template("facenet", (160, 160), _moved(_SPHEREFACE, 1.294, 20.1, -4.0)),
    Template("psp", (256, 256), _moved(_ARCFACE, _PSP, 31.5 + _PSP / 2, 34.5 + _PSP / 2)),
    Template("ffhq", (512, 512), _FFHQ),
):
    register_template(_template)


def get_template(crop: str | Template) -> Template:
    """A template by its name, or a template, which is given back."""
    if isinstance(crop, Template):
        return crop
    return TEMPLATES.get(crop) or TEMPLATES.find(crop)


def fit_similarity(
    landmarks: Tensor,
    crop: str | Template = "sphereface",
    *,
    names: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Fit photos to a template as the paper's code does: landmarks `[B, 5, 2]` to `[B, 2, 3]`.

    Matrices from photo to template, in float64; the residual is measured in the photo. Landmarks
    that no face has are a ValueError that names the photo.
    """
    points = _check_landmarks(landmarks, names, image_size)
    return _inverse(_matrix(_solve(get_template(crop).points, _coordinates(points))))


def fit_similarity_forward(
    landmarks: Tensor,
    crop: str | Template = "sphereface",
    *,
    names: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """`fit_similarity` the usual way (Umeyama 1991): the residual is measured in the crop."""
    points = _check_landmarks(landmarks, names, image_size)
    return _matrix(_solve(_coordinates(points), get_template(crop).points))


def warp(
    images: Tensor, matrices: Tensor, size: Sequence[int], *, mode: Mode = "bicubic"
) -> Tensor:
    """Warp float images `[B, C, H, W]` by `[B, 2, 3]` as `cv2.warpAffine` does, zero outside.

    OpenCV's uint8 warp rounds places to 1/32 pixel and differs by 0.1 grey levels on average. There
    is no antialiasing: shrink large faces first where that matters.
    """
    check_images(images, channels=None)
    if mode not in get_args(Mode):
        raise ValueError(did_you_mean("mode", mode, get_args(Mode)))
    if not matrices.is_floating_point():
        raise TypeError(f"matrices must be floating point, got {matrices.dtype}")
    if matrices.shape != (images.shape[0], 2, 3):
        raise ValueError(
            f"matrices must be [B, 2, 3], one per image of {list(images.shape)}, "
            f"got {list(matrices.shape)}"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H, W), two positive whole numbers, got {size}")
    back = _inverse(matrices.to(device=images.device, dtype=_precise(images.device)))
    return _sample(images, back, (size[0], size[1]), mode=mode, padding="zeros")


def align(
    images: Tensor,
    landmarks: Tensor,
    crop: str | Template = "sphereface",
    *,
    fit: Callable[..., Tensor] = fit_similarity,
    names: Sequence[str] | None = None,
    mode: Mode = "bicubic",
) -> Tensor:
    """Cut upright faces `[B, C, *crop.size]` out of float photos `[B, C, H, W]`, zero outside.

    `fit` is `fit_similarity` (the paper's), `fit_similarity_forward`, or a function like them.
    """
    wanted = get_template(crop)
    check_images(images, channels=None)
    height, width = images.shape[-2:]
    if landmarks.shape[0] != images.shape[0]:
        raise ValueError(f"{len(landmarks)} sets of landmarks for {len(images)} photos")
    matrices = fit(landmarks.to(images.device), wanted, names=names, image_size=(height, width))
    return warp(images, matrices, wanted.size, mode=mode)


def convert_crop(
    images: Tensor, source: str | Template, target: str | Template, *, fill: Fill = "edge"
) -> Tensor:
    """Turn aligned crops `[B, C, H, W]` of one template into those of another, in a single step.

    Crops of any size will do, and keep their scale, unless the face fills fewer pixels of the new
    template, which then gets as many as the crop has to give. Templates that are whole pixels apart
    (`sphereface`, `arcface`) are padded or cut; others are one bicubic warp, after antialiasing if
    the face shrinks. `fill` is for what lies beyond: a number, or `"edge"` to repeat the border.
    """
    old, new = get_template(source), get_template(target)
    check_images(images, channels=None)
    if isinstance(fill, str) and fill != "edge":
        raise ValueError(f"fill must be 'edge' or a number, got {fill!r}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must be [B, C, H, W] with pixels, got {list(images.shape)}")
    height, width = images.shape[-2:]
    rows, columns = old.size
    if (
        abs(width - columns * height / rows) > _ASPECT_SLACK
        and abs(height - rows * width / columns) > _ASPECT_SLACK
    ):
        raise ValueError(
            f"a {old.name!r} crop is {rows}x{columns} or of the same aspect, got "
            f"{height}x{width}; resize it to {old.size} first if it was squashed"
        )
    if old == new:
        return images
    if (height, width) == old.size:
        size, small, window, lines = _full_conversion(old.size, old.points, new.size, new.points)
    else:
        size, small, window, lines = _conversion(old, new, height, width)
    if small[0] != height or small[1] != width:
        images = resize(images, small, convention="antialias")
    if window is not None:
        wide = _window(images, -1, window[0], size[1], fill)
        return _window(wide, -2, window[1], size[0], fill)
    back = torch.tensor([lines], dtype=_precise(images.device), device=images.device)
    back = back.expand(images.shape[0], 2, 3)
    if fill == "edge":
        return _sample(images, back, size, mode="bicubic", padding="border")
    return _sample(images - fill, back, size, mode="bicubic", padding="zeros") + fill


def coverage(source: str | Template, target: str | Template) -> float:
    """The share of a crop of the template `target` that one of `source` holds."""
    whole = torch.ones(1, 1, *get_template(source).size, device="cpu")
    return float(convert_crop(whole, source, target, fill=0.0).mean())


# a constant to a compiler: with free numbers, torch.compile(dynamic=True) took a quarter of an hour
# (plain numbers, as torch before 2.13 cannot rebuild a dataclass there)
@torch.compiler.assume_constant_result
def _full_conversion(
    old_size: tuple[int, int],
    old_points: tuple[Point, ...],
    new_size: tuple[int, int],
    new_points: tuple[Point, ...],
) -> _Conversion:
    old, new = Template("old", old_size, old_points), Template("new", new_size, new_points)
    return _conversion(old, new, *old.size)


def _conversion(old: Template, new: Template, height: int, width: int) -> _Conversion:
    """Size, size to shrink to first, corner of a window if whole pixels lie between, map back."""
    down, across = height / old.size[0], width / old.size[1]
    a, b, x, y = (float(number) for number in _solve(new.points, old.points))
    shrinks = math.hypot(a, b)
    new_down, new_across = (max(scale, min(1.0, scale * shrinks)) for scale in (down, across))
    size = (max(1, round(new.size[0] * new_down)), max(1, round(new.size[1] * new_across)))
    step = (shrinks * down / new_down, shrinks * across / new_across)  # old pixels in a new one
    small = (height, width)
    if max(step) > 1 + _WHOLE:
        small = (max(1, round(height / step[0])), max(1, round(width / step[1])))
        down, across = small[0] / old.size[0], small[1] / old.size[1]
    # Crops are scaled about the corner of the image, which lies at (-0.5, -0.5): x of a template is
    # across * (x + 0.5) - 0.5 of a crop.
    right_by_column, right_by_row = a * across / new_across, -b * across / new_down
    down_by_column, down_by_row = b * down / new_across, a * down / new_down
    right = across * (x + 0.5 * (1 - a + b)) + 0.5 * (right_by_column + right_by_row - 1)
    lower = down * (y + 0.5 * (1 - a - b)) + 0.5 * (down_by_row + down_by_column - 1)
    turns = max(abs(right_by_column - 1), abs(down_by_row - 1), abs(right_by_row))
    whole = turns * max(size) < _WHOLE and all(
        abs(shift - round(shift)) < _WHOLE for shift in (right, lower)
    )
    window = (round(right), round(lower)) if whole else None
    lines = ((right_by_column, right_by_row, right), (down_by_column, down_by_row, lower))
    return size, small, window, lines


def _solve(source: _Points, target: _Points) -> tuple[_Number, _Number, _Number, _Number]:
    """Least-squares similarity `(x, y) -> (a x - b y + right, b x + a y + lower)`."""
    # in the complex plane, the regression of one line: covariance over variance is its slope
    count = len(source)
    mean_x, mean_y = sum(x for x, _ in source) / count, sum(y for _, y in source) / count
    goal_x, goal_y = sum(u for u, _ in target) / count, sum(v for _, v in target) / count
    centred = [
        (x - mean_x, y - mean_y, u - goal_x, v - goal_y)
        for (x, y), (u, v) in zip(source, target, strict=True)
    ]
    spread = sum(x * x + y * y for x, y, _, _ in centred)
    a = sum(x * u + y * v for x, y, u, v in centred) / spread
    b = sum(x * v - y * u for x, y, u, v in centred) / spread
    return a, b, goal_x - a * mean_x + b * mean_y, goal_y - b * mean_x - a * mean_y


def _coordinates(points: Tensor) -> _Points:
    return [(point[:, 0], point[:, 1]) for point in points.unbind(1)]


def _matrix(similarity: tuple[_Number, ...]) -> Tensor:
    a, b, right, lower = (torch.as_tensor(number) for number in similarity)
    rows: Tensor = torch.stack((a, -b, right, b, a, lower), dim=-1)
    return rows.view(-1, 2, 3)


def _inverse(matrices: Tensor) -> Tensor:
    """Invert affine maps `[B, 2, 3]`."""
    a, b, x = matrices[:, 0].unbind(-1)
    c, d, y = matrices[:, 1].unbind(-1)
    rows = torch.stack((d, -b, b * y - d * x, -c, a, c * x - a * y), dim=-1)
    inverse: Tensor = rows / (a * d - b * c).unsqueeze(-1)
    return inverse.view(-1, 2, 3)


def _precise(device: torch.device) -> torch.dtype:
    """Type for the few numbers that decide where a crop lies; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sample(
    images: Tensor, back: Tensor, size: tuple[int, int], *, mode: Mode, padding: str
) -> Tensor:
    """Look images up where `back` `[B, 2, 3]` takes the pixels of the result."""
    exact = images if images.dtype in (torch.float32, torch.float64) else images.float()
    rows, columns = images.shape[-2:]
    # grid_sample wants the image between -1 and 1: (2 x + 1) / columns - 1 for pixel x. Composed
    # here, in the matrices' own precision, so that the grid is computed once and rounded once.
    y = torch.arange(size[0], device=images.device, dtype=exact.dtype)[:, None]
    x = torch.arange(size[1], device=images.device, dtype=exact.dtype)
    places = []
    for axis, length in ((0, columns), (1, rows)):
        by_column, by_row, shift = (2 / length * back[:, axis, :, None, None]).unbind(1)
        shift = shift + (1 / length - 1)
        by_column, by_row, shift = (one.to(exact.dtype) for one in (by_column, by_row, shift))
        places.append(by_column * x + by_row * y + shift)
    grid = torch.stack(places, dim=-1)
    sampled = F.grid_sample(exact, grid, mode=mode, padding_mode=padding, align_corners=False)
    return sampled.to(images.dtype)


def _window(images: Tensor, axis: int, start: int, length: int, fill: Fill) -> Tensor:
    """Cut `length` places from `start` out of an axis; what lies beyond its ends is filled."""
    stop, there = start + length, images.shape[axis]
    parts = [images.narrow(axis, max(start, 0), max(0, min(stop, there) - max(start, 0)))]
    for beyond, edge in ((-start, 0), (stop - there, there - 1)):
        if beyond > 0:
            border = images.narrow(axis, edge, 1)
            border = border if fill == "edge" else torch.full_like(border, float(fill))
            shape = list(images.shape)
            shape[axis] = beyond
            parts.insert(0 if edge == 0 else len(parts), border.expand(shape))
    return torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]


def _check_landmarks(
    landmarks: Tensor, names: Sequence[str] | None, image_size: tuple[int, int] | None
) -> Tensor:
    """Refuse what is no face; give the rest back in a type precise enough to fit with."""
    if landmarks.dtype == torch.bool or landmarks.is_complex():
        raise TypeError(f"landmarks must be real numbers, got {landmarks.dtype}")
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be [B, 5, 2] of (x, y), got {list(landmarks.shape)}")
    if names is not None and len(names) != len(landmarks):
        raise ValueError(f"{len(names)} names for {len(landmarks)} sets of landmarks")
    points = landmarks.to(_precise(landmarks.device))
    # Reading values stops a compiled graph; there the caller has checked its landmarks before.
    if not len(points) or torch.compiler.is_compiling():
        return points
    low, high = points.amin(1), points.amax(1)
    x, y = (points - points.mean(1, keepdim=True)).unbind(-1)
    xx, yy, xy = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    faults = {
        "are not finite": ~points.isfinite().all(-1).all(-1),
        "lie within one pixel (are they in pixels of the photo?)": (high - low).amax(1)
        < _MIN_EXTENT,
        # determinant over squared trace of the scatter: the squared ratio of its spreads, nearly
        "lie on one line": xx * yy - xy * xy < (_MIN_FLATNESS * (xx + yy)) ** 2,
    }
    if image_size is not None:
        rows, columns = image_size
        photo, middle = points.new_tensor([columns - 1, rows - 1]), points.mean(1)
        beyond = torch.maximum(-low, high - photo) > max(image_size) / 2
        lost = (middle < 0) | (middle > photo) | beyond
        faults[f"lie far outside the {rows}x{columns} photo"] = lost.any(-1)
    if not torch.stack(list(faults.values())).any():
        return points
    reason, mask = next((reason, mask) for reason, mask in faults.items() if mask.any())
    first, others = int(mask.nonzero()[0]), int(mask.sum()) - 1
    who = f"image {first}" if names is None else f"image {names[first]!r}"
    more = f" (and {others} more in this batch)" if others else ""
    seen = [[round(value, 2) for value in point] for point in points[first].tolist()]
    raise ValueError(f"landmarks of {who} {reason}{more}: {seen}")
