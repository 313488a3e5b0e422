"""EDSR: residual blocks without batch norm and sub-pixel up-sampling.

Lim et al., "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPRW 2017; the
16x64 and 32x256 networks of Lai et al. (ICIP 2019), section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from idloss.registry import register_srnet
from idloss.resample import ImageWatch
from idloss.weights import GitHubBlob, HubFile, ManualFile, Weights, build_model, register_weights
from idloss.weights.loading import (
    OURS,
    StateDict,
    count_indices,
    layer_keys,
    rename_keys,
    reverse_input,
    reverse_output,
)
from idloss.weights.sources import Source, ZooFile

SCALES = (2, 4, 8)
"""Factors that stages of x2 sub-pixel up-sampling can make."""

OFFICIAL = {"mean": (0.4488, 0.4371, 0.4040), "std": 1 / 255, "tanh": False}
"""Arguments with which `EDSR` is the one of EDSR-PyTorch: DIV2K's mean on 0-255, no tanh."""

SUPER_IMAGE = {"mean": 0.0, "std": 1.0, "tanh": False, "res_scale": 1.0}
"""Those for eugenesiow/super-image: its mean shift is built but never called, on [0, 1] images."""


_FACES = (
    "10,605 faces of 1,072 people of CelebA and 3,917 people of All-Age-Faces, none of them in LFW"
)


class EDSR(nn.Module):
    """EDSR from RGB [0, 1] to RGB [0, 1].

    With the defaults it is the network of Lai et al. as released: [-1, 1] inside and a tanh at
    the end, so that the output cannot leave [0, 1]. `EDSR(..., **OFFICIAL)` is the original,
    whose output is not clamped.

    Args:
        depth: Residual blocks.
        width: Filters of every layer.
        scale: 2, 4 or 8.
        res_scale: Factor of a block's residual; 0.1 in the released code, 1 in the original
            16x64 network.
        in_chans: Channels of the image.
        mean: Subtracted from the image, and added to the output; one number or one per channel.
        std: Divided by, after that, and multiplied with at the output; likewise.
        tanh: Bound the output, before `mean` and `std` are undone.

    Raises:
        ValueError: If `scale` is not 2, 4 or 8.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 64,
        scale: int = 4,
        res_scale: float = 0.1,
        in_chans: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        tanh: bool = True,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"EDSR scales by {', '.join(map(str, SCALES))}, got scale={scale}")
        self.scale = scale
        self.in_chans = in_chans
        # What timm's tools ask of any model: no classifier, and a width.
        self.num_classes = 0
        self.num_features = width
        self.tanh = tanh
        self.head = nn.Conv2d(in_chans, width, 3, padding=1)
        self.body = nn.Sequential(*(_ResidualBlock(width, res_scale) for _ in range(depth)))
        self.body_end = nn.Conv2d(width, width, 3, padding=1)
        self.upsample = nn.ModuleList(
            nn.Conv2d(width, 4 * width, 3, padding=1) for _ in range(scale.bit_length() - 1)
        )
        self.tail = nn.Conv2d(width, in_chans, 3, padding=1)
        self.grad_checkpointing = False
        # Arguments, not buffers: to_empty() loses those, mixed precision leaves them in float32
        self.mean, self.std = _per_channel(mean, in_chans), _per_channel(std, in_chans)
        self._watch = ImageWatch(margin=1.0)  # bicubic LR and noise may leave [0, 1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, as for any model of timm's."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to `[B, 3, scale * H, scale * W]`, likewise if `tanh`."""
        self._watch.refuse(x, self.in_chans)
        mean, std = _to_meet(x, self.mean), _to_meet(x, self.std)
        x = self.head((x - mean) / std)
        if self.grad_checkpointing:
            x = x + self.body_end(checkpoint_seq(self.body, x))
        else:
            x = x + self.body_end(self.body(x))
        for convolution in self.upsample:
            x = F.pixel_shuffle(convolution(x), 2)
        x = self.tail(x)
        if self.tanh:
            x = torch.tanh(x)
        return x * std + mean


class _ResidualBlock(nn.Module):
    """`x + res_scale * conv(relu(conv(x)))`."""

    def __init__(self, width: int, res_scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(F.relu(self.conv1(x)))
        return x + residual * self.res_scale


def _per_channel(value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    if len(values) not in (1, channels):
        raise ValueError(f"mean and std are one number or {channels}, got {value}")
    return tuple(float(one) for one in values)


def _to_meet(x: Tensor, values: tuple[float, ...]) -> Tensor | float:
    """One number, or one per channel of `[B, C, H, W]`, in the precision of `x`."""
    return values[0] if len(values) == 1 else x.new_tensor(values).view(1, -1, 1, 1)


def edsr_released(state_dict: StateDict) -> dict[str, Tensor]:
    """An EDSR of johnnysclai/SR_LRFR, BGR in and out, to `EDSR` with `mean=0.5, std=0.5`."""
    names = layer_keys("conv1", "head") | layer_keys("conv2", "body_end")
    for block in range(count_indices(state_dict, r"res_blocks\.(\d+)\.")):
        names |= layer_keys(f"res_blocks.{block}.residual.0", f"body.{block}.conv1")
        names |= layer_keys(f"res_blocks.{block}.residual.2", f"body.{block}.conv2")
    for stage in range(count_indices(state_dict, r"upsampler\.(\d+)\.")):
        names |= layer_keys(f"upsampler.{stage}.conv", f"upsample.{stage}")
    names |= layer_keys("conv3", "tail")
    adapted = rename_keys(state_dict, names, "EDSR of johnnysclai/SR_LRFR")
    return reverse_output(reverse_input(adapted, "head"), "tail")


def edsr_official(state_dict: StateDict) -> dict[str, Tensor]:
    """An EDSR of sanghyun-son/EDSR-PyTorch (once thstkdgus35) to `EDSR` with `**OFFICIAL`."""
    depth = count_indices(state_dict, r"body\.(\d+)\.body\.")
    names = layer_keys("head.0", "head") | layer_keys(f"body.{depth}", "body_end")
    for block in range(depth):
        names |= layer_keys(f"body.{block}.body.0", f"body.{block}.conv1")
        names |= layer_keys(f"body.{block}.body.2", f"body.{block}.conv2")
    # A pixel shuffle without weights sits between the convolutions of the up-sampler.
    for stage in range(count_indices(state_dict, r"tail\.0\.(\d+)\.")):
        names |= layer_keys(f"tail.0.{2 * stage}", f"upsample.{stage}")
    names |= layer_keys("tail.1", "tail")
    return rename_keys(
        state_dict, names, "EDSR of EDSR-PyTorch", dropped=("sub_mean.", "add_mean.")
    )


def _ours(folder: str, sha256: str, training_data: str = _FACES) -> Weights:
    """A network of our own."""
    return Weights(ZooFile(folder, sha256), training_data=training_data, **OURS)


def _released(stem: str, first: str, second: str) -> Weights:
    """A network of the authors' repository: one 7z, cut in two."""
    return Weights(
        source=GitHubBlob(
            repo="johnnysclai/SR_LRFR",
            commit="4cf3b4bc79bcf145df1b579ba2010f709e5470b4",
            parts=(
                (f"pretrained/{stem}.7z.001", first),
                (f"pretrained/{stem}.7z.002", second),
            ),
            member=f"{stem}.pth",
        ),
        licence="none given: download from the origin, do not redistribute",
        training_data="CelebA in the wild, aligned to 112x96",
        adapter=edsr_released,
    )


_EDSR = {"paper_name": "Enhanced Deep Residual Networks for Single Image Super-Resolution"}


def _div2k(source: Source, licence: str, trained_by: str) -> Weights:
    """A network of EDSR-PyTorch, or of super-image, which keeps its keys."""
    return Weights(source, licence, "DIV2K", edsr_official, trained_by=trained_by, cfg=_EDSR)


def _official(filename: str) -> Weights:
    """A network of EDSR-PyTorch; what is left of its host is the file's name."""
    source = ManualFile(
        filename=filename,
        url=f"https://cv.snu.ac.kr/research/EDSR/models/{filename}",
        how="Its host is reported dead; a copy is right if its SHA-256 begins with the eight hex "
        "digits in its name.",
    )
    return _div2k(source, "mit", "Lim et al. (EDSR-PyTorch).")


def _super_image(source: Source) -> Weights:
    """A network of eugenesiow/super-image."""
    return _div2k(source, "apache-2.0", "Eugene Siow (super-image).")


default_cfgs = register_weights(
    {
        "edsr16_64.celeba_aaf": _ours(
            "edsr16_64", "822e88e114d2888172dd2d6ba3f0f16367376ad8f70f0feac8abc059eae04c9d"
        ),
        "edsr16_64_id.celeba_aaf": _ours(
            "edsr16_64_id", "9625527386fdbb92b7765b999250a42e8c5157a4ac90c1cd3879a4aab8e029d4"
        ),
        "edsr16_64_id.celeba_aaf_mobilefacenet": _ours(
            "edsr16_64_id.celeba_aaf_mobilefacenet",
            "3879e093ed9fbccd81c88bc64d14ba83a4f6a92aa3c0818bb8c0721b84c75150",
        ),
        "edsr16_64_id.celeba_aaf_real_world": _ours(
            "edsr16_64_id.celeba_aaf_real_world",
            "ee655bb4c2d7873d021d89c4d16e1ff041ec4ff329f5f0b130eeb33151adda60",
        ),
        "edsr16_64.celeba295": _ours(
            "edsr16_64.celeba295",
            "47ff4f2a69fe563ec120fd7ad4835a91fdecd17e71785c2ec26a52c4512a1cb6",
            "CelebA in the wild: 5,452 faces of 295 people, none of them in LFW",
        ),
        "edsr32_256.celeba": _released(
            "edsr_baseline",
            "00d14358e8ecbdc563b4be7873303b74516bd518",
            "a497884e20a3e0ab0de323d1f222a9d2bdeb40fe",
        ),
        "edsr32_256_id.celeba": _released(
            "edsr_lambda0.5",
            "125743e6b200499932fa165869f416f7d460a736",
            "db7339928db88c0650eeb08b804f095de32ed508",
        ),
        "edsr16_64_div2k.official_x4": _official("edsr_baseline_x4-6b446fab.pt"),
        "edsr32_256_div2k.official_x4": _official("edsr_x4-4f62e9ef.pt"),
        "edsr16_64_super_image.div2k_x4": _super_image(
            HubFile(
                repo="eugenesiow/edsr-base",
                filename="pytorch_model_4x.pt",
                revision="d622f68a86f11af7c1c6add1a8fa3790a1173d97",
                sha256="9302a679cf3e656a8aefd4ae7cfae4dd86ca60b2e1c50fbe9e06dde9767d32ad",
            )
        ),
        "edsr32_256_super_image.div2k_x4": _super_image(
            ManualFile(
                filename="pytorch_model_4x.pt",
                url="https://huggingface.co/eugenesiow/edsr/resolve/"
                "93f0ee66d36fb449f65525b7c4792adef82deb00/pytorch_model_4x.pt",
                how="Its hash is not known here, so it is not fetched unasked.",
            )
        ),
    },
    num_classes=0,
    input_size=(3, 28, 24),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    first_conv="head",
    paper_name="Low-Resolution Face Recognition Based on Identity-Preserved Face Hallucination",
)


def _edsr(variant: str, pretrained: bool, kwargs: dict[str, Any], **own: Any) -> EDSR:
    arguments = {"kwargs_filter": ("num_classes", "global_pool"), **own, **kwargs}
    return build_model(EDSR, variant, pretrained, **arguments)


@register_srnet
def edsr16_64(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """EDSR of 16 blocks and 64 filters, trained with the image loss alone (lambda 0)."""
    return _edsr("edsr16_64", pretrained, kwargs, depth=16, width=64)


@register_srnet
def edsr16_64_id(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """EDSR of 16 blocks and 64 filters, trained with an identity loss of two FNets."""
    return _edsr("edsr16_64_id", pretrained, kwargs, depth=16, width=64)


@register_srnet
def edsr32_256(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """EDSR of 32 blocks and 256 filters, trained with the image loss alone (lambda 0)."""
    return _edsr("edsr32_256", pretrained, kwargs, depth=32, width=256)


@register_srnet
def edsr32_256_id(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """EDSR of 32 blocks and 256 filters, trained with the identity loss (lambda 0.5)."""
    return _edsr("edsr32_256_id", pretrained, kwargs, depth=32, width=256)


@register_srnet
def edsr16_64_div2k(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """The "baseline" EDSR of EDSR-PyTorch, 16 blocks and 64 filters, for photos of anything."""
    own = {"depth": 16, "width": 64, "res_scale": 1.0, **OFFICIAL}
    return _edsr("edsr16_64_div2k", pretrained, kwargs, **own)


@register_srnet
def edsr32_256_div2k(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """The EDSR of EDSR-PyTorch, 32 blocks and 256 filters, for photos of anything."""
    own = {"depth": 32, "width": 256, "res_scale": 0.1, **OFFICIAL}
    return _edsr("edsr32_256_div2k", pretrained, kwargs, **own)


@register_srnet
def edsr16_64_super_image(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """The EDSR of super-image, 16 blocks and 64 filters, for photos of anything."""
    return _edsr("edsr16_64_super_image", pretrained, kwargs, depth=16, width=64, **SUPER_IMAGE)


@register_srnet
def edsr32_256_super_image(pretrained: bool = False, **kwargs: Any) -> EDSR:
    """The EDSR of super-image, 32 blocks and 256 filters, for photos of anything."""
    return _edsr("edsr32_256_super_image", pretrained, kwargs, depth=32, width=256, **SUPER_IMAGE)
