"""A package of one's own: `pip install examples/plugin`, and idloss knows its names.

idloss list 'facekit*'
idloss train paper_edsr16_64 srnet=facekit_espcn fnet=facekit_fnet distance=facekit_chord ...
"""

from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from idloss import register_distance, register_fnet, register_srnet
from idloss.weights import build_model

# With weights, idloss.weights.register_weights({"facekit_fnet.tag": Weights(...)}, **shared) gives
# these: it is told where they come from, their hash, licence and training data.
default_cfgs = generate_default_cfgs(
    {
        "facekit_fnet": {
            "input_size": (3, 112, 112),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "num_classes": 0,
        },
        "facekit_espcn": {"input_size": (3, 28, 28), "num_classes": 0},
    }
)


class SmallFNet(nn.Module):
    """Four strided convolutions and a linear layer: normalised RGB to embeddings `[B, D]`."""

    def __init__(self, num_features: int = 64, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes
        widths = (in_chans, 16, 32, 64, 64)
        self.convs = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.PReLU(b))
                for a, b in pairwise(widths)
            )
        )
        self.embedding = nn.Linear(64 * 7 * 7, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB `[B, 3, 112, 112]` to embeddings `[B, num_features]`."""
        embeddings: Tensor = self.embedding(self.convs(x).flatten(1))
        return embeddings


class ESPCN(nn.Module):
    """Sub-pixel convolution over a bilinear enlargement (after Shi et al., CVPR 2016)."""

    def __init__(self, scale: int = 4, width: int = 32) -> None:
        super().__init__()
        self.scale = scale
        self.num_features = width
        self.num_classes = 0
        self.body = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.Tanh())
        self.tail = nn.Conv2d(width, 3 * scale**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to `[B, 3, scale * H, scale * W]`."""
        detail = F.pixel_shuffle(self.tail(self.body(x)), self.scale)
        return F.interpolate(x, scale_factor=self.scale, mode="bilinear") + detail


@register_fnet(crop="arcface")
def facekit_fnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small FNet."""
    return build_model(SmallFNet, "facekit_fnet", pretrained, **kwargs)


@register_srnet
def facekit_espcn(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small SRNet."""
    ignored = ("num_classes", "global_pool", "in_chans")
    return build_model(ESPCN, "facekit_espcn", pretrained, kwargs_filter=ignored, **kwargs)


def chord(a: Tensor, b: Tensor) -> Tensor:
    """Length of the chord between two embeddings on the unit sphere, in [0, 2]."""
    length: Tensor = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).norm(dim=1)
    return length


register_distance("facekit_chord", chord)
