"""What a draw decided for each face, and carrying it out on a batch of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from idloss.degradation.filters import KERNEL_BITS, Array, blur, fixed_point, resize_each
from idloss.degradation.jpeg import Subsampling, jpeg

GRID = 16
"""A JPEG repeats itself every 16 pixels with 4:2:0, every 8 with 4:4:4."""
_LEVELS = 255


class JpegFile(NamedTuple):
    """A JPEG that a face is in.

    Attributes:
        quality: 1 to 100.
        subsampling: Of its chroma.
        offset: Row and column where the face begins in the grid of blocks, below `GRID`.
    """

    quality: int
    subsampling: Subsampling
    offset: tuple[int, int]


class Resizing(NamedTuple):
    """From one size to another.

    Attributes:
        size: Rows and columns after it.
        rows: What `resize_weights` gave for the rows.
        columns: And for the columns.
    """

    size: tuple[int, int]
    rows: Array
    columns: Array


class Round(NamedTuple):
    """One round of blur, resizing, noise and JPEG.

    Attributes:
        kernel: Of the blur, `[k, k]`, adding up to 1.
        resizing: To the size of this round.
        normals: Standard normal numbers, float32 `[3, *resizing.size]`.
        variance: Of the noise in squared levels: a constant, and a part for each level of
            brightness.
        file: None for no JPEG.
    """

    kernel: Array
    resizing: Resizing
    normals: Array
    variance: tuple[float, float]
    file: JpegFile | None


class Fate(NamedTuple):
    """All that is going to happen to a face.

    Attributes:
        rounds: One after the other.
        resizing: The last reduction.
        kernel: Of the filter after it, `[k, k]`, adding up to 1.
        file: The JPEG after that; None for none.
    """

    rounds: tuple[Round, ...]
    resizing: Resizing
    kernel: Array
    file: JpegFile | None


def degrade(images: Tensor, fates: Sequence[Fate]) -> Tensor:
    """Let happen to faces what was drawn for them.

    Images have 8 bits between all steps. Those of unlike sizes lie in the top left corners of one
    batch.

    Args:
        images: uint8 RGB `[B, 3, H, W]`.
        fates: One for each, all with as many rounds and one last size.

    Returns:
        uint8 RGB `[B, 3, *size]`.
    """
    for rounds in zip(*(fate.rounds for fate in fates), strict=True):
        sizes = [one.resizing.size for one in rounds]
        normals = _stack(one.normals for one in rounds)
        variance = torch.tensor([one.variance for one in rounds])
        images = _filter(images, [one.kernel for one in rounds])
        images = _resize(images, [one.resizing for one in rounds])
        images = add_noise(images, *_ship(images.device, normals, variance))
        images = _compress(images, sizes, [one.file for one in rounds])
    images = _resize(images, [fate.resizing for fate in fates])
    images = _filter(images, [fate.kernel for fate in fates])
    return _compress(images, [fate.resizing.size for fate in fates], [fate.file for fate in fates])


def add_noise(images: Tensor, normals: Tensor, variance: Tensor) -> Tensor:
    """Add noise to each image, as strong as it asks for.

    Args:
        images: uint8 `[B, C, H, W]`.
        normals: Standard normal numbers, float32 `[B, C, H, W]`.
        variance: A constant, and a part for each level of brightness, in squared levels `[B, 2]`.

    Returns:
        uint8 `[B, C, H, W]`.
    """
    levels = images.float()
    constant, rising = variance[:, :, None, None, None].unbind(1)
    noisy = levels + normals * (constant + rising * levels).sqrt()
    return noisy.round_().clamp_(0, _LEVELS).to(torch.uint8)


def _filter(images: Tensor, kernels: Sequence[Array]) -> Tensor:
    stacked = np.stack(kernels)
    weights = fixed_point(stacked.reshape(len(stacked), -1), KERNEL_BITS).reshape(stacked.shape)
    return blur(images, *_ship(images.device, torch.from_numpy(weights)))


def _resize(images: Tensor, resizings: Sequence[Resizing]) -> Tensor:
    height, width = images.shape[-2:]
    rows = _stack((one.rows for one in resizings), last=height)
    columns = _stack((one.columns for one in resizings), last=width)
    return resize_each(images, *_ship(images.device, rows, columns))


def _compress(
    images: Tensor, sizes: Sequence[tuple[int, int]], files: Sequence[JpegFile | None]
) -> Tensor:
    """JPEG for those that have a file; then edges are repeated beyond each image's size."""
    height, width = images.shape[-2:]
    offsets = [(0, 0) if file is None else file.offset for file in files]
    offset, size = _ship(images.device, torch.tensor(offsets), torch.tensor(sizes))
    last = size - 1
    framed = _window(images, (height + GRID, width + GRID), -offset, torch.zeros_like(last), last)
    for subsampling in ("4:2:0", "4:4:4"):
        chosen = [(i, file) for i, file in enumerate(files) if file and file[1] == subsampling]
        if chosen:
            index = torch.tensor([i for i, _ in chosen], device=images.device)
            quality = [file.quality for _, file in chosen]
            framed[index] = jpeg(framed[index], quality, subsampling=subsampling)
    return _window(framed, (height, width), offset, offset, last + offset)


def _window(
    images: Tensor, shape: tuple[int, int], start: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """Cut a window of each image; what lies beyond low or high is repeated from there.

    Args:
        images: `[B, C, H, W]`.
        shape: Rows and columns of the windows.
        start: Row and column where each begins, `[B, 2]`.
        low: First row and column that there is, `[B, 2]`.
        high: Last row and column that there is, `[B, 2]`.

    Returns:
        `[B, C, *shape]`.
    """
    places = [
        (torch.arange(length, device=images.device) + start[:, axis, None])
        .maximum(low[:, axis, None])
        .minimum(high[:, axis, None])
        for axis, length in enumerate(shape)
    ]
    index = places[0][:, None, :, None] * images.shape[-1] + places[1][:, None, None, :]
    picked = images.flatten(2).gather(2, index.flatten(2).expand(-1, images.shape[1], -1))
    return picked.view(*images.shape[:2], *shape)


def _stack(arrays: Iterable[Array], last: int = 0) -> Tensor:
    """One batch of arrays of like rank, zeros after the ends of the smaller ones.

    Args:
        arrays: Of any shapes.
        last: What the last axis is to measure at least.

    Returns:
        float32 `[B, ...]`, on the CPU.
    """
    parts = list(arrays)
    shape = [max(lengths) for lengths in zip(*(part.shape for part in parts), strict=True)]
    stacked = np.zeros((len(parts), *shape[:-1], max(shape[-1], last)), np.float32)
    for target, part in zip(stacked, parts, strict=True):
        target[tuple(slice(length) for length in part.shape)] = part
    return torch.from_numpy(stacked)


def _ship(device: torch.device, *tensors: Tensor) -> Sequence[Tensor]:
    """Bring tensors of one type to a device in one transfer."""
    if device.type == "cpu":
        return tensors
    flat = torch.cat([one.flatten() for one in tensors]).to(device)
    parts = flat.split([one.numel() for one in tensors])
    return [part.view(one.shape) for part, one in zip(parts, tensors, strict=True)]
