"""VGG-Face: VGG-16 trained to tell 2,622 people apart.

Parkhi, Vedaldi and Zisserman, "Deep Face Recognition", BMVC 2015, table 3 (network D).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from idloss.errors import did_you_mean
from idloss.fnets.base import ARCFACE_CFG, FNet
from idloss.registry import register_fnet
from idloss.weights import HubFile, ManualFile, Weights, build_model, register_weights
from idloss.weights.loading import StateDict, layer_keys, rename_keys

CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of the convolutions of the five blocks; a 2x2 max pool ends each."""

LAYERS = {"fc6": 4096, "fc7": 4096, "fc8": 2622}
"""Fully connected layers and their widths, in order."""


class VGGFace(FNet):
    """VGG-Face up to one of its fully connected layers.

    The embedding is what that layer computes before its ReLU, so that it keeps its sign; the
    layers beyond it are neither built nor loaded.

    Args:
        num_classes: Identities of a new classifier on the embedding; 0 for none. The original
            one is `layer="fc8"`.
        in_chans: Channels of the input.
        img_size: `(H, W)` of the input, multiples of 32.
        layer: `"fc7"` (4096-d, the paper's feature), `"fc6"` (4096-d) or `"fc8"` (2622-d).
        drop_rate: Dropout after the ReLU of fc6 and fc7 in training mode (Parkhi et al., 4.2).

    Raises:
        ValueError: If `layer` is none of these, or `img_size` too small to leave a feature map.
    """

    def __init__(
        self,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
        layer: str = "fc7",
        drop_rate: float = 0.5,
    ) -> None:
        if layer not in LAYERS:
            raise ValueError(did_you_mean("layer of VGG-Face", layer, LAYERS))
        grid = (img_size[0] // 32, img_size[1] // 32)
        if not all(grid):
            raise ValueError(f"VGGFace needs images of at least 32x32, got img_size={img_size}")
        super().__init__(LAYERS[layer], num_classes, in_chans, grid=grid, img_size=img_size)
        self.layer = layer
        self.features = nn.Sequential(OrderedDict(_trunk(in_chans)))
        width = CONVOLUTIONS[-1][-1] * grid[0] * grid[1]
        self.embedding = nn.Sequential(OrderedDict(_fully_connected(width, layer, drop_rate)))
        self._init_convolutions()
        self._build_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 224, 224]` to the last pooled map `[B, 512, 7, 7]`."""
        features: Tensor = self.features(x)
        return features

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, 512, 7, 7]` to the chosen layer before its ReLU, `[B, 4096]`."""
        embedding: Tensor = self.embedding(x.flatten(1))
        return embedding

    def fit_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the fully connected layers that the network stops short of."""
        deeper = tuple(f"embedding.{name}." for name in LAYERS if name > self.layer)
        return {key: value for key, value in state_dict.items() if not key.startswith(deeper)}


def _trunk(channels: int) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for block, widths in enumerate(CONVOLUTIONS, start=1):
        for index, width in enumerate(widths, start=1):
            layers.append((f"conv{block}_{index}", nn.Conv2d(channels, width, 3, padding=1)))
            layers.append((f"relu{block}_{index}", nn.ReLU()))
            channels = width
        layers.append((f"pool{block}", nn.MaxPool2d(2)))
    return layers


def _fully_connected(width: int, last: str, drop_rate: float) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for name, out_features in LAYERS.items():
        layers.append((name, nn.Linear(width, out_features)))
        if name == last:
            break
        layers.append((name.replace("fc", "relu"), nn.ReLU()))
        layers.append((name.replace("fc", "drop"), nn.Dropout(drop_rate)))
        width = out_features
    return layers


def vgg_face_dag(state_dict: StateDict) -> dict[str, Tensor]:
    """`vgg_face_dag.pth` (pytorch-mcn), which takes RGB, to `VGGFace` with `layer="fc8"`."""
    return rename_keys(state_dict, _names("conv{}_{}"), "vgg_face_dag")


def vgg_face_prlz77(state_dict: StateDict) -> dict[str, Tensor]:
    """`VGG_16` of prlz77/vgg-face.pytorch, which takes BGR, to `VGGFace` with `layer="fc8"`."""
    return rename_keys(state_dict, _names("conv_{}_{}"), "prlz77's VGG-Face")


def _names(pattern: str) -> dict[str, str]:
    """Keys of a VGG-Face whose convolutions are called by `pattern`, theirs to ours."""
    names: dict[str, str] = {}
    for block, widths in enumerate(CONVOLUTIONS, start=1):
        for index in range(1, len(widths) + 1):
            names |= layer_keys(pattern.format(block, index), f"features.conv{block}_{index}")
    for layer in LAYERS:
        names |= layer_keys(layer, f"embedding.{layer}")
    return names


_TRAINING_DATA = "VGG Face (2.6 million images of 2,622 people)"
_AUTHORS = "Parkhi, Vedaldi and Zisserman (University of Oxford)."

default_cfgs = register_weights(
    {
        "vgg_face.vggface": Weights(
            # The authors' host hands out no hash; this copy's is published with its commit.
            source=HubFile(
                repo="KenjieDec/Time-Travel-Rephotography_vgg_face_dag",
                filename="vgg_face_dag.pt",
                revision="ce9845a20cb9eebb00ac79bd4a7cdba14e37b8c2",
                sha256="f070b241e3faf17a08c78f8700d334413230bac5de7fbcfd01b3cf05ce10de1a",
            ),
            licence="cc-by-nc",
            training_data=_TRAINING_DATA,
            adapter=vgg_face_dag,
            trained_by=_AUTHORS,
        ),
        "vgg_face.vggface_prlz77": Weights(
            source=ManualFile(
                filename="vgg_face_prlz77.pth",
                url="https://github.com/prlz77/vgg-face.pytorch",
                how="Download VGG_FACE.t7 as its README says, read it with "
                "VGG_16().load_weights(), and torch.save the state dict under this name.",
            ),
            licence="cc-by-nc",
            training_data=_TRAINING_DATA,
            adapter=vgg_face_prlz77,
            trained_by=_AUTHORS,
            channel_order="bgr",
        ),
    },
    **{
        **ARCFACE_CFG,
        "input_size": (3, 224, 224),
        # Mean pixel of the authors' networks (vgg_face_matconvnet, BGR 93.5940, 104.7624,
        # 129.1863 on 0-255), which do not divide by a standard deviation.
        "mean": (129.1863 / 255, 104.7624 / 255, 93.5940 / 255),
        "std": (1 / 255, 1 / 255, 1 / 255),
        "first_conv": "features.conv1_1",
    },
    paper_name="Deep Face Recognition",
)


@register_fnet(crop=None)
def vgg_face(pretrained: bool = False, **kwargs: Any) -> VGGFace:
    """VGG-Face, 224x224, fc7 before ReLU, 4096-d: the FNet the paper only tests with."""
    return build_model(VGGFace, "vgg_face", pretrained, **kwargs)
