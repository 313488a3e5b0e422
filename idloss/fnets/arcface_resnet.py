"""The grey ArcFace ResNet-18 whose features GFPGAN's identity loss compares.

TencentARC/GFPGAN, gfpgan/archs/arcface_arch.py, options/train_gfpgan_v1.yml (without
squeeze-and-excitation) and gfpgan/models/gfpgan_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from idloss.fnets.base import ARCFACE_CFG, FNet, downsampled, released_names
from idloss.fnets.iresnet import DEPTHS, conv_shortcut, conv_stem
from idloss.registry import register_fnet
from idloss.weights import WebFile, Weights, build_model, register_weights
from idloss.weights.loading import StateDict, rename_keys, with_counters


class ArcFaceResNet(FNet):
    """GFPGAN's ResNetArcFace: RGB is made grey before the first convolution."""

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (128, 128),
        num_features: int = 512,
        depths: Sequence[int] = DEPTHS[18],
        widths: Sequence[int] = (64, 128, 256, 512),
        drop_rate: float = 0.5,
    ) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f"ArcFaceResNet takes RGB or grey images, got in_chans={in_chans}")
        grid = downsampled((img_size[0] // 2, img_size[1] // 2), len(widths) - 1)
        super().__init__(num_features, num_classes, in_chans, grid=grid, img_size=img_size)
        channels = widths[0]
        self.stem = conv_stem(1, channels, slopes=1)
        self.pool = nn.MaxPool2d(2)
        blocks = []
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for index in range(depth):
                blocks.append(_Block(channels, width, 2 if stage and index == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(drop_rate)
        self.embedding = nn.Linear(channels * grid[0] * grid[1], num_features)
        self.embedding_norm = nn.BatchNorm1d(num_features)
        self._init_convolutions()
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 128, 128]` to the last feature map `[B, 512, 8, 8]`."""
        if self.in_chans == 3:
            # gray_resize_for_identity of gfpgan_model.py
            x = 0.2989 * x[:, 0:1] + 0.5870 * x[:, 1:2] + 0.1140 * x[:, 2:3]
        features: Tensor = self.norm(self.blocks(self.pool(self.stem(x))))
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 512, 8, 8]` to embeddings `[B, 512]`, flattened channel first."""
        embedding: Tensor = self.embedding_norm(self.embedding(self.drop(x).flatten(1)))
        return embedding


class _Block(nn.Module):
    """`PReLU(shortcut(x) + BN(conv(PReLU(BN(conv(BN(x)))))))`, both PReLUs of one single slope."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act = nn.PReLU()
        self.conv2 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = conv_shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(self.act(self.norm1(self.conv1(self.norm0(x))))))
        out: Tensor = self.act(self.shortcut(x) + residual)
        return out


_TOP = {"stem.conv": "conv1", "stem.norm": "bn1", "stem.act": "prelu"}
_TOP |= {"norm": "bn4", "embedding": "fc5", "embedding_norm": "bn5"}
_BLOCK = {"norm0": "bn0", "norm1": "bn1", "norm2": "bn2", "act": "prelu"}
_BLOCK |= {"shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}


def arcface_resnet_gfpgan(state_dict: StateDict) -> dict[str, Tensor]:
    """`arcface_resnet18.pth` of GFPGAN to `ArcFaceResNet`."""

    def theirs(layer: str) -> str:
        if not layer.startswith("blocks."):
            return _TOP[layer]
        _, number, inner = layer.split(".", 2)
        stage, index = divmod(int(number), 2)
        return f"layer{stage + 1}.{index}.{_BLOCK.get(inner, inner)}"

    names = released_names(ArcFaceResNet, theirs)
    return rename_keys(with_counters(state_dict), names, "GFPGAN's ArcFace ResNet-18")


default_cfgs = register_weights(
    {
        "arcface_resnet18.gfpgan": Weights(
            source=WebFile(
                url="https://github.com/TencentARC/GFPGAN/releases/download/v0.1.0/arcface_resnet18.pth",
                sha256="69554b3184575bdda7ecf7f40caf2b0c5ecbd0617b676d2209d8bf0e7e3d8042",
                page="https://github.com/TencentARC/GFPGAN/releases/tag/v0.1.0",
            ),
            licence="not stated for the weights; code Apache-2.0",
            training_data="faces that its authors do not name",
            adapter=arcface_resnet_gfpgan,
            description="ArcFace on grey images; GFPGAN's identity loss; its authors give no "
            "figure for LFW.",
        ),
    },
    **{**ARCFACE_CFG, "input_size": (3, 128, 128), "interpolation": "bilinear"},
)


# GFPGAN shows it whole FFHQ crops, shrunk
@register_fnet(crop="ffhq")
def arcface_resnet18(pretrained: bool = False, **kwargs: Any) -> ArcFaceResNet:
    """GFPGAN's ResNet-18 for grey faces, 128x128, 512-d."""
    return build_model(ArcFaceResNet, "arcface_resnet18", pretrained, **kwargs)
