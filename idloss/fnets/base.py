"""What the FNets of this package have in common: timm's interface around an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from idloss.registry import register_fnet
from idloss.weights import build_model

ARCFACE_CFG: dict[str, Any] = {
    "num_classes": 0,
    "input_size": (3, 112, 112),
    "fixed_input_size": True,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "stem.conv",
    "classifier": "classifier",
}
"""What recognisers trained on InsightFace's crops have alike: 112x112 RGB in [-1, 1]."""


class FNet(nn.Module):
    """A face recogniser: a trunk, an embedding, and a classifier only while it is trained.

    A family gives `forward_features` (images to a feature map) and `forward_embedding` (that map
    to embeddings); the rest of timm's interface is here.

    Args:
        num_features: Width D of the embeddings.
        num_classes: Identities of the classifier; 0 for none, and `forward` gives embeddings.
        in_chans: Channels of the input.
        grid: `(h, w)` of the feature map, which the embedding's weights are made for; None where
            the map is pooled.
        img_size: `(H, W)` of the input that gives that map.
    """

    nested = 0
    """Levels of modules that are around the layers."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        in_chans: int,
        *,
        grid: tuple[int, int] | None,
        img_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grid = grid
        self.img_size = (img_size[0], img_size[1])

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, H, W]` to the last feature map `[B, C, h, w]`."""
        raise NotImplementedError

    def forward_embedding(self, x: Tensor) -> Tensor:
        """Feature map `[B, C, h, w]` to embeddings `[B, num_features]`, not normalised."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map to logits `[B, num_classes]`; to embeddings without a classifier."""
        if self.grid is not None and x.shape[-2:] != self.grid:
            got = f"which give a feature map of {list(self.grid)}; got one of {list(x.shape[-2:])}"
            raise ValueError(self._wrong_size(got))
        x = self.forward_embedding(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, H, W]` to embeddings; to logits if there is a classifier."""
        if self.grid is None and x.shape[-2:] != self.img_size:
            raise ValueError(self._wrong_size(f"got {list(x.shape[-2:])}"))
        return self.forward_head(self.forward_features(x))

    def _wrong_size(self, got: str) -> str:
        height, width = self.img_size
        return (
            f"{type(self).__name__} takes {height}x{width} images (height x width), {got}. "
            "FaceEncoder resizes images to the network's input"
        )

    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or an identity when `num_classes` is 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a new classifier; 0 identities take it away."""
        if global_pool:
            raise ValueError(f"{type(self).__name__} does not pool, got {global_pool=}")
        reference = next(self.parameters())
        self.num_classes = num_classes
        self._build_classifier()
        self.classifier.to(device=reference.device, dtype=reference.dtype)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """What timm sorts names of parameters by, as for learning rates that differ by layer."""
        depth = (1 if coarse else 2) + self.nested
        groups = [name for name, _ in self.named_modules() if name and name.count(".") < depth]
        return lambda name: max(
            (place for place, group in enumerate(groups) if f"{name}.".startswith(f"{group}.")),
            default=-1,
        )

    def forward_intermediates(self, *args: object, **kwargs: object) -> None:
        """Part of timm's interface, which these networks have no more of than one map."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward_intermediates; forward_features gives its last "
            "feature map"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Part of timm's interface, which trains these networks without it."""
        if enable:
            raise NotImplementedError(f"{type(self).__name__} has no gradient checkpointing")

    def _init_convolutions(self) -> None:
        """Draw the convolutions so that ReLU layers keep the signal (He et al., ICCV 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # by fan-in: what goes out of a depthwise layer is not what its shape suggests
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _build_classifier(self) -> None:
        """Make the classifier; families call it last, after their own layers."""
        self.classifier: nn.Module = (
            nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()
        )


def register_variants(
    build: Callable[..., FNet], variants: Mapping[str, Mapping[str, Any]], crop: str, family: str
) -> None:
    """Register the networks of a family that are told apart by their options alone."""

    def register(name: str, options: Mapping[str, Any]) -> None:
        def entry_point(pretrained: bool = False, **kwargs: Any) -> FNet:
            return build_model(build, name, pretrained, **{**options, **kwargs})

        entry_point.__name__ = entry_point.__qualname__ = name
        entry_point.__module__ = family
        entry_point.__doc__ = f"{name}, on crops of {crop!r}, 512-d."
        register_fnet(crop=crop)(entry_point)

    for name, options in variants.items():
        register(name, options)


def released_names(build: Callable[[], nn.Module], theirs: Callable[[str], str]) -> dict[str, str]:
    """Keys, theirs to ours, of a network each layer of which has a name of theirs."""
    with torch.device("meta"):
        keys = build().state_dict()
    layers = (key.rpartition(".") for key in keys)
    return {f"{theirs(layer)}.{entry}": f"{layer}.{entry}" for layer, _, entry in layers}


def downsampled(img_size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after so many stride-2 layers that round up (3x3, padding 1)."""
    height, width = (-(-side // 2**times) for side in img_size)
    return height, width
