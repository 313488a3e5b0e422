"""Inception-ResNet-v1 as FaceNet, the recogniser of facenet-pytorch.

Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
AAAI 2017, figures 10 to 14; Schroff et al., "FaceNet", CVPR 2015; the widths that weights exist for
are davidsandberg/facenet's, and timesler/facenet-pytorch's after it.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idloss.fnets.base import ARCFACE_CFG, FNet, released_names
from idloss.registry import register_fnet
from idloss.weights import HubFile, Weights, build_model, register_weights
from idloss.weights.loading import StateDict, rename_keys, with_counters

_Size = int | tuple[int, int]


class InceptionResNetV1(FNet):
    """Inception-ResNet-v1; `depths` are the residual blocks at each of its three sizes."""

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (160, 160),
        num_features: int = 512,
        depths: Sequence[int] = (5, 10, 5),
        drop_rate: float = 0.6,
    ) -> None:
        if min(img_size) < 75:
            raise ValueError(f"InceptionResNetV1 needs images of 75x75 or more, got {img_size=}")
        super().__init__(num_features, num_classes, in_chans, grid=None, img_size=img_size)
        self.stem = nn.Sequential(
            _conv(in_chans, 32, 3, stride=2),
            _conv(32, 32, 3),
            _conv(32, 64, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
            _conv(64, 80, 1),
            _conv(80, 192, 3),
            _conv(192, 256, 3, stride=2),
        )
        self.blocks35 = nn.Sequential(*(_block35() for _ in range(depths[0])))
        self.reduction_a = _Branches(
            _conv(256, 384, 3, stride=2),
            nn.Sequential(
                _conv(256, 192, 1), _conv(192, 192, 3, padding=1), _conv(192, 256, 3, stride=2)
            ),
            nn.MaxPool2d(3, stride=2),
        )
        self.blocks17 = nn.Sequential(*(_block17() for _ in range(depths[1])))
        self.reduction_b = _Branches(
            nn.Sequential(_conv(896, 256, 1), _conv(256, 384, 3, stride=2)),
            nn.Sequential(_conv(896, 256, 1), _conv(256, 256, 3, stride=2)),
            nn.Sequential(
                _conv(896, 256, 1), _conv(256, 256, 3, padding=1), _conv(256, 256, 3, stride=2)
            ),
            nn.MaxPool2d(3, stride=2),
        )
        self.blocks8 = nn.Sequential(*(_block8(0.2) for _ in range(depths[2])))
        self.last_block = _block8(1.0, linear=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.embedding = nn.Linear(1792, num_features, bias=False)
        self.embedding_norm = nn.BatchNorm1d(num_features, eps=1e-3)
        self._init_convolutions()
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 160, 160]` to the last feature map `[B, 1792, 3, 3]`."""
        x = self.reduction_a(self.blocks35(self.stem(x)))
        x = self.reduction_b(self.blocks17(x))
        features: Tensor = self.last_block(self.blocks8(x))
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 1792, 3, 3]` to `[B, 512]`; facenet-pytorch divides by its norm."""
        embedding: Tensor = self.embedding_norm(self.embedding(self.drop(self.pool(x).flatten(1))))
        return embedding


def _conv(
    in_channels: int, width: int, kernel: _Size, *, stride: int = 1, padding: _Size = 0
) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, width, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, eps=1e-3), act=nn.ReLU()))


class _Branches(nn.Module):
    """What several branches make of the same map, one behind the other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class _Residual(_Branches):
    """`ReLU(x + scale * conv(branches(x)))`; the last of all has no ReLU."""

    def __init__(
        self, width: int, channels: int, scale: float, *branches: nn.Module, linear: bool = False
    ) -> None:
        super().__init__(*branches)
        self.project = nn.Conv2d(width, channels, 1)
        self.scale = scale
        self.act = nn.Identity() if linear else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.project(super().forward(x)) * self.scale + x)
        return out


def _block35() -> _Residual:
    first = _conv(256, 32, 1)
    second = nn.Sequential(_conv(256, 32, 1), _conv(32, 32, 3, padding=1))
    third = nn.Sequential(
        _conv(256, 32, 1), _conv(32, 32, 3, padding=1), _conv(32, 32, 3, padding=1)
    )
    return _Residual(96, 256, 0.17, first, second, third)


def _block17() -> _Residual:
    return _Residual(256, 896, 0.1, *_split(896, 128, 7))


def _block8(scale: float, *, linear: bool = False) -> _Residual:
    return _Residual(384, 1792, scale, *_split(1792, 192, 3), linear=linear)


def _split(channels: int, width: int, length: int) -> tuple[nn.Module, nn.Module]:
    """A 1x1 convolution, and one followed by a wide and a high one."""
    wide = _conv(width, width, (1, length), padding=(0, length // 2))
    high = _conv(width, width, (length, 1), padding=(length // 2, 0))
    return _conv(channels, width, 1), nn.Sequential(_conv(channels, width, 1), wide, high)


_PARTS = {
    **{"stem.0": "conv2d_1a", "stem.1": "conv2d_2a", "stem.2": "conv2d_2b"},
    **{"stem.4": "conv2d_3b", "stem.5": "conv2d_4a", "stem.6": "conv2d_4b"},
    **{"blocks35": "repeat_1", "reduction_a": "mixed_6a", "blocks17": "repeat_2"},
    **{"reduction_b": "mixed_7a", "blocks8": "repeat_3", "last_block": "block8"},
    **{"embedding": "last_linear", "embedding_norm": "last_bn"},
}


def inception_resnet_timesler(state_dict: StateDict) -> dict[str, Tensor]:
    """facenet-pytorch's InceptionResnetV1, its classifier left out, to `InceptionResNetV1`."""

    def theirs(layer: str) -> str:
        part = re.match(r"stem\.\d|\w+", layer)
        assert part is not None
        rest = layer[part.end() :].replace("branches.", "branch").replace("project", "conv2d")
        return _PARTS[part[0]] + rest

    names = released_names(InceptionResNetV1, theirs)
    kind = "facenet-pytorch's InceptionResnetV1"
    return rename_keys(with_counters(state_dict), names, kind, dropped=("logits.",))


default_cfgs = register_weights(
    {
        "inception_resnet_v1.vggface2": Weights(
            source=HubFile(
                repo="py-feat/facenet",
                filename="facenet_20180402_114759_vggface2.pth",
                revision="8dd79278b755ee24ee9922619122df8a2b80b787",
                sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
            ),
            licence="mit",
            training_data="VGGFace2",
            adapter=inception_resnet_timesler,
            description="Softmax (davidsandberg/facenet 20180402-114759); its authors report "
            "99.65 % on LFW.",
            lfw=99.65,
            size=111_898_327,
        ),
    },
    **{
        **ARCFACE_CFG,
        "input_size": (3, 160, 160),
        # fixed_image_standardization: (x - 127.5) / 128 on 0-255 pixels
        "std": (128 / 255, 128 / 255, 128 / 255),
        "first_conv": "stem.0.conv",
    },
    paper_name="FaceNet: A Unified Embedding for Face Recognition and Clustering",
    paper_ids="arXiv:1503.03832",
)


@register_fnet(crop="facenet")
def inception_resnet_v1(pretrained: bool = False, **kwargs: Any) -> InceptionResNetV1:
    """FaceNet's Inception-ResNet-v1, 160x160, 512-d."""
    return build_model(InceptionResNetV1, "inception_resnet_v1", pretrained, **kwargs)
