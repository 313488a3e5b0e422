"""MobileFaceNet: a face recogniser of a million parameters.

Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile
Devices", CCBR 2018, table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from idloss.errors import did_you_mean
from idloss.fnets.base import ARCFACE_CFG, FNet, downsampled, released_names
from idloss.registry import register_fnet
from idloss.weights import GitHubBlob, Weights, build_model, register_weights
from idloss.weights.loading import OURS, StateDict, rename_keys
from idloss.weights.sources import ZooFile

BOTTLENECKS = (
    (128, 64, 5, 2),
    (256, 128, 1, 2),
    (256, 128, 6, 1),
    (512, 128, 1, 2),
    (256, 128, 2, 1),
)
"""Expanded width, output width, repeats and first stride of each row (paper, table 1)."""

_Activation = Callable[[int], nn.Module]

ACTIVATIONS: dict[str, _Activation] = {"prelu": nn.PReLU, "relu6": lambda _: nn.ReLU6()}
"""Activations by name, each made for a number of channels."""


RELU6: dict[str, Any] = {"act": "relu6", "separable_stem": True, "embedding_bias": True}
"""What foamliu's network has otherwise."""


class MobileFaceNet(FNet):
    """MobileFaceNet, as in the paper or with the changes that published weights were made with.

    Args:
        num_classes: Identities of the classifier; 0 for none.
        in_chans: Channels of the input.
        img_size: `(H, W)` of the input.
        num_features: Width of the embedding.
        act: `"prelu"` (paper) or `"relu6"` (foamliu/MobileFaceNet).
        separable_stem: Follow the second, depthwise convolution by a pointwise one, both with a
            plain ReLU (foamliu/MobileFaceNet).
        embedding_bias: Bias in the linear layer before the last batch norm
            (foamliu/MobileFaceNet).

    Raises:
        ValueError: If `act` is unknown.
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (112, 112),
        num_features: int = 128,
        act: str = "prelu",
        separable_stem: bool = False,
        embedding_bias: bool = False,
    ) -> None:
        if act not in ACTIVATIONS:
            raise ValueError(did_you_mean("activation of MobileFaceNet", act, ACTIVATIONS))
        grid = downsampled(img_size, 4)
        super().__init__(num_features, num_classes, in_chans, grid=grid, img_size=img_size)
        activation = ACTIVATIONS[act]
        self.stem = _ConvNormAct(in_chans, 64, 3, stride=2, act=activation)
        plain_relu: _Activation = lambda _: nn.ReLU()  # noqa: E731
        self.stem_depthwise = _ConvNormAct(
            64, 64, 3, groups=64, act=plain_relu if separable_stem else activation
        )
        self.stem_pointwise = (
            _ConvNormAct(64, 64, 1, act=plain_relu) if separable_stem else nn.Identity()
        )
        blocks = []
        channels = 64
        for expanded, width, repeats, stride in BOTTLENECKS:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(_Bottleneck(channels, expanded, width, step, activation))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.expand = _ConvNormAct(channels, 512, 1, act=activation)
        # "global depthwise convolution": one weight per position instead of an average
        self.global_depthwise = _ConvNormAct(512, 512, grid, groups=512, padding=0)
        self.embedding = nn.Linear(512, num_features, bias=embedding_bias)
        self.embedding_norm = nn.BatchNorm1d(num_features)
        self._init_convolutions()
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 112, 112]` to the last feature map `[B, 512, 7, 7]`."""
        x = self.stem_pointwise(self.stem_depthwise(self.stem(x)))
        features: Tensor = self.expand(self.blocks(x))
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 512, 7, 7]` to embeddings `[B, 128]`."""
        x = self.global_depthwise(x).flatten(1)
        embedding: Tensor = self.embedding_norm(self.embedding(x))
        return embedding


class _ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, and an activation unless the layer is linear."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        act: _Activation | None = None,
        **options: int,
    ) -> None:
        super().__init__()
        options = {"padding": 1 if kernel_size == 3 else 0, **options}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, **options)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = act(out_channels) if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class _Bottleneck(nn.Module):
    """Expand, filter depthwise, project linearly; a shortcut where the shape allows it."""

    def __init__(
        self, in_channels: int, expanded: int, out_channels: int, stride: int, act: _Activation
    ) -> None:
        super().__init__()
        self.expand = _ConvNormAct(in_channels, expanded, 1, act=act)
        self.depthwise = _ConvNormAct(
            expanded, expanded, 3, stride=stride, groups=expanded, act=act
        )
        self.project = _ConvNormAct(expanded, out_channels, 1)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + residual if self.shortcut else residual


def mobilefacenet_bubbliiiing(state_dict: StateDict) -> dict[str, Tensor]:
    """`arcface_mobilefacenet.pth` of bubbliiiing/arcface-pytorch to `MobileFaceNet`."""
    blocks: list[str] = []
    for opening, rest, repeats in (("23", "3", 4), ("34", "4", 6), ("45", "5", 2)):
        blocks += [f"conv_{opening}", *(f"conv_{rest}.model.{i}" for i in range(repeats))]
    inner = {"expand": "conv", "depthwise": "conv_dw", "project": "project"}

    def theirs(layer: str) -> str:
        if layer in _BUBBLIIIING:
            return f"arcface.{_BUBBLIIIING[layer]}"
        part, _, kind = layer.rpartition(".")
        if part.startswith("blocks."):
            _, index, name = part.split(".")
            part = f"{blocks[int(index)]}.{inner[name]}"
        part = {"stem": "conv1", "stem_depthwise": "conv2_dw"}.get(part, part)
        return f"arcface.{part}.{'prelu' if kind == 'act' else kind}"

    names = released_names(MobileFaceNet, theirs)
    adapted = rename_keys(state_dict, names, "bubbliiiing's MobileFaceNet", dropped=("head.",))
    return _linear_from_pointwise(adapted)


_BUBBLIIIING = {
    **{"expand.conv": "sep", "expand.bn": "sep_bn", "expand.act": "prelu"},
    **{"global_depthwise.conv": "GDC_dw", "global_depthwise.bn": "GDC_bn"},
    **{"embedding": "features", "embedding_norm": "last_bn"},
}


def mobilefacenet_foamliu(state_dict: StateDict) -> dict[str, Tensor]:
    """`mobilefacenet.pt` of foamliu/MobileFaceNet to `MobileFaceNet` with ReLU6."""

    def theirs(layer: str) -> str:
        part, _, kind = layer.rpartition(".")
        if part.startswith("blocks."):
            _, index, name = part.split(".")
            return f"features.{index}.conv.{_FOAMLIU_BLOCK[name][kind == 'bn']}"
        return _FOAMLIU.get(layer) or f"{_FOAMLIU[part]}.{int(kind == 'bn')}"

    names = released_names(lambda: MobileFaceNet(**RELU6), theirs)
    return _linear_from_pointwise(rename_keys(state_dict, names, "foamliu's MobileFaceNet"))


_FOAMLIU = {
    **{"stem": "conv1", "expand": "conv2", "embedding": "conv3", "embedding_norm": "bn"},
    **{"stem_depthwise.conv": "dw_conv.depthwise", "stem_depthwise.bn": "dw_conv.bn1"},
    **{"stem_pointwise.conv": "dw_conv.pointwise", "stem_pointwise.bn": "dw_conv.bn2"},
    **{"global_depthwise.conv": "gdconv.depthwise", "global_depthwise.bn": "gdconv.bn"},
}
_FOAMLIU_BLOCK = {"expand": ("0.0", "0.1"), "depthwise": ("1.0", "1.1"), "project": ("2", "3")}


def _linear_from_pointwise(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A 1x1 convolution of a 1x1 map is a linear layer: `[D, C, 1, 1]` to `[D, C]`."""
    return {**state_dict, "embedding.weight": state_dict["embedding.weight"].flatten(1)}


default_cfgs = register_weights(
    {
        "mobilefacenet.casia_webface": Weights(
            source=GitHubBlob(
                repo="bubbliiiing/arcface-pytorch",
                commit="0faafe28eba416738893f1426b15774cdaa6d3ab",
                parts=(
                    (
                        "model_data/arcface_mobilefacenet.pth",
                        "fb7f6b9268945b12d23e5d270112a88792475877",
                    ),
                ),
                sha256="4c08e11a0a2bbf299910210da647c7d8105c348f4c533868e1710dbcf7b22480",
            ),
            licence="mit",
            training_data="CASIA-WebFace",
            adapter=mobilefacenet_bubbliiiing,
            description="ArcFace; its authors report 98.78 % on LFW.",
            lfw=98.78,
            size=4_155_613,
        ),
        "mobilefacenet.celeba_aaf": Weights(
            ZooFile(
                "mobilefacenet.celeba_aaf",
                "0414d53e9cb1616115a265774c299fec48ba61f8c864306c7abeb457303e3e4c",
            ),
            training_data="CASIA-WebFace, then 14,523 faces of 4,989 people of CelebA and "
            "All-Age-Faces, none of these in LFW",
            description="mobilefacenet.casia_webface (MIT), taught by itself to see small faces: "
            "to recognise with, not for a loss, in which it teaches little.",
            lfw=98.52,
            **OURS,
        ),
        "mobilefacenet_relu6.ms1m": Weights(
            source=GitHubBlob(
                repo="foamliu/MobileFaceNet",
                commit="a6cc9032a659b615f477833e1a70b5e7931bcccc",
                parts=(("weights/mobilefacenet.pt", "507d54667f22ef72d7b9d9ac1d43f0b16cc69a90"),),
                sha256="90a00ba1d8b0b688af3deb731ed53dca582e6106805d1bc3cfdef55f570493f4",
            ),
            licence="apache-2.0",
            training_data="MS-Celeb-1M, refined (3,804,846 faces of 85,164 people)",
            adapter=mobilefacenet_foamliu,
            description="ArcFace; its authors report 99.48 % on LFW.",
            lfw=99.48,
            size=4_135_271,
            # ImageNet's, as torchvision's transforms have them (foamliu's data_gen.py)
            cfg={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        ),
    },
    **ARCFACE_CFG,
    paper_name="MobileFaceNets",
    paper_ids="arXiv:1804.07573",
)


@register_fnet(crop="arcface")
def mobilefacenet(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """MobileFaceNet as in its paper, 112x112, 128-d, trained with ArcFace."""
    return build_model(MobileFaceNet, "mobilefacenet", pretrained, **kwargs)


@register_fnet(crop="arcface")
def mobilefacenet_relu6(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """MobileFaceNet with ReLU6 and a separable stem, 112x112, 128-d, trained with ArcFace."""
    return build_model(MobileFaceNet, "mobilefacenet_relu6", pretrained, **{**RELU6, **kwargs})
