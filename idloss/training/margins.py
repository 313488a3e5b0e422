"""Losses that teach an FNet to tell identities apart, each with its margin, by name.

Each identity has a centre; a face should be nearer to its own than to others, by a margin. Where
pytorch-metric-learning has the loss, it is that one. It is slow to import, and so is this file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    CosFaceLoss,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
)
from torch import Tensor, nn

from idloss.errors import did_you_mean


class Margin(nn.Module):
    """A margin loss in float32, whatever autocast says, and the centres it learns.

    The loss's parameter `W` `[D, K]` holds the centres. Their lengths do not count, but a longer
    one turns less in a step: they begin with a deviation of 0.01 in insightface
    (recognition/arcface_torch/partial_fc_v2.py), of 1 in pytorch-metric-learning.
    """

    def __init__(self, loss: nn.Module, deviation: float = 0.01) -> None:
        super().__init__()
        self.loss = loss
        nn.init.normal_(loss.W, std=deviation)  # type: ignore[arg-type]

    @torch.compiler.disable
    def forward(self, embeddings: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        """The mean loss of embeddings `[B, D]`, not normalised, with labels `[B]` in 0 ... K-1.

        Margins that grow need the step, counted from 1; None is for their end.
        """
        self.loss.step = step  # type: ignore[assignment]
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.loss(embeddings.float(), labels)  # type: ignore[no-any-return]

    @torch.no_grad()
    def nearest(self, embeddings: Tensor) -> Tensor:
        """Whose centre is nearest to each of the embeddings `[B, D]`, int64 `[B]`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return (embeddings.float() @ F.normalize(self.loss.W, dim=0)).argmax(1)  # type: ignore[arg-type]


def softmax(num_identities: int, num_features: int, *, scale: float = 20.0) -> Margin:
    """Softmax over scaled cosines (Zhai and Wu, arXiv 1811.12649: temperature 0.05)."""
    _check(num_identities, scale=scale)
    return Margin(NormalizedSoftmaxLoss(num_identities, num_features, temperature=1 / scale))


class AnnealedSphereFaceLoss(SphereFaceLoss):
    """pytorch-metric-learning's A-Softmax, and what it lacks: lambda, the weight of no margin.

    The margin grows in the first steps, without which it hardly converges.
    """

    def __init__(self, *sizes: int, margin: int, base: float, decay: float, least: float) -> None:
        super().__init__(*sizes, margin=margin)
        self.step: Tensor | None = None
        self.base, self.decay, self.least = base, decay, least

    def modify_cosine_of_target_classes(self, cosine: Tensor) -> Tensor:
        """Blend psi, the margin's function of the cosine (paper, section 3.2), with the cosine."""
        hard: Tensor = super().modify_cosine_of_target_classes(cosine)
        easy: Tensor | float = self.least
        if self.step is not None:
            easy = (self.base / (1 + self.decay * self.step)).clamp(min=self.least)
        return (easy * cosine + hard) / (1 + easy)


def sphereface(
    num_identities: int,
    num_features: int,
    *,
    margin: int = 4,
    base: float = 1000.0,
    decay: float = 0.12,
    least: float = 5.0,
) -> Margin:
    """A-Softmax, which multiplies the angle (Liu et al., CVPR 2017, arXiv 1704.08063).

    The embedding's length scales its cosines. As in the authors' code (wy1iu/sphereface,
    sphereface_model.prototxt) the target's cosine counts lambda times beside psi, lambda =
    max(least, base / (1 + decay * step)). A margin of 4 is that of the paper's best networks.
    """
    _check(num_identities, margin=margin)
    if margin != int(margin):
        raise ValueError(f"margin of 'sphereface' is a whole factor of the angle, got {margin}")
    annealing = {"base": base, "decay": decay, "least": least}
    for name, value in annealing.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    loss = AnnealedSphereFaceLoss(num_identities, num_features, margin=int(margin), **annealing)
    return Margin(loss, num_features**-0.5)  # margin_inner_product_layer.cpp: of length 1


def cosface(
    num_identities: int, num_features: int, *, margin: float = 0.35, scale: float = 64.0
) -> Margin:
    """Margin taken from the cosine (Wang et al., CVPR 2018, arXiv 1801.09414, section 4)."""
    _check(num_identities, margin=margin, scale=scale)
    return Margin(CosFaceLoss(num_identities, num_features, margin=margin, scale=scale))


class SteadyArcFaceLoss(ArcFaceLoss):
    """pytorch-metric-learning's, whose gradient is infinite where face and centre coincide."""

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        """Keep cosines where the arc cosine has a slope: below 700 in float32."""
        cosine: Tensor = super().get_cosine(embeddings)
        return cosine.clamp(-1 + 1e-6, 1 - 1e-6)


def arcface(
    num_identities: int, num_features: int, *, margin: float = 0.5, scale: float = 64.0
) -> Margin:
    """Margin added to the angle, in radians (Deng et al., CVPR 2019, arXiv 1801.07698, 3.1)."""
    _check(num_identities, margin=margin, scale=scale)
    if margin >= math.pi / 2:
        raise ValueError(f"margin of 'arcface' is in radians, below pi / 2, got {margin}")
    degrees = math.degrees(margin)  # as pytorch-metric-learning counts
    return Margin(SteadyArcFaceLoss(num_identities, num_features, margin=degrees, scale=scale))


class AdaFaceLoss(nn.Module):
    """A margin that adapts to image quality, for which the embedding's length stands.

    Like those of batch norm, its running statistics are of what one process computes in one go.
    """

    EPS = 1e-3  # authors' head.py: cosines and angles keep that far from where slopes are infinite
    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self, *sizes: int, margin: float, scale: float, concentration: float, momentum: float
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(*sizes[::-1]))
        self.margin, self.scale = margin, scale
        self.concentration, self.momentum = concentration, momentum
        # head.py begins so: at first every face has about mean quality, and the margin is CosFace's
        self.register_buffer("running_mean", torch.tensor(20.0))
        self.register_buffer("running_std", torch.tensor(100.0))

    def quality(self, embeddings: Tensor) -> Tensor:
        """How each length compares with others', in [-1, 1] `[B, 1]`, after taking note of it."""
        lengths = embeddings.detach().norm(dim=1, keepdim=True).clamp(0.001, 100)  # head.py
        if self.training and len(lengths) > 1:  # one has no deviation
            self.running_mean.lerp_(lengths.mean(), 1 - self.momentum)
            self.running_std.lerp_(lengths.std(), 1 - self.momentum)
        deviations: Tensor = (lengths - self.running_mean) / (self.running_std + self.EPS)
        return (self.concentration * deviations).clamp(-1, 1)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of embeddings `[B, D]`, not normalised, with labels `[B]`."""
        quality = self.quality(embeddings)
        cosines = F.normalize(embeddings) @ F.normalize(self.W, dim=0)
        cosines = cosines.clamp(self.EPS - 1, 1 - self.EPS)
        own = labels[:, None]
        angles = cosines.gather(1, own).acos() - self.margin * quality
        hard = angles.clamp(self.EPS, math.pi - self.EPS).cos() - self.margin * (1 + quality)
        return F.cross_entropy(self.scale * cosines.scatter(1, own, hard), labels)


def adaface(
    num_identities: int,
    num_features: int,
    *,
    margin: float = 0.4,
    scale: float = 64.0,
    concentration: float = 0.333,
    momentum: float = 0.99,
) -> Margin:
    """Margin that adapts to image quality (Kim et al., CVPR 2022, arXiv 2204.00964).

    Poor faces meet ArcFace's margin, average faces CosFace's, and good faces one that is hard on
    hard ones. Margin m is of the paper's section 4, scale s and h, how much of the faces lie
    between the extremes, of the authors' head.py (mk-minchul/AdaFace), and what stays of the
    running statistics 1 - `t_alpha` of their config.py.
    """
    _check(num_identities, margin=margin, scale=scale)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    options = {"scale": scale, "concentration": concentration, "momentum": momentum}
    loss = AdaFaceLoss(num_identities, num_features, margin=margin, **options)
    return Margin(loss, num_features**-0.5)  # head.py: of length 1


MARGINS: dict[str, Callable[..., Margin]] = {
    make.__name__: make for make in (softmax, sphereface, cosface, arcface, adaface)
}


def check_margin(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a margin that there is not, or options that it does not have."""
    if name not in MARGINS:
        raise ValueError(did_you_mean("margin", name, MARGINS))
    known = inspect.getfullargspec(MARGINS[name]).kwonlyargs
    for option in options:
        if option not in known:
            raise ValueError(did_you_mean(f"option of margin {name!r}", option, known))


def get_margin(name: str, num_identities: int, num_features: int, **options: Any) -> Margin:
    """Make one of `MARGINS` over K identities and embeddings of width D, with its options."""
    check_margin(name, options)
    return MARGINS[name](num_identities, num_features, **options)


def _check(num_identities: int, *, margin: float = 1.0, scale: float = 1.0) -> None:
    if num_identities < 2:
        raise ValueError(f"telling identities apart takes at least 2, got {num_identities}")
    for name, value in (("margin", margin), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"{name} must be above zero, got {value}")
