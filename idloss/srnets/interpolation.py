"""Interpolation as an SRNet without parameters: the baseline row of every table."""

from __future__ import annotations

from typing import Any, Literal

from timm.models import generate_default_cfgs
from torch import Tensor, nn

from idloss.registry import register_srnet
from idloss.resample import ImageWatch, resize
from idloss.weights import build_model


class Interpolation(nn.Module):
    """Up-sample as OpenCV does, by a factor or to a size.

    Args:
        mode: `"bicubic"` or `"bilinear"`.
        scale: Factor; no use is made of it where `size` is given.
        size: `(H, W)` of the output.
        in_chans: Part of timm's interface; any number of channels will do.
    """

    def __init__(
        self,
        mode: Literal["bicubic", "bilinear"] = "bicubic",
        scale: float = 4,
        size: tuple[int, int] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        sides = (1, 1) if size is None else tuple(size)
        if not 0 < scale <= 64 or len(sides) != 2 or not 0 < min(sides) <= max(sides) <= 4096:
            raise ValueError(
                f"scale is above 0 and at most 64, size (H, W) at most 4096: got {scale}, {size}"
            )
        self.mode: Literal["bicubic", "bilinear"] = mode
        self.scale = scale
        self.size = tuple(size) if size is not None else None
        self.in_chans = in_chans
        # What timm's tools ask of any model: no classifier, and a width.
        self.num_classes = 0
        self.num_features = in_chans
        self._watch = ImageWatch(margin=1.0)  # noise may leave [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to RGB of the size asked for; bicubic may leave [0, 1]."""
        self._watch.refuse(x, channels=None)
        height, width = x.shape[-2:]
        size = self.size or (round(height * self.scale), round(width * self.scale))
        return resize(x, size, mode=self.mode)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"mode={self.mode!r}, scale={self.scale}, size={self.size}"


_CFG = {
    "num_classes": 0,
    "crop_pct": 1.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}

default_cfgs = generate_default_cfgs(
    {
        f"interpolation_{mode}{crop}": {**_CFG, "input_size": (3, 28, width)}
        for mode in ("bicubic", "bilinear")
        for crop, width in (("", 24), ("_arcface", 28))
    }
)


def _interpolation(variant: str, mode: str, **kwargs: Any) -> Interpolation:
    arguments = {"mode": mode, **kwargs}
    # never pretrained: there is nothing to load, and asking for it is right and changes nothing
    return build_model(
        Interpolation, variant, False, kwargs_filter=("num_classes", "global_pool"), **arguments
    )


@register_srnet
def interpolation_bicubic(pretrained: bool = False, **kwargs: Any) -> Interpolation:
    """Bicubic interpolation (OpenCV's, a = -0.75)."""
    return _interpolation("interpolation_bicubic", "bicubic", **kwargs)


@register_srnet
def interpolation_bilinear(pretrained: bool = False, **kwargs: Any) -> Interpolation:
    """Bilinear interpolation: what the released evaluation calls "Bicubic"."""
    return _interpolation("interpolation_bilinear", "bilinear", **kwargs)


@register_srnet(crop="arcface")
def interpolation_bicubic_arcface(pretrained: bool = False, **kwargs: Any) -> Interpolation:
    """Bicubic interpolation of crops of 112x112."""
    return _interpolation("interpolation_bicubic_arcface", "bicubic", **kwargs)


@register_srnet(crop="arcface")
def interpolation_bilinear_arcface(pretrained: bool = False, **kwargs: Any) -> Interpolation:
    """Bilinear interpolation of crops of 112x112."""
    return _interpolation("interpolation_bilinear_arcface", "bilinear", **kwargs)
