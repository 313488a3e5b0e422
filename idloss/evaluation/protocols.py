"""What each protocol fixes: how probes are degraded, how SR reaches the FNet, how pairs are judged.

* `paper`: the released code of the paper, number for number (johnnysclai/SR_LRFR,
  src/lfw_verification.py and src/common/util.py). Its row called "Bicubic" feeds the FNet a
  *bilinear* enlargement, because `cv2.resize(img, size, cv2.INTER_CUBIC)` passes the flag as the
  destination; here that row is the `bilinear` method and `bicubic` is true bicubic.
* `sphereface`: the same images, judged as SphereFace's own evaluation does (wy1iu/sphereface,
  test/code/evaluation.m).
* `standard`: what the field does now: SR is an 8-bit picture, rounded, whatever its size; the two
  views' embeddings are added; pairs are judged as insightface does (deepinsight/insightface,
  recognition/arcface_torch/eval/verification.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from idloss.errors import did_you_mean
from idloss.evaluation.verification import (
    PAPER_RULE,
    SPHEREFACE_RULE,
    STANDARD_RULE,
    ThresholdRule,
)
from idloss.resample import Convention, Mode, Rounding, resize, to_float, to_uint8


@dataclass(frozen=True)
class Protocol:
    """Everything that a protocol fixes.

    Attributes:
        name: Its name.
        rule: How pairs are turned into an accuracy.
        down_mode: How an HR crop becomes a probe, on 8-bit images.
        up_mode: How SR reaches the FNet's crop size, on 8-bit images.
        convention: The resampler's convention, down and up.
        rounding: How SR becomes 8-bit.
        keep_exact_size: SR that has the FNet's crop size already is used as it is, not rounded.
        flip: How the embeddings of a crop and of its mirror image become one.
        source: Where the protocol is from.
    """

    name: str
    rule: ThresholdRule
    down_mode: Mode
    up_mode: Mode
    convention: Convention
    rounding: Rounding
    keep_exact_size: bool
    flip: Literal["concat", "sum"]
    source: str

    def describe(self) -> dict[str, Any]:
        """The protocol as plain values, for a result file."""
        plain = asdict(self)
        grid = self.rule.grid()
        plain["rule"]["grid"] = {
            "first": float(grid[0]),
            "last": float(grid[-1]),
            "count": int(grid.size),
        }
        return plain


_PAPER = Protocol(
    name="paper",
    rule=PAPER_RULE,
    down_mode="bicubic",
    up_mode="bicubic",
    convention="cv2",
    rounding="floor",
    keep_exact_size=True,
    flip="concat",
    source="github.com/johnnysclai/SR_LRFR at 4cf3b4bc79bcf145df1b579ba2010f709e5470b4",
)
_SPHEREFACE = replace(
    _PAPER,
    name="sphereface",
    rule=SPHEREFACE_RULE,
    source="github.com/wy1iu/sphereface at f20b130a6e080bb51d2e46a9e157686df622bef3",
)
_STANDARD = replace(
    _PAPER,
    name="standard",
    rule=STANDARD_RULE,
    rounding="nearest",
    keep_exact_size=False,
    flip="sum",
    source="github.com/deepinsight/insightface at 166d74309f060d23d002dc60308bbf870d0ab753",
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {protocol.name: protocol for protocol in (_PAPER, _SPHEREFACE, _STANDARD)}
)

# The rows without an SRNet. The paper's "Bicubic" is the first (see the top of this file).
INTERPOLATIONS: tuple[Mode, ...] = ("bilinear", "bicubic")
PAPER_BICUBIC_ROW = "bilinear"


def get_protocol(name: str | Protocol) -> Protocol:
    """Look a protocol up by name.

    Args:
        name: `"paper"`, `"sphereface"`, `"standard"`, or a protocol, which is given back.

    Returns:
        The protocol.

    Raises:
        ValueError: There is none of that name.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise ValueError(did_you_mean("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


def prepare_probe(crops: Tensor, size: Sequence[int], protocol: str | Protocol) -> Tensor:
    """Degrade HR crops to LR probes.

    Mirror a probe after this step, not before: the paper's flipped view is the mirrored LR image,
    super-resolved on its own.

    Args:
        crops: HR crops `[B, 3, H, W]`, uint8 RGB.
        size: Rows and columns of the probes, `(H, W)`, such as `(7, 6)`.
        protocol: Protocol or its name.

    Returns:
        Probes `[B, 3, *size]`, uint8; the crops themselves where they have the size already.

    Raises:
        TypeError: The crops are not uint8.
        ValueError: Unknown protocol or a bad size.
    """
    fixed = get_protocol(protocol)
    _require_uint8(crops, "crops")
    return resize(crops, size, mode=fixed.down_mode, convention=fixed.convention)


def interpolate_probe(
    probes: Tensor, size: Sequence[int], mode: Mode, protocol: str | Protocol
) -> Tensor:
    """Enlarge probes without an SRNet: the rows `bilinear` and `bicubic`.

    Args:
        probes: LR probes `[B, 3, h, w]`, uint8 RGB.
        size: Rows and columns of the FNet's crop, `(H, W)`.
        mode: `"bilinear"` (the paper's "Bicubic" row) or `"bicubic"`.
        protocol: Protocol or its name.

    Returns:
        What the FNet is shown, `[B, 3, *size]`, float32 RGB in [0, 1], each value a multiple of
        1/255.

    Raises:
        TypeError: The probes are not uint8.
        ValueError: Unknown protocol or mode, or a bad size.
    """
    fixed = get_protocol(protocol)
    _require_uint8(probes, "probes")
    return to_float(resize(probes, size, mode=mode, convention=fixed.convention))


def to_fnet_input(sr: Tensor, size: Sequence[int], protocol: str | Protocol) -> Tensor:
    """Bring SR to the FNet's crop size as the protocol does at test.

    In `paper` and `sphereface`, SR of the right size passes untouched; other sizes are cut down to
    8 bits (`floor(255 x)`, not rounded) and enlarged with 8-bit bicubic. The released code lets
    values outside the range wrap round, which its tanh keeps from happening; here they are clamped.

    Args:
        sr: SR images `[B, 3, h, w]`, float RGB in [0, 1].
        size: Rows and columns of the FNet's crop, `(H, W)`.
        protocol: Protocol or its name.

    Returns:
        What the FNet is shown, `[B, 3, *size]`, float RGB in [0, 1], before its normalisation.

    Raises:
        TypeError: SR is not floating point.
        ValueError: Unknown protocol or a bad size.
    """
    fixed = get_protocol(protocol)
    if fixed.keep_exact_size and tuple(sr.shape[-2:]) == tuple(size):
        return sr
    levels = to_uint8(sr, rounding=fixed.rounding)
    return to_float(resize(levels, size, mode=fixed.up_mode, convention=fixed.convention))


def fuse_views(embeddings: Tensor, mirrored: Tensor, protocol: str | Protocol) -> Tensor:
    """Make one embedding of a crop's and its mirror image's.

    Args:
        embeddings: Embeddings of the crops, `[B, D]`.
        mirrored: Embeddings of the mirrored crops, `[B, D]`.
        protocol: Protocol or its name.

    Returns:
        `[B, 2 * D]` where the protocol concatenates, `[B, D]` where it adds.

    Raises:
        ValueError: Unknown protocol, or the shapes differ.
    """
    fixed = get_protocol(protocol)
    if embeddings.shape != mirrored.shape:
        raise ValueError(
            f"both views need one shape, got {list(embeddings.shape)} and {list(mirrored.shape)}"
        )
    if fixed.flip == "concat":
        return torch.cat((embeddings, mirrored), dim=1)
    return embeddings + mirrored


def _require_uint8(images: Tensor, what: str) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(
            f"{what} must be uint8, got {images.dtype}: protocols resample 8-bit images, turn "
            "float ones into them with idloss.resample.to_uint8"
        )
