"""SphereFace networks: residual units with PReLU and no batch norm, the paper's `SFace`.

Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from idloss.fnets.base import ARCFACE_CFG, FNet, downsampled, released_names
from idloss.registry import register_fnet
from idloss.weights import GitHubBlob, Weights, build_model, register_weights
from idloss.weights.loading import StateDict, rename_keys

DEPTH_20 = (1, 2, 4, 1)
"""Residual units of the four stages of SphereFace-20."""


class SphereFace(FNet):
    """SphereFace network of 4, 10, 20, 36 or 64 layers.

    Args:
        num_classes: Identities of the classifier; 0 for none.
        in_chans: Channels of the input.
        img_size: `(H, W)` of the input.
        num_features: Width of the embedding, the output of FC1.
        depths: Residual units of the four stages; (1, 2, 4, 1) is SphereFace-20.
        widths: Channels of the four stages.
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (112, 96),
        num_features: int = 512,
        depths: Sequence[int] = DEPTH_20,
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        grid = downsampled(img_size, len(widths))
        super().__init__(num_features, num_classes, in_chans, grid=grid, img_size=img_size)
        self.stages = nn.Sequential(
            *(
                _Stage(channels, width, depth)
                for channels, width, depth in zip(
                    (in_chans, *widths[:-1]), widths, depths, strict=True
                )
            )
        )
        self.embedding = nn.Linear(widths[-1] * grid[0] * grid[1], num_features)
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 112, 96]` to the last feature map `[B, 512, 7, 6]`."""
        features: Tensor = self.stages(x)
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 512, 7, 6]` to FC1, flattened channel first: `[B, 512]`."""
        embedding: Tensor = self.embedding(x.flatten(1))
        return embedding


class _Stage(nn.Module):
    """A stride-2 convolution and the residual units that follow it."""

    def __init__(self, in_channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.act = nn.PReLU(width)
        self.blocks = nn.Sequential(*(_Unit(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.act(self.conv(x)))
        return features


class _Unit(nn.Module):
    """`x + PReLU(conv(PReLU(conv(x))))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.act1 = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.act2 = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.act2(self.conv2(self.act1(self.conv1(x))))
        return x + residual


def sface_released(state_dict: StateDict) -> dict[str, Tensor]:
    """`sface.pth` of johnnysclai/SR_LRFR, which takes BGR, to `SphereFace`."""

    def theirs(layer: str) -> str:
        stage, unit, name = _place(layer)
        if stage is None:
            return "13"
        if unit is None:
            return str(3 * stage + (name == "act"))
        return f"{3 * stage + 2}.{unit}.resblock.{('conv1', 'act1', 'conv2', 'act2').index(name)}"

    names = released_names(SphereFace, theirs)
    return rename_keys(state_dict, names, "SFace of johnnysclai/SR_LRFR")


def sphereface_clcarwin(state_dict: StateDict) -> dict[str, Tensor]:
    """`sphere20a` of clcarwin/sphereface_pytorch and its kin, which take BGR, to `SphereFace`."""

    def theirs(layer: str) -> str:
        stage, unit, name = _place(layer)
        if stage is None:
            return "fc5"
        # 1 opens the stage; then come the two layers of every unit
        index = 1 if unit is None else 1 + 2 * unit + int(name[-1])
        return f"{'conv' if name.startswith('conv') else 'relu'}{stage + 1}_{index}"

    names = released_names(SphereFace, theirs)
    return rename_keys(state_dict, names, "clcarwin's SphereFace-20", dropped=("fc6.",))


def _place(layer: str) -> tuple[int | None, int | None, str]:
    """Stage, unit and name of a layer; no stage for the embedding, no unit for what opens one."""
    numbers = [int(part) for part in layer.split(".") if part.isdecimal()]
    stage, unit = (*numbers, None, None)[:2]
    return stage, unit, layer.rpartition(".")[2]


default_cfgs = register_weights(
    {
        "sface.casia_webface": Weights(
            source=GitHubBlob(
                repo="johnnysclai/SR_LRFR",
                commit="4cf3b4bc79bcf145df1b579ba2010f709e5470b4",
                parts=(("pretrained/sface.pth", "0b4104033db5741c4073cfba7777b5daaee49a61"),),
            ),
            licence="none given: download from the origin, do not redistribute",
            training_data="CASIA-WebFace",
            adapter=sface_released,
            description="The paper's SFace, 99.07 % on LFW by its protocol.",
            channel_order="bgr",
            lfw=99.07,
        ),
        "sface.clcarwin_casia_webface": Weights(
            source=GitHubBlob(
                repo="clcarwin/sphereface_pytorch",
                commit="e2f11f0b0f394cf75b9f65ce8d353e4390b0948c",
                parts=(
                    ("model/sphere20a_20171020.7z", "ecf48ac4157d63d20f7b7ff74a4064ab0a016005"),
                ),
                member="sphere20a_20171020.pth",
            ),
            licence="mit",
            training_data="CASIA-WebFace",
            adapter=sphereface_clcarwin,
            description="A-Softmax; its authors report 99.22 % on LFW.",
            channel_order="bgr",
            lfw=99.22,
        ),
    },
    **{
        **ARCFACE_CFG,
        "input_size": (3, 112, 96),
        # (x - 127.5) / 128 on 0-255 pixels (released code, test.py and train.py)
        "std": (128 / 255, 128 / 255, 128 / 255),
        "first_conv": "stages.0.conv",
    },
    paper_name="SphereFace: Deep Hypersphere Embedding for Face Recognition",
    paper_ids="arXiv:1704.08063",
)


@register_fnet(crop="sphereface")
def sface(pretrained: bool = False, **kwargs: Any) -> SphereFace:
    """SphereFace-20 on 112x96 crops, 512-d: the FNet the paper trains with (section 4.1)."""
    return build_model(SphereFace, "sface", pretrained, **kwargs)
