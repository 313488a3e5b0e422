"""Linear filters, another one for each face of a batch, in exact arithmetic.

Images have 8 bits and weights are multiples of a small power of two, so that no sum needs more than
the 24 bits of float32: it is exact in whatever order a device adds. What becomes of a face then
depends to the last bit on the face and its filter alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from idloss.resample import Convention, Mode, resize

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

KERNEL_BITS = 14
"""Of the weights of a kernel: with 8 of the image and room for weights that add up to 4 or less."""
RESIZE_BITS = 10
"""Of the weights of `resize_each`: TF32 holds 11, so that its products are exact as well."""
_LEVELS = 255


def gaussian_kernel(
    sigma: tuple[float, float], angle: float = 0.0, shape: float = 1.0, *, size: int
) -> Array:
    """Weigh a neighbourhood by a generalised Gaussian.

    Args:
        sigma: Standard deviations along and across the angle, pixels, above zero.
        angle: From the horizontal, radians.
        shape: Exponent beta of Real-ESRGAN (arXiv 2107.10833), section 3.1: 1 is the Gaussian, more
            has a flat top, less long tails.
        size: Rows and columns, odd.

    Returns:
        float64 `[size, size]`, with sum 1.
    """
    x, y = _neighbours(size)
    along = (np.cos(angle) * x + np.sin(angle) * y) / sigma[0]
    across = (np.cos(angle) * y - np.sin(angle) * x) / sigma[1]
    weights = np.exp(-0.5 * (along**2 + across**2) ** shape)
    return np.asarray(weights / weights.sum())


def sinc_kernel(cutoff: float, *, size: int) -> Array:
    """Cut off all frequencies above one: edges ring, as after sharpening.

    Args:
        cutoff: Angular frequency, above 0, at most pi radians a pixel.
        size: Rows and columns, odd.

    Returns:
        float64 `[size, size]`, with sum 1 (Real-ESRGAN, section 3.3).
    """
    distance = torch.from_numpy(np.hypot(*_neighbours(size)))
    ringing: Tensor = torch.special.bessel_j1(cutoff * distance) / distance
    ringing[size // 2, size // 2] = cutoff / 2  # its limit
    return np.asarray(ringing / ringing.sum())


def _neighbours(size: int) -> tuple[Array, Array]:
    places = np.arange(size) - size // 2
    return places[None, :], places[:, None]


def fixed_point(weights: Array, bits: int) -> Array:
    """Round weights to multiples of `2^-bits` that add up to 1: no image gets brighter or darker.

    Args:
        weights: `[..., n]`, adding up to 1 over n.
        bits: How many.

    Returns:
        float32 `[..., n]`; the largest of each n takes the difference.
    """
    whole = np.rint(weights * (1 << bits))
    largest = whole.argmax(-1)[..., None]
    missing = (1 << bits) - whole.sum(-1, keepdims=True)
    np.put_along_axis(whole, largest, np.take_along_axis(whole, largest, -1) + missing, -1)
    return np.asarray(whole / (1 << bits), np.float32)


@lru_cache(maxsize=4096)
def resize_weights(size_in: int, size_out: int, mode: Mode, convention: Convention) -> Array:
    """What `idloss.resample.resize` does along one axis, as a matrix for `resize_each`.

    Args:
        size_in: Pixels before.
        size_out: Pixels after.
        mode: See `resize`.
        convention: See `resize`.

    Returns:
        float32 `[size_out, size_in]`, of `RESIZE_BITS` bits, each row adding up to 1.
    """
    identity = torch.eye(size_in, dtype=torch.float64)[None]
    weights = resize(identity, (size_out, size_in), mode=mode, convention=convention)[0]
    return fixed_point(weights.numpy(), RESIZE_BITS)


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Filter each image with its own kernel; edges are repeated.

    Args:
        images: uint8 `[B, C, H, W]`.
        kernels: float32 `[B, k, k]`, k odd, of `KERNEL_BITS` bits.

    Returns:
        uint8 `[B, C, H, W]`.
    """
    count, channels, height, width = images.shape
    edge = kernels.shape[-1] // 2
    padded = F.pad(images.float(), (edge,) * 4, mode="replicate")
    # one group for each plane: on CUDA that takes torch's own kernel, which never rounds to TF32
    planes = padded.reshape(1, count * channels, *padded.shape[-2:])
    weights = kernels[:, None].repeat_interleave(channels, dim=0)
    sums = F.conv2d(planes, weights, groups=count * channels)
    return _to_levels(sums).view(count, channels, height, width)


def resize_each(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample each image with its own weights, columns first, with 8 bits between as Pillow has.

    Args:
        images: uint8 `[B, C, H, W]`.
        rows: What `resize_weights` gave, `[B, h, H]`; rows of zeros give black.
        columns: And for the columns, `[B, w, W]`.

    Returns:
        uint8 `[B, C, h, w]`.
    """
    wide = (images.float() @ columns.mT[:, None]).round_().clamp_(0, _LEVELS)
    return _to_levels(rows[:, None] @ wide)


def _to_levels(sums: Tensor) -> Tensor:
    return sums.round_().clamp_(0, _LEVELS).to(torch.uint8)
