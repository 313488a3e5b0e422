"""IResNet: the residual networks of ArcFace and CosFace, as InsightFace trains them.

Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, section
3.1, and deepinsight/insightface, recognition/arcface_torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

from idloss.fnets.base import ARCFACE_CFG, FNet, downsampled, register_variants, released_names
from idloss.weights import HubFile, ManualFile, Weights, register_weights
from idloss.weights.loading import StateDict, count_indices, rename_keys, with_counters

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
"""Blocks of the four stages, by the number in the network's name."""


class IResNet(FNet):
    """Residual network for faces; its options are what sets its relatives apart.

    Args:
        num_classes: Identities of the classifier; 0 for none.
        in_chans: Channels of the input.
        img_size: `(H, W)` of the input.
        num_features: Width of the embedding.
        depths: Blocks of the four stages.
        widths: Channels of the four stages.
        drop_rate: Dropout before the embedding, in training.
        subsample: The first block, which keeps its width, passes every second pixel on, where
            InsightFace has a convolution (`ir_se` networks).
        inner_norm: Batch norm between a block's first convolution and its PReLU.
        squeeze: Squeeze-and-excitation at the end of each block.
        affine: Scale and shift in the batch norm of the embedding.
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (112, 112),
        num_features: int = 512,
        depths: Sequence[int] = DEPTHS[50],
        widths: Sequence[int] = (64, 128, 256, 512),
        drop_rate: float = 0.0,
        subsample: bool = False,
        inner_norm: bool = True,
        squeeze: bool = False,
        affine: bool = True,
    ) -> None:
        grid = downsampled(img_size, len(widths))
        super().__init__(num_features, num_classes, in_chans, grid=grid, img_size=img_size)
        channels = widths[0]
        self.stem = conv_stem(in_chans, channels)
        blocks = []
        for depth, width in zip(depths, widths, strict=True):
            for index in range(depth):
                stride = 2 if index == 0 else 1
                options = {"subsample": subsample, "inner_norm": inner_norm, "squeeze": squeeze}
                blocks.append(_Block(channels, width, stride, **options))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(drop_rate)
        self.embedding = nn.Linear(channels * grid[0] * grid[1], num_features)
        self.embedding_norm = nn.BatchNorm1d(num_features, affine=affine)
        self._init_convolutions()
        for block in blocks:  # so that the sum of so many stays in range before any training
            nn.init.constant_(block.norm3.weight, len(blocks) ** -0.5)
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 112, 112]` to the last feature map `[B, 512, 7, 7]`."""
        features: Tensor = self.norm(self.blocks(self.stem(x)))
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 512, 7, 7]` to embeddings `[B, 512]`, flattened channel first."""
        embedding: Tensor = self.embedding_norm(self.embedding(self.drop(x).flatten(1)))
        return embedding


def conv_stem(in_channels: int, width: int, slopes: int | None = None) -> nn.Sequential:
    """A 3x3 convolution, batch norm, and PReLU with one slope a channel, or so many."""
    conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    act = nn.PReLU(slopes or width)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), act=act))


def conv_shortcut(in_channels: int, width: int, stride: int) -> nn.Module:
    """What a block adds its result to: its input, or a 1x1 convolution where shapes differ."""
    if in_channels == width and stride == 1:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


class _Block(nn.Module):
    """`shortcut(x) + BN(conv(PReLU(BN(conv(BN(x))))))`; the second convolution has the stride."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        *,
        subsample: bool,
        inner_norm: bool,
        squeeze: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width) if inner_norm else nn.Identity()
        self.act = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        # the squeezed width of TreB1eN/InsightFace_Pytorch
        self.se = SEModule(width, rd_channels=width // 16, bias=False) if squeeze else nn.Identity()
        if subsample and in_channels == width:
            self.shortcut: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut = conv_shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act(self.norm2(self.conv1(self.norm1(x))))
        residual = self.se(self.norm3(self.conv2(residual)))
        out: Tensor = self.shortcut(x) + residual
        return out


_TOP = {"stem.conv": "conv1", "stem.norm": "bn1", "stem.act": "prelu"}
_TOP |= {"norm": "bn2", "embedding": "fc", "embedding_norm": "features"}
_BLOCK = {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3", "act": "prelu"}
_BLOCK |= {"shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}


def iresnet_insightface(state_dict: StateDict) -> dict[str, Tensor]:
    """`backbone.pth` of InsightFace's arcface_torch, of any depth, to `IResNet`."""
    depths = [count_indices(state_dict, rf"^layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    places = [
        f"layer{stage}.{index}"
        for stage, depth in enumerate(depths, start=1)
        for index in range(depth)
    ]

    def theirs(layer: str) -> str:
        if not layer.startswith("blocks."):
            return _TOP[layer]
        _, index, inner = layer.split(".", 2)
        return f"{places[int(index)]}.{_BLOCK.get(inner, inner)}"

    names = released_names(lambda: IResNet(depths=depths), theirs)
    return rename_keys(with_counters(state_dict), names, "InsightFace's IResNet")


def _weights(
    source: HubFile | ManualFile, loss: str, data: str, lfw: float, size: int | None = None
) -> Weights:
    return Weights(
        source=source,
        licence="non-commercial research only (deepinsight/insightface)",
        training_data=data,
        adapter=iresnet_insightface,
        trained_by="InsightFace.",
        description=f"{loss}; its authors report {lfw:.2f} % on LFW (README of b5591686).",
        lfw=lfw,
        size=size,
    )


def _copy(filename: str, sha256: str) -> HubFile:
    # InsightFace's own hosts, OneDrive and Baidu, hand out no hash
    revision = "5aac4346938ae100f5145f549c4540d8bf7feb6c"
    return HubFile("lithiumice/ArcFace_PyTorch", filename, revision, sha256)


def _onedrive(folder: str) -> ManualFile:
    return ManualFile(
        filename=f"{folder}.pth",
        url="https://github.com/deepinsight/insightface/tree/master/recognition/arcface_torch",
        how=f"Download {folder}/backbone.pth from the OneDrive folder under 'Model Zoo' there.",
    )


_MS1MV3 = "MS1MV3 (MS1M-RetinaFace)"

default_cfgs = register_weights(
    {
        "iresnet18.cosface_glint360k": _weights(
            _onedrive("glint360k_cosface_r18_fp16_0.1"), "CosFace", "Glint360K", 99.77
        ),
        "iresnet34.cosface_glint360k": _weights(
            _onedrive("glint360k_cosface_r34_fp16_0.1"), "CosFace", "Glint360K", 99.82
        ),
        "iresnet50.arcface_ms1mv3": _weights(
            _copy(
                "ms1mv3_arcface_r50_fp16.pth",
                "ef005ba502a2d0f40e7b94245054d3a23e375776f7035080fcbce45ae49cfb01",
            ),
            *("ArcFace", _MS1MV3, 99.83, 174_680_546),
        ),
        "iresnet100.arcface_ms1mv3": _weights(
            _copy(
                "ms1mv3_arcface_r100_fp16.pth",
                "a566a62357f0c55b679d9ff2f022a294486568be0c00665d39029d0e46a8109b",
            ),
            *("ArcFace", _MS1MV3, 99.85, 261_223_796),
        ),
        "iresnet100.cosface_glint360k": _weights(
            _copy(
                "glink360k_cosface_r100_fp16_0.1.pth",  # as that repository spells it
                "5f631718e783448b41631e15073bdc622eaeef56509bbad4e5085f23bd32db83",
            ),
            *("CosFace", "Glint360K", 99.82, 261_223_796),
        ),
    },
    **ARCFACE_CFG,
    paper_name="ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
    paper_ids="arXiv:1801.07698",
)

register_variants(
    IResNet,
    {f"iresnet{number}": {"depths": depths} for number, depths in DEPTHS.items()},
    crop="arcface",
    family=__name__,
)
