"""JPEG on tensors: what comes back from libjpeg, to the last bit, without going through it.

Baseline JPEG loses information where colours are rounded, chroma is averaged and coefficients are
quantised; the rest is lossless and left out. All of it is sums of integers, so the result depends
neither on the device nor on what else is in the batch. Files named below are libjpeg-turbo's, which
is what Pillow, OpenCV and torchvision call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from idloss.degradation.base import check_faces
from idloss.errors import did_you_mean

Subsampling = Literal["4:2:0", "4:4:4"]

# ITU-T T.81 (1992), Annex K, tables K.1 (luma) and K.2 (chroma); jcparam.c
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99,) * 8,
    (99,) * 8,
    (99,) * 8,
    (99,) * 8,
)
# jfdctint.c and jidctint.c: the cosine transform in 13 bits, sqrt(8) times the orthonormal one.
# These are the left halves of its rows; right halves mirror them, with the sign of (-1)^row. They
# are sums of that file's constants: rounding the cosines instead is one off in ten places.
_COSINES = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)
# jccolor.c and jdcolor.c: 16-bit fractions, ITU-R BT.601 as in JFIF 1.02. Their sums stay below
# 2^24, so that float32 is exact.
_COLOUR_BITS = 16
_FROM_RGB = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
_RED_OF_CR, _GREEN_OF_CB, _GREEN_OF_CR, _BLUE_OF_CB = 91881, -22554, -46802, 116130
_CENTRE = 128
_LEVELS = 255


def jpeg(images: Tensor, quality: Sequence[int], *, subsampling: Subsampling = "4:2:0") -> Tensor:
    """Compress and decompress images.

    Equal to Pillow's `save(quality=..., subsampling=...)` and back, for images of more than four
    columns.

    Args:
        images: uint8 RGB `[B, 3, H, W]`.
        quality: Of each image, 1 to 100, as libjpeg scales it.
        subsampling: Chroma at half the rows and columns (`"4:2:0"`) or at all (`"4:4:4"`).

    Returns:
        uint8 RGB `[B, 3, H, W]`.

    Raises:
        TypeError: The images are not uint8.
        ValueError: They are not `[B, 3, H, W]`, the subsampling is unknown, a quality is out of
            range, or there is not one for each image.
    """
    check_faces(images)
    if subsampling not in get_args(Subsampling):
        raise ValueError(did_you_mean("subsampling", subsampling, get_args(Subsampling)))
    if len(quality) != len(images):
        raise ValueError(f"{len(quality)} qualities for {len(images)} images: give one for each")
    for one in quality:
        if not 1 <= one <= 100:
            raise ValueError(f"JPEG quality must be from 1 to 100, got {one}")
    height, width = images.shape[-2:]
    luma_table, chroma_table = _tables(quality).to(images.device).unbind()
    luma, chroma = _from_rgb(images.float())
    luma = _code(luma, luma_table)
    if subsampling == "4:4:4":
        chroma = _code(chroma, chroma_table)
    else:
        chroma = _code(_halve(chroma), chroma_table)[..., : (width + 1) // 2]
        chroma = _double(chroma)[..., :height, :width]
    return _to_rgb(luma, chroma)


def _tables(quality: Sequence[int]) -> Tensor:
    """Quantisation tables of luma and chroma, float32 `[2, B, 8, 8]` (jcparam.c)."""
    asked = torch.tensor(quality)
    scale = torch.where(asked < 50, 5000 // asked, 200 - 2 * asked)
    standard = torch.tensor((_LUMA, _CHROMA))[:, None]
    scaled = (standard * scale[:, None, None] + 50) // 100
    return scaled.clamp(1, _LEVELS).float()


def _from_rgb(images: Tensor) -> tuple[Tensor, Tensor]:
    """Luma `[B, 1, H, W]` and chroma `[B, 2, H, W]`, whole levels."""
    red, green, blue = (images * 2**-_COLOUR_BITS).split(1, dim=1)
    luma, *chroma = (r * red + g * green + b * blue for r, g, b in _FROM_RGB)
    # halves go down in chroma: up, the highest would be 256
    centred = torch.cat(chroma, dim=1) + (_CENTRE + 0.5 - 2**-_COLOUR_BITS)
    return (luma + 0.5).floor_(), centred.floor_()


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    cb, cr = ((chroma - _CENTRE) * 2**-_COLOUR_BITS).split(1, dim=1)
    green = cb * _GREEN_OF_CB + cr * _GREEN_OF_CR
    offsets = torch.cat((cr * _RED_OF_CR, green, cb * _BLUE_OF_CB), dim=1).add_(0.5).floor_()
    return (luma + offsets).clamp_(0, _LEVELS).to(torch.uint8)


def _halve(chroma: Tensor) -> Tensor:
    """Means of two by two, halves rounded down and up in turn (jcsample.c, h2v2_downsample)."""
    chroma = _pad(chroma, rows=2, columns=16)
    sums: Tensor = chroma.unflatten(-1, (-1, 2)).sum(-1).unflatten(-2, (-1, 2)).sum(-2)
    bias = torch.tensor([1.0, 2.0], device=chroma.device).repeat(sums.shape[-1] // 2)
    return (sums + bias).mul_(0.25).floor_()


def _double(chroma: Tensor) -> Tensor:
    """Triangle filter to twice the size (jdsample.c, h2v2_fancy_upsample)."""
    near = chroma * 3
    padded = F.pad(chroma, (0, 0, 1, 1), mode="replicate")
    rows = torch.stack((near + padded[..., :-2, :], near + padded[..., 2:, :]), dim=-2)
    rows = rows.flatten(-3, -2)
    near = rows * 3
    padded = F.pad(rows, (1, 1, 0, 0), mode="replicate")
    left = (near + padded[..., :-2]).add_(8).mul_(2**-4).floor_()
    right = (near + padded[..., 2:]).add_(7).mul_(2**-4).floor_()
    return torch.stack((left, right), dim=-1).flatten(-2)


def _code(planes: Tensor, tables: Tensor) -> Tensor:
    """Transform, quantise, and back: `[B, C, H, W]` with tables `[B, 8, 8]`."""
    height, width = planes.shape[-2:]
    # beyond float32's 24 bits, but exact in float64, which MPS lacks: there a rare coefficient errs
    exact = torch.float32 if planes.device.type == "mps" else torch.float64
    levels = _pad(planes, rows=8, columns=8).to(exact).sub_(_CENTRE)
    cosines = _cosines().to(levels)
    spectrum = _along_columns(_along_rows(levels, cosines.T, 11), cosines, 15)
    blocks = spectrum.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))
    # jcdctmgr.c divides by 8 times the table, halves away from zero
    step = tables[:, None, None, :, None, :].to(exact)
    whole = blocks.abs().add_(4 * step).div_(8 * step).floor_().copysign_(blocks)
    spectrum = whole.mul_(step).flatten(-2).flatten(-3, -2)
    levels = _along_rows(_along_columns(spectrum, cosines.T, 11), cosines, 18)
    return levels[..., :height, :width].float().add_(_CENTRE).clamp_(0, _LEVELS)


def _cosines() -> Tensor:
    left = np.array(_COSINES)
    signs = np.where(np.arange(8) % 2, -1, 1)[:, None]
    return torch.from_numpy(np.concatenate((left, signs * left[:, ::-1]), axis=1))


def _along_rows(planes: Tensor, matrix: Tensor, bits: int) -> Tensor:
    """Transform each eight neighbours in a row; drop some bits, halves upwards."""
    done: Tensor = planes.unflatten(-1, (-1, 8)) @ (matrix * 2**-bits)
    return done.add_(0.5).floor_().flatten(-2)


def _along_columns(planes: Tensor, matrix: Tensor, bits: int) -> Tensor:
    done: Tensor = (matrix * 2**-bits) @ planes.unflatten(-2, (-1, 8))
    return done.add_(0.5).floor_().flatten(-3, -2)


def _pad(planes: Tensor, *, rows: int, columns: int) -> Tensor:
    """Repeat the last row and column up to a multiple."""
    height, width = planes.shape[-2:]
    return F.pad(planes, (0, -width % columns, 0, -height % rows), mode="replicate")
