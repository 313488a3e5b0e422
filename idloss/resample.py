"""The one resampler: every image that idloss makes smaller or larger goes through here.

It has two conventions, as the field, and mixing them costs up to a hundred grey levels. `"cv2"` is
what `cv2.resize` does and the paper used: four taps (bicubic, a = -0.75), two (bilinear) or one,
whatever the scale. With `"antialias"` the kernel grows with the down-sampling factor, as in Pillow
and Matlab's `imresize` (bicubic, a = -0.5), and in torch's `interpolate(antialias=True)`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from idloss.errors import did_you_mean

Mode = Literal["bicubic", "bilinear", "nearest"]
Convention = Literal["cv2", "antialias"]
Rounding = Literal["nearest", "floor"]

Size: TypeAlias = tuple[int, int]
"""Rows and columns."""

_Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
# Neighbours of every output place and their weights, both [taps, size_out]: numpy, not tensors, so
# that a remembered entry belongs to no device and to no trace.
_Taps: TypeAlias = tuple[_Array, _Array]

_LEVELS = 255
# OpenCV, modules/imgproc/src/resize.cpp: INTER_RESIZE_COEF_BITS is 11, and its vertical pass drops
# 4 bits, then 16, then 2 (4 + 16 + 2 = 11 + 11), rounding only at the last step.
_COEF_SCALE = 1 << 11
_SIZE = re.compile(r"([1-9]\d*)[x\N{MULTIPLICATION SIGN}]([1-9]\d*)")
_CUBIC = -0.75  # a of the cubic kernel; resize.cpp, interpolateCubic


def resize(
    images: Tensor, size: Sequence[int], *, mode: Mode = "bicubic", convention: Convention = "cv2"
) -> Tensor:
    """Resample `[..., C, H, W]`, floating point or uint8, to `(H, W)`, in the type given.

    Floats are neither rounded nor clamped, as bicubic overshoots. uint8 gives the bytes of OpenCV's
    x86 wheels (without Intel's IPP, it is a level off in 1 to 5 % of enlarged bicubic pixels) or of
    Pillow, but for ties: 1 pixel of 1,000 at odd bicubic scales, 2 of 100 in Pillow's bilinear.
    """
    height, width = _check(images, size, mode, convention)
    # an exported network takes sizes of a range, which holds this one, maybe
    varies = any(isinstance(side, torch.SymInt) for side in images.shape[-2:])
    if not varies and images.shape[-2:] == (height, width):
        return images
    if mode == "nearest":
        return _nearest(images, height, width)
    if images.dtype != torch.uint8:
        antialias = convention == "antialias"
        return interpolate(images, height, width, mode, antialias=antialias).to(images.dtype)
    if convention == "antialias":
        return _antialiased_bytes(images, height, width, mode)
    if mode == "bilinear":
        return _bilinear_bytes(images, height, width)
    return _bicubic_bytes(images, height, width)


def check_images(images: Tensor, name: str = "images", channels: int | None = 3) -> None:
    """Refuse what is not a float batch `[B, C, H, W]`, without a look at its pixels."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {images.dtype}; "
            "idloss.resample.to_float turns uint8 images into [0, 1]"
        )
    if images.ndim != 4 or images.shape[1] != (channels or images.shape[1]):
        wanted = f"[B, {channels or 'C'}, H, W]"
        raise ValueError(f"{name} must be {wanted}, got {list(images.shape)}")


def has_values(images: Tensor) -> bool:
    """Whether pixels can be looked at: not while compiled, traced, mapped or faked."""
    return is_computed(images) and torch._C._functorch.peek_interpreter_stack() is None


def is_computed(images: Tensor) -> bool:
    """Whether there is arithmetic, of `torch.func` too: not while compiled, traced or faked."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or images.is_meta
        or type(images).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or is_in_torch_dispatch_mode()
    )


class ImageWatch:
    """Looks at images: on a CPU always, on a GPU, which it waits for, at calls 1, 2, 4, 8, ..."""

    def __init__(
        self, value_range: tuple[float, float] = (0.0, 1.0), *, margin: float = 0.25
    ) -> None:
        low, high = value_range
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
        self.value_range = value_range
        self.margin = margin * (high - low)  # SR and bicubic images overshoot
        self._calls: dict[str, int] = {}

    def complaint(self, images: Tensor, name: str, *, drawn_yet: bool = True) -> str | None:
        """Say what is wrong with the range of images `[B, C, H, W]`, if they are looked at now.

        Those of a network that still learns (`drawn_yet=False`) are judged from call 64 on.
        """
        if not has_values(images):
            return None
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        if (images.device.type != "cpu" and calls & (calls - 1)) or not images.numel():
            return None
        least, most = torch.stack(images.detach().float().aminmax()).tolist()
        low, high = self.value_range
        if not math.isfinite(least + most):
            return f"{name} holds NaN or infinity: so will the loss"
        if not drawn_yet and calls < 64:
            return None
        seen = f"{name} spans [{least:.3g}, {most:.3g}] and value_range is ({low:g}, {high:g})"
        if least < low - self.margin or most > high + self.margin:
            return f"{seen}: pass the value_range that the images are in"
        if high - low > 1.5 and least >= 0 and most <= 1:
            return f"{seen}: these look like [0, 1] images"
        return None

    def refuse(self, lr: Tensor, channels: int | None = 3) -> None:
        """Refuse what an SRNet for [0, 1] was surely not meant to get; NaN is for who trains."""
        check_images(lr, "lr", channels)
        complaint = self.complaint(lr, "lr")
        if complaint is not None and "spans" in complaint:
            seen = complaint.partition(" and value_range")[0]
            raise ValueError(f"{seen} and this network takes [0, 1]: divide by what white is")


def parse_size(text: str) -> Size:
    """Turn `7x6` into rows and columns; a ValueError for what is not of that form."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not rows x columns; write it as 7x6")
    return int(match[1]), int(match[2])


def to_uint8(images: Tensor, *, rounding: Rounding = "nearest") -> Tensor:
    """[0, 1] of any shape to 8-bit levels, clamped; the paper's code rounds SR to the `"floor"`."""
    if rounding not in get_args(Rounding):
        raise ValueError(did_you_mean("rounding", rounding, get_args(Rounding)))
    if not images.is_floating_point():
        raise TypeError(f"to_uint8 takes floating point images in [0, 1], got {images.dtype}")
    # low precision has too few bits to round 255 levels with
    levels = (images if images.dtype == torch.float64 else images.float()) * _LEVELS
    levels = levels.round() if rounding == "nearest" else levels.floor()
    return levels.clamp(0, _LEVELS).to(torch.uint8)


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn uint8 images of any shape into [0, 1]; a TypeError for others."""
    if images.dtype != torch.uint8:
        raise TypeError(f"to_float takes uint8 images, got {images.dtype}")
    return images.to(dtype) / _LEVELS


def _check(images: Tensor, size: Sequence[int], mode: str, convention: str) -> tuple[int, int]:
    if mode not in get_args(Mode):
        raise ValueError(did_you_mean("mode", mode, get_args(Mode)))
    if convention not in get_args(Convention):
        raise ValueError(did_you_mean("convention", convention, get_args(Convention)))
    if mode == "nearest" and convention == "antialias":
        raise ValueError("nearest has no antialiased form; use convention='cv2' or mode='bilinear'")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floating point or uint8, got {images.dtype}")
    if images.ndim < 3 or 0 in images.shape[-3:]:
        raise ValueError(f"images must be [..., C, H, W] with pixels, got {list(images.shape)}")
    if not isinstance(size, int) and any(isinstance(side, torch.SymInt) for side in size):
        return size[0], size[1]  # of an exported network: int() would be that of its example
    if isinstance(size, int) or len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"size must be (H, W), two positive whole numbers, got {size}")
    return int(size[0]), int(size[1])


def interpolate(images: Tensor, height: int, width: int, mode: Mode, *, antialias: bool) -> Tensor:
    """`F.interpolate` for any number of leading axes, in float32 or better."""
    exact = images if images.dtype in (torch.float32, torch.float64) else images.float()
    # it takes exactly one batch axis
    batch = exact if exact.ndim == 4 else exact.reshape(-1, *exact.shape[-3:])
    resampled = F.interpolate(
        batch, (height, width), mode=mode, align_corners=False, antialias=antialias
    )
    return resampled if exact.ndim == 4 else resampled.reshape(*images.shape[:-2], height, width)


def _antialiased_bytes(images: Tensor, height: int, width: int, mode: Mode) -> Tensor:
    """Pillow's uint8 resampling: columns first, 8 bits between the passes too, halves upwards."""
    exact = images
    for size in ((images.shape[-2], width), (height, width)):
        exact = (interpolate(exact, *size, mode, antialias=True) + 0.5).floor().clamp(0, _LEVELS)
    return exact.to(torch.uint8)


def _nearest(images: Tensor, height: int, width: int) -> Tensor:
    """INTER_NEAREST's rule, with its detour over a reciprocal: it decides at exact multiples."""
    for axis, size_out in ((-2, height), (-1, width)):
        size_in = images.shape[axis]
        step = 1.0 / (size_out / size_in)
        index = [min(int(place * step), size_in - 1) for place in range(size_out)]
        images = _pick(images, torch.tensor(index, device=images.device), axis)
    return images


def _pick(images: Tensor, index: Tensor, axis: int) -> Tensor:
    if axis == -2:
        return images.index_select(-2, index)
    # several times faster on a CPU than selecting columns
    return images.gather(-1, index.expand(*images.shape[:-1], -1))


def _taps(first: _Array, weights: _Array, size_in: int) -> _Taps:
    """Neighbours from `first` on, border pixels standing in for those beyond, and their weights."""
    places = (first + np.arange(len(weights))[:, None]).clip(0, size_in - 1)
    return places.astype(np.int64), weights


@lru_cache(maxsize=256)
def _bilinear_taps(size_in: int, size_out: int, *, weigh_border: bool) -> _Taps:
    """Taps of OpenCV's bilinear resize, with places in float32 and 11-bit weights as there."""
    # columns beyond the border take the border pixel alone; rows there (`weigh_border`) blend the
    # border row with itself, which is not the same in truncating arithmetic
    places = (np.arange(size_out) + 0.5) * (1.0 / (size_out / size_in)) - 0.5
    places = places.astype(np.float32)
    first = np.floor(places)
    fraction = places - first
    if not weigh_border:
        fraction[(first < 0) | (first >= size_in - 1)] = 0
    weights = np.rint(np.stack((1 - fraction, fraction)) * np.float32(_COEF_SCALE))
    return _taps(first, weights.astype(np.int32), size_in)


@lru_cache(maxsize=256)
def _bicubic_taps(size_in: int, size_out: int) -> _Taps:
    """Taps of the cubic of Keys (1981) with OpenCV's a, rounded to float32 once."""
    places = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(places)
    distance = np.abs(places - (first + np.arange(-1, 3)[:, None]))
    inside = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    outside = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance <= 1, inside, outside)
    return _taps(first - 1, weights.astype(np.float32), size_in)


def _products(images: Tensor, taps: _Taps, axis: int) -> tuple[Tensor, ...]:
    """Every tap's neighbours along an axis (-1 or -2), times their weights."""
    places, weights = (torch.from_numpy(array).to(images.device) for array in taps)
    picked = _pick(images, places.flatten(), axis).unflatten(axis, places.shape)
    weighted: Tensor = picked * (weights if axis == -1 else weights[..., None])
    return weighted.unbind(axis - 1)


def _bilinear_bytes(images: Tensor, height: int, width: int) -> Tensor:
    """OpenCV's uint8 bilinear in integers, columns first, its truncations included."""
    columns = _bilinear_taps(images.shape[-1], width, weigh_border=False)
    rows = _bilinear_taps(images.shape[-2], height, weigh_border=True)
    near, far = _products(images, columns, -1)
    near, far = _products((near + far) >> 4, rows, -2)
    return (((near >> 16) + (far >> 16) + 2) >> 2).to(torch.uint8)


def _bicubic_bytes(images: Tensor, height: int, width: int) -> Tensor:
    """OpenCV's uint8 bicubic in float32, columns first, taps two and two: found by comparing."""
    exact = images
    for axis, size in ((-1, width), (-2, height)):
        one, two, three, four = _products(exact, _bicubic_taps(images.shape[axis], size), axis)
        exact = (one + two) + (three + four)
    return exact.round().clamp(0, _LEVELS).to(torch.uint8)
