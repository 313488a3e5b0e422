"""Losses that teach an FNet to tell identities apart, each with its margin, by name.

Each identity has a centre; a face should be nearer to its own than to others, by a margin. Where
pytorch-metric-learning has the loss, it is that one. It is slow to import, and so is this file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
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

    Args:
        loss: Gives the mean over faces of embeddings `[B, D]` and labels `[B]`. Its parameter `W`
            holds the centres, `[D, K]`. Their lengths do not count, but a longer one turns less
            in a step.
        deviation: Of the centres' values to begin with; 0.01 in insightface
            (recognition/arcface_torch/partial_fc_v2.py), 1 in pytorch-metric-learning.
    """

    def __init__(self, loss: nn.Module, deviation: float = 0.01) -> None:
        super().__init__()
        self.loss = loss
        nn.init.normal_(loss.W, std=deviation)  # type: ignore[arg-type]

    @torch.compiler.disable
    def forward(self, embeddings: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        """Judge embeddings.

        Args:
            embeddings: Of faces, `[B, D]`, not normalised.
            labels: Who they are, int64 `[B]` in 0 ... K-1.
            step: Which step it is, counted from 1, for margins that grow; None for their end.

        Returns:
            The mean loss, a scalar.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.loss(embeddings.float(), labels)  # type: ignore[no-any-return]

    @torch.no_grad()
    def nearest(self, embeddings: Tensor) -> Tensor:
        """Whose centre is nearest.

        Args:
            embeddings: Of faces, `[B, D]`.

        Returns:
            Labels, int64 `[B]`.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            return (embeddings.float() @ F.normalize(self.loss.W, dim=0)).argmax(1)  # type: ignore[arg-type]


def softmax(num_identities: int, num_features: int, *, scale: float = 20.0) -> Margin:
    """Softmax over scaled cosines, without a margin (Zhai and Wu, arXiv 1811.12649).

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        scale: Of the cosines: one over the temperature, 0.05 in the paper.

    Returns:
        The loss.
    """
    _check(num_identities, scale=scale)
    return Margin(NormalizedSoftmaxLoss(num_identities, num_features, temperature=1 / scale))


class AnnealedMargin(Margin):
    """A-Softmax whose margin grows in the first steps, without which it hardly converges.

    Args:
        loss: The loss.
        base: Lambda of the zeroth step.
        decay: How quickly it goes.
        least: What it comes down to.
    """

    def __init__(
        self, loss: AnnealedSphereFaceLoss, base: float, decay: float, least: float
    ) -> None:
        # authors' margin_inner_product_layer.cpp: of length 1
        super().__init__(loss, len(loss.W) ** -0.5)
        self.base = base
        self.decay = decay
        self.least = least

    @torch.compiler.disable
    def forward(self, embeddings: Tensor, labels: Tensor, step: Tensor | None = None) -> Tensor:
        """Judge embeddings; see `Margin`."""
        if step is not None:
            easy = (self.base / (1 + self.decay * step)).clamp(min=self.least)
        else:
            easy = embeddings.new_tensor(self.least, dtype=torch.float32)
        self.loss.easy = easy
        loss: Tensor = super().forward(embeddings, labels)
        return loss


class AnnealedSphereFaceLoss(SphereFaceLoss):
    """pytorch-metric-learning's A-Softmax, and what it lacks: lambda, the weight of no margin."""

    easy: Tensor

    def modify_cosine_of_target_classes(self, cosine: Tensor) -> Tensor:
        """Blend psi, the margin's function of the cosine (paper, section 3.2), with the cosine."""
        hard: Tensor = super().modify_cosine_of_target_classes(cosine)
        return (self.easy * cosine + hard) / (1 + self.easy)


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

    The embedding's length scales its cosines. pytorch-metric-learning has psi; the annealing is
    that of the authors' code (wy1iu/sphereface, sphereface_model.prototxt): the target's cosine
    counts lambda times beside psi, lambda = max(least, base / (1 + decay * step)).

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        margin: Factor of the angle, a whole number; 4 in the paper's best networks.
        base: Lambda of the zeroth step.
        decay: Of lambda.
        least: What it comes down to, after 1,658 steps.

    Returns:
        The loss.
    """
    _check(num_identities, margin=margin)
    if margin != int(margin):
        raise ValueError(f"margin of 'sphereface' is a whole factor of the angle, got {margin}")
    for name, value in (("base", base), ("decay", decay), ("least", least)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    loss = AnnealedSphereFaceLoss(num_identities, num_features, margin=int(margin))
    return AnnealedMargin(loss, base, decay, least)


def cosface(
    num_identities: int, num_features: int, *, margin: float = 0.35, scale: float = 64.0
) -> Margin:
    """Cosine margin (Wang et al., CVPR 2018, arXiv 1801.09414, equation 4).

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        margin: Taken from the cosine (0.35: paper, section 4).
        scale: Of the cosines (64: paper, section 4).

    Returns:
        The loss.
    """
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
    """Angular margin (Deng et al., CVPR 2019, arXiv 1801.07698, equation 3).

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        margin: Added to the angle, radians (0.5: paper, section 3.1); pytorch-metric-learning
            counts in degrees.
        scale: Of the cosines (64: paper, section 3.1).

    Returns:
        The loss.
    """
    _check(num_identities, margin=margin, scale=scale)
    if margin >= math.pi / 2:
        raise ValueError(f"margin of 'arcface' is in radians, below pi / 2, got {margin}")
    degrees = math.degrees(margin)
    return Margin(SteadyArcFaceLoss(num_identities, num_features, margin=degrees, scale=scale))


class AdaFaceLoss(nn.Module):
    """A margin that adapts to image quality, for which the embedding's length stands.

    Like those of batch norm, its running statistics are of what one process computes in one go.

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        margin: m.
        scale: s.
        concentration: h.
        momentum: What stays of the running statistics.
    """

    EPS = 1e-3  # authors' head.py: cosines and angles keep that far from where slopes are infinite
    running_mean: Tensor
    running_std: Tensor

    def __init__(
        self,
        num_identities: int,
        num_features: int,
        *,
        margin: float,
        scale: float,
        concentration: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(num_features, num_identities))
        self.margin = margin
        self.scale = scale
        self.concentration = concentration
        self.momentum = momentum
        # head.py begins so: at first every face has about mean quality, and the margin is CosFace's
        self.register_buffer("running_mean", torch.tensor(20.0))
        self.register_buffer("running_std", torch.tensor(100.0))

    def quality(self, embeddings: Tensor) -> Tensor:
        """How an embedding's length compares with others', after taking note of it.

        Args:
            embeddings: `[B, D]`.

        Returns:
            In [-1, 1], without gradient, `[B, 1]`.
        """
        lengths = embeddings.detach().norm(dim=1, keepdim=True).clamp(0.001, 100)  # head.py
        if self.training and len(lengths) > 1:  # one has no deviation
            self.running_mean.lerp_(lengths.mean(), 1 - self.momentum)
            self.running_std.lerp_(lengths.std(), 1 - self.momentum)
        deviations: Tensor = (lengths - self.running_mean) / (self.running_std + self.EPS)
        return (self.concentration * deviations).clamp(-1, 1)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Judge embeddings.

        Args:
            embeddings: `[B, D]`, not normalised.
            labels: Who they are, int64 `[B]`.

        Returns:
            The mean loss, a scalar.
        """
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

    Poor faces meet ArcFace's margin, which is hard on easy ones, average faces CosFace's, and good
    faces one that is hard on hard ones.

    Args:
        num_identities: K.
        num_features: Width D of the embeddings.
        margin: m (0.4: paper, section 4).
        scale: s of the cosines (64: authors' head.py).
        concentration: h, how much of the faces lie between the extremes (0.333: head.py).
        momentum: What stays of the running mean and deviation of lengths: 1 - `t_alpha` of the
            authors' code (mk-minchul/AdaFace, config.py: 0.01).

    Returns:
        The loss.
    """
    _check(num_identities, margin=margin, scale=scale)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    loss = AdaFaceLoss(
        num_identities,
        num_features,
        margin=margin,
        scale=scale,
        concentration=concentration,
        momentum=momentum,
    )
    return Margin(loss, num_features**-0.5)  # head.py: of length 1


MARGINS: Mapping[str, Callable[..., Margin]] = MappingProxyType(
    {
        "softmax": softmax,
        "sphereface": sphereface,
        "cosface": cosface,
        "arcface": arcface,
        "adaface": adaface,
    }
)
"""Margin losses by name."""


def check_margin(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a margin that there is not, or options that it does not have.

    Args:
        name: One of `MARGINS`.
        options: Its arguments.

    Raises:
        ValueError: The name or an option is unknown.
    """
    if name not in MARGINS:
        raise ValueError(did_you_mean("margin", name, MARGINS))
    parameters = inspect.signature(MARGINS[name]).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(did_you_mean(f"option of margin {name!r}", option, known))


def get_margin(name: str, num_identities: int, num_features: int, **options: Any) -> Margin:
    """Make a margin loss.

    Args:
        name: One of `MARGINS`.
        num_identities: K, at least 2.
        num_features: Width D of the embeddings.
        **options: Its arguments, such as `scale`.

    Returns:
        The loss, its centres drawn from torch's random numbers.

    Raises:
        ValueError: The name or an option is unknown, or an option is out of range.
    """
    check_margin(name, options)
    return MARGINS[name](num_identities, num_features, **options)


def _check(num_identities: int, *, margin: float = 1.0, scale: float = 1.0) -> None:
    if num_identities < 2:
        raise ValueError(f"telling identities apart takes at least 2, got {num_identities}")
    for name, value in (("margin", margin), ("scale", scale)):
        if not value > 0:
            raise ValueError(f"{name} must be above zero, got {value}")
