"""The identity-preserved loss (paper, equations 2 and 3) and the whole objective (1 and 4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idloss.encoder import CUT, FaceEncoder, is_differentiated, passes_gradient
from idloss.geometry import Template
from idloss.plugins import Registry
from idloss.resample import (
    ImageWatch,
    check_images,
    has_values,
    is_computed,
    resize,
    to_float,
    to_uint8,
)

Distance = Callable[[Tensor, Tensor], Tensor]
ImageLoss = Callable[[Tensor, Tensor], Tensor]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine, in [0, 2] (paper, equation 3); 1 where an embedding is zero."""
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-8)


def euclidean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of the normalised embeddings, in [0, 4]: twice the cosine distance."""
    return (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1)


def angular_distance(a: Tensor, b: Tensor) -> Tensor:
    """Angle between two embeddings as a share of half a turn."""
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    # its gradient stays finite at 0 and 180 degrees, where that of the arc cosine does not
    return torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)) * (2 / math.pi)


def l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 norm of the difference of the raw embeddings: a sum over features, not a mean."""
    return (a - b).abs().sum(dim=1)


DISTANCES: Final[Registry[Distance]] = Registry(
    "distance",
    cosine=cosine_distance,
    euclidean=euclidean_distance,
    angular=angular_distance,
    l1=l1_distance,
)
_IMAGE_LOSSES: Final[Registry[ImageLoss]] = Registry(
    "image loss", l1=F.l1_loss, mse=F.mse_loss, huber=F.huber_loss
)


def register_distance(name: str, distance: Distance) -> None:
    """Let a distance be asked for by name, in losses and in recipes.

    Args:
        name: Its name, which no other distance has.
        distance: From two `[B, D]` tensors to `[B]`.
    """
    DISTANCES.register(name, distance)


def register_image_loss(name: str, image_loss: ImageLoss) -> None:
    """Let an image loss be asked for by name, in losses and in recipes.

    Args:
        name: Its name, which no other image loss has.
        image_loss: From SR and MR, both `[B, 3, h, w]` in [-1, 1], to a scalar.
    """
    _IMAGE_LOSSES.register(name, image_loss)


def get_distance(distance: str | Distance) -> Distance:
    """A distance by its name, or a callable, which is given back."""
    return DISTANCES.find(distance) if isinstance(distance, str) else distance


def get_image_loss(image_loss: str | ImageLoss) -> ImageLoss:
    """An image loss by its name, or a callable, which is given back."""
    return _IMAGE_LOSSES.find(image_loss) if isinstance(image_loss, str) else image_loss


class IdentityPreservedLoss(nn.Module):
    """Distance between the embeddings of super-resolved faces and of their originals.

    Lai, He and Lam, ICIP 2019, equations 2 and 3. The FNet is frozen (see `FaceEncoder`): the loss
    has no parameters, an empty `state_dict()`, and is not to be wrapped in DDP; wrap the SR
    network. Distances are taken in float32 at least. NaN images give a NaN loss. The first call in
    training finds out whether SR's gradient passes through the FNet, also compiled and inside the
    transforms of `torch.func`; in `torch.jit.trace`, `make_fx` and under fake tensors that cannot
    be seen: call it once before. In eager mode images are looked at now and then for what is legal
    and surely not meant.

    Args:
        fnet: The face recogniser: a name, a module (see `FaceEncoder`), a sequence of these, or a
            mapping of these to their weights. Several form an ensemble whose loss is the weighted
            mean of the distances.
        distance: `"cosine"`, `"euclidean"` (squared, of normalised embeddings), `"angular"`,
            `"l1"`, what `register_distance` was given, or a callable from two `[B, D]` tensors to
            `[B]`.
        reduction: `"mean"`, `"sum"` or `"none"`.
        crop: Template the images are aligned to, which an SRNet carries: `crop=srnet.crop`. See
            `FaceEncoder`.
        value_range: Lowest and highest value of the images.
        **encoder_options: Passed on to `FaceEncoder`: `pretrained`, `interpolation`, `flip`,
            `channel_order`, and what `create_fnet` takes.

    Example:
        >>> identity_loss = IdentityPreservedLoss("sface", crop="sphereface")
        >>> loss = image_loss + 0.5 * identity_loss(sr, hr)
    """

    def __init__(
        self,
        fnet: str | nn.Module | Sequence[str | nn.Module] | Mapping[Any, float] = "sface",
        *,
        distance: str | Distance = "cosine",
        reduction: Literal["mean", "sum", "none"] = "mean",
        crop: str | Template | None = None,
        value_range: tuple[float, float] = (0.0, 1.0),
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.distance = get_distance(distance)  # before weights are fetched in vain
        if isinstance(fnet, Mapping):
            pairs = list(fnet.items())
        elif isinstance(fnet, Sequence) and not isinstance(fnet, str):
            pairs = [(net, 1.0) for net in fnet]
        else:
            pairs = [(fnet, 1.0)]
        if not pairs or any(not 0 < weight < math.inf for _, weight in pairs):
            raise ValueError(f"an ensemble needs FNets with weights above zero, got {fnet!r}")
        self.encoders = nn.ModuleList(
            FaceEncoder(net, crop=crop, value_range=value_range, **encoder_options)
            for net, _ in pairs
        )
        total = sum(weight for _, weight in pairs)
        self.fnet_weights = tuple(weight / total for _, weight in pairs)
        self.value_range = value_range
        self.reduction = reduction
        self.num_features = sum(encoder.num_features for encoder in self._encoders())
        self._watch = ImageWatch(value_range)
        self._inspected: set[str] = set()

    def _encoders(self) -> list[FaceEncoder]:
        return list(self.encoders)  # type: ignore[arg-type]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Embed HR images once, to be given as `target_features` later.

        Args:
            images: Face crops `[B, 3, H, W]` in `value_range`.

        Returns:
            Embeddings `[B, num_features]`; those of an ensemble are concatenated.
        """
        check_images(images, "hr")
        if not torch.compiler.is_compiling():
            self._inspect("hr", images)
        return torch.cat([encoder.embed(images) for encoder in self._encoders()], dim=1)

    def forward(
        self,
        sr: Tensor,
        hr: Tensor | None = None,
        *,
        target_features: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compare super-resolved faces with their originals.

        Args:
            sr: Super-resolved faces `[B, 3, h, w]` of any size, in `value_range`.
            hr: Their originals `[B, 3, H, W]` of any size; receives no gradient.
            target_features: What `embed(hr)` gave, `[B, num_features]`, instead of `hr`; then no
                HR forward pass is run.
            weight: Weight of each face, `[B]`; 0 leaves a face out, whatever it holds. A mean is
                the weighted one, as in `torch.nn.functional.l1_loss`.

        Returns:
            A scalar, or `[B]` for `reduction="none"`.

        Raises:
            RuntimeError: If the FNet or the distance cuts the gradient.
            ValueError: If the batch is empty, shapes do not fit, or not exactly one of `hr` and
                `target_features` is given.
        """
        check_images(sr, "sr")
        batch = sr.shape[0]
        if batch == 0:
            raise ValueError("sr is an empty batch: the loss of no faces is not defined")
        if (hr is None) == (target_features is None):
            raise ValueError("give exactly one of hr and target_features")
        if hr is not None:
            _check_hr(hr, batch)
        if weight is not None and weight.shape != (batch,):
            raise ValueError(f"weight must be [{batch}], got {list(weight.shape)}")
        if not torch.compiler.is_compiling():
            self._inspect_gradient(sr)
            self._inspect("sr", sr)
        if hr is not None:
            target_features = self.embed(hr)
        assert target_features is not None
        if target_features.shape != (batch, self.num_features):
            raise ValueError(
                f"target_features must be [{batch}, {self.num_features}] for this batch and "
                f"FNet, got {list(target_features.shape)}"
            )
        if weight is not None:
            # before the FNet: zero times the gradient of a NaN is NaN
            left_out = weight == 0
            sr = sr.masked_fill(left_out[:, None, None, None], self.value_range[0])
            target_features = target_features.masked_fill(left_out[:, None], 1.0)
        distances = self._distances(sr, target_features.detach())
        if weight is not None:
            distances = distances * weight
        if self.reduction == "none":
            return distances
        if self.reduction == "sum":
            return distances.sum()
        if weight is None:
            return distances.mean()
        tiny = torch.finfo(distances.dtype).tiny
        return distances.sum() / weight.to(distances.dtype).sum().clamp_min(tiny)

    def _distances(self, sr: Tensor, targets: Tensor) -> Tensor:
        encoders, terms = self._encoders(), []
        parts = targets.split([encoder.num_features for encoder in encoders], dim=1)
        for weight, encoder, part in zip(self.fnet_weights, encoders, parts, strict=True):
            # half precision turns the norm of a small embedding into zero or infinity
            a, b = (x if x.dtype == torch.float64 else x.float() for x in (encoder.embed(sr), part))
            terms.append(weight * self.distance(a, b))
        return torch.stack(terms).sum(dim=0)

    def _inspect_gradient(self, sr: Tensor) -> None:
        """Find out, once, whether SR has a gradient, and whether the distance lets it through."""
        if "gradient" in self._inspected or not torch.is_grad_enabled() or not is_computed(sr):
            return
        if is_differentiated(sr):
            self._inspected.add("gradient")
            like = torch.empty(1, self._encoders()[0].num_features, device=sr.device)
            if not passes_gradient(lambda noise: self.distance(noise, 1 - noise.detach()), like):
                raise RuntimeError(CUT.format("the distance"))
        elif self.training and has_values(sr):
            self._inspected.add("gradient")
            _warn("sr carries no gradient: none will reach the SR network. Was it detached?")

    def _inspect(self, name: str, images: Tensor) -> None:
        """Warn of what is legal and almost surely not meant."""
        drawn_yet = name != "sr" or not (self.training and images.requires_grad)
        complaint = self._watch.complaint(images, name, drawn_yet=drawn_yet)
        if complaint is not None and f"range of {name}" not in self._inspected:
            self._inspected.add(f"range of {name}")
            _warn(complaint)
        if name in self._inspected:
            return
        self._inspected.add(name)
        height, width = images.shape[-2:]
        for encoder in self._encoders():
            if encoder.stretches(height, width):
                _warn(
                    f"{name} is {height}x{width} and will be stretched for {encoder}. If it is "
                    "aligned to another template than the FNet's, pass crop= "
                    "('sphereface' is 112x96, 'arcface' 112x112)"
                )
            elif name == "hr" and complaint is None:
                doubt = encoder.alignment_complaint(images) if has_values(images) else None
                if doubt is not None:
                    _warn(doubt)


class HallucinationLoss(nn.Module):
    """Image loss plus lambda times identity loss (paper, equations 1 and 4).

    The image loss compares SR with MR, HR down-sampled to SR's size by OpenCV's bicubic rule, both
    taken to [-1, 1] whatever `value_range` is: the paper's lambda of 0.5 belongs to that scale.

    Args:
        identity: The identity loss: an `IdentityPreservedLoss`, or what its `fnet` takes. `None`
            leaves the image loss alone.
        weight: Lambda. With 0 no FNet is built or run, as with `identity=None`.
        image_loss: `"l1"` (the mean absolute difference, as in the released code), `"mse"`,
            `"huber"`, what `register_image_loss` was given, or a callable of SR and MR, both
            `[B, 3, h, w]` in [-1, 1].
        value_range: Lowest and highest value of the images.
        **identity_options: Passed on to `IdentityPreservedLoss` when `identity` names an FNet.

    Example:
        >>> criterion = HallucinationLoss("sface", weight=0.5, crop=srnet.crop)
        >>> total, parts = criterion(srnet(lr), hr)
    """

    def __init__(
        self,
        identity: IdentityPreservedLoss | Any | None = "sface",
        *,
        weight: float = 0.5,
        image_loss: str | ImageLoss = "l1",
        value_range: tuple[float, float] = (0.0, 1.0),
        **identity_options: Any,
    ) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight (lambda) must be finite and not negative, got {weight}")
        if isinstance(identity, IdentityPreservedLoss):
            if identity_options or identity.value_range != value_range:
                raise ValueError(
                    f"the identity loss is made already, with value_range={identity.value_range}: "
                    f"give {', '.join(['value_range', *identity_options])} to it"
                )
        elif identity is not None and weight > 0:
            identity = IdentityPreservedLoss(identity, value_range=value_range, **identity_options)
        self.identity: IdentityPreservedLoss | None = identity if weight > 0 else None
        self.weight = weight
        self.image_loss = get_image_loss(image_loss)
        self.value_range = value_range
        self._watch = ImageWatch(value_range)
        self._is_tried = False

    def medium_resolution(self, hr: Tensor, size: tuple[int, int]) -> Tensor:
        """HR `[B, 3, H, W]` to MR `[B, 3, *size]` in [0, 1], what SR is compared with."""
        low, high = self.value_range
        unit = hr if (low, high) == (0, 1) else (hr - low) / (high - low)
        # 8-bit on the way in as well: only so do ties fall as they do in the released code
        return to_float(resize(to_uint8(unit), size)).to(hr.dtype)

    def forward(
        self, sr: Tensor, hr: Tensor, *, target_features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the objective and its parts.

        Args:
            sr: Super-resolved faces `[B, 3, h, w]` in `value_range`, no larger than `hr`.
            hr: Their originals `[B, 3, H, W]`.
            target_features: What `self.identity.embed(hr)` gave; saves the HR forward pass.

        Returns:
            The total, a scalar with gradient, and its parts by name, `"image"` and `"identity"`
            (absent without an identity loss), both before weighting and detached.
        """
        check_images(sr, "sr")
        _check_hr(hr, sr.shape[0])
        if self.identity is None or target_features is not None:  # else it looks at HR
            complaint = self._watch.complaint(hr, "hr")
            if complaint is not None:
                _warn(complaint)
        low, high = self.value_range
        with torch.no_grad():
            target = self.medium_resolution(hr, (sr.shape[-2], sr.shape[-1])) * 2 - 1
        if not self._is_tried and is_computed(sr) and is_differentiated(sr):
            self._is_tried = True
            if not passes_gradient(lambda noise: self.image_loss(noise, -noise.detach()), target):
                raise RuntimeError(CUT.format("the image loss"))
        total = self.image_loss((sr - low) * (2 / (high - low)) - 1, target)
        parts = {"image": total.detach()}
        if self.identity is not None:
            seen = hr if target_features is None else None
            identity = self.identity(sr, seen, target_features=target_features)
            parts["identity"] = identity.detach()
            total = total + self.weight * identity
        return total, parts


def _check_hr(hr: Tensor, batch: int) -> None:
    check_images(hr, "hr")
    if hr.shape[0] != batch:
        raise ValueError(f"hr holds {hr.shape[0]} faces and sr {batch}: they go in pairs")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
