"""What studies of the identity loss try: losses and networks of their own, and usual mistakes.

    python examples/study.py faces zoo/studies/hypotheses.yaml --out study
    python examples/study.py faces zoo/studies/factors.yaml --out study

A study's variants ask for distances, degradations and SRNets by the names that they are registered
with here; those that are named in `LOSSES` are trained with what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from idloss import (
    HallucinationLoss,
    IdentityPreservedLoss,
    create_fnet,
    create_srnet,
    register_distance,
    register_srnet,
)
from idloss.degradation import register_degradation
from idloss.resample import resize, to_float
from idloss.training import Recipe


def info_nce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Each face nearer to its own original than to the others of the batch (InfoNCE), `[B]`."""
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    if len(a) == 1:
        return 1 - cosines[:, 0]
    own = torch.arange(len(a), device=a.device)
    loss: Tensor = temperature * F.cross_entropy(cosines / temperature, own, reduction="none")
    return loss


def norm_weighted(a: Tensor, b: Tensor) -> Tensor:
    """Cosine distance, where faces weigh as the norm of their original's embedding, `[B]`."""
    weights: Tensor = b.norm(dim=1) / b.norm(dim=1).mean()
    return (1 - F.cosine_similarity(a, b)) * weights


register_distance("info_nce", info_nce)
register_distance("norm_weighted", norm_weighted)


@register_degradation("antialiased")
class AntialiasedDegradation:
    """Bicubic down-sampling as Pillow and Matlab do it, where every pixel of HR has its say."""

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small, as `idloss.degradation.Degradation` says."""
        lr: Tensor = to_float(resize(hr, size, convention="antialias"))
        return lr


@register_srnet
def edsr16_64_icnr(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EDSR whose up-samplers begin as nearest neighbour (Aitken et al., arXiv:1707.02937)."""
    network = create_srnet("edsr16_64_id", **kwargs)
    for convolution in network.upsample:  # type: ignore[union-attr]
        for values in convolution.parameters():
            values.data = values.data[::4].repeat_interleave(4, dim=0)
    return network


class Enlarged(nn.Module):
    """EDSR on faces that are first enlarged to a quarter of HR, so that SR is as large as HR."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.network = create_srnet("edsr16_64_id", **kwargs)
        self.num_classes, self.num_features = 0, 64

    def forward(self, x: Tensor) -> Tensor:
        """RGB `[B, 3, H, W]` in [0, 1] to `[B, 3, 112, 96]`."""
        sr: Tensor = self.network(resize(x, (28, 24)))
        return sr


@register_srnet
def edsr16_64_enlarged(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EDSR on faces of 28x24, whatever size they come in."""
    return Enlarged(**kwargs)


class OfFNet(nn.Module):
    """Something around an FNet, which takes the same crops."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.fnet: Any = create_fnet(name, pretrained=True).eval()
        self.pretrained_cfg, self.crop = self.fnet.pretrained_cfg, self.fnet.crop
        self.num_features = self.fnet.num_features


class Moved(OfFNet):
    """SR faces shifted, turned and scaled by up to 6 %, each by its own draw."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB to embeddings; HR, which has no gradient, stays where it is."""
        if x.requires_grad:
            dx, dy, turn, zoom = 0.06 * (2 * torch.rand(4, len(x), device=x.device) - 1)
            lines = [torch.stack([1 + zoom, -turn, dx], 1), torch.stack([turn, 1 + zoom, dy], 1)]
            grid = F.affine_grid(torch.stack(lines, 1), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid.to(x.dtype), padding_mode="border", align_corners=False)
        embeddings: Tensor = self.fnet(x)
        return embeddings


class Layers(OfFNet):
    """The embedding and the maps of the last two stages of a backbone of timm, alike in weight."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        size: tuple[int, ...] = self.fnet.pretrained_cfg["input_size"]
        with torch.no_grad():
            self.num_features = self(torch.zeros(1, *size)).shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB to embedding and maps, each of norm 1, side by side."""
        found: list[Tensor] = []
        stages: Any = next(m for n, m in self.fnet.named_modules() if n.endswith("stages"))
        hooks = [
            stage.register_forward_hook(lambda *a: found.append(a[2])) for stage in stages[-2:]
        ]
        found.append(self.fnet(x))
        for hook in hooks:
            hook.remove()
        return torch.cat([F.normalize(one.flatten(1), dim=1) for one in found], dim=1)


class BatchStatistics(_BatchNorm):
    """Batch norm by the mean and variance of the batch, as in a network left in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, ...]`."""
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class TrainMode(OfFNet):
    """An FNet whose user forgot `eval()`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        for module in self.fnet.modules():
            if isinstance(module, _BatchNorm):
                module.__class__ = BatchStatistics

    def forward(self, x: Tensor) -> Tensor:
        """Normalised RGB to embeddings, each dependent on the other faces of its batch."""
        embeddings: Tensor = self.fnet(x)
        return embeddings


class Drawn(IdentityPreservedLoss):
    """One of several FNets for each batch, at the cost of one."""

    def forward(  # type: ignore[override]  # a weight for each face is refused, not passed over
        self, sr: Tensor, hr: Tensor | None = None, *, target_features: Tensor | None = None
    ) -> Tensor:
        """Its mean distance between `sr` and `hr`, or the `target_features` of them all."""
        if target_features is None:
            assert hr is not None
            target_features = self.embed(hr)
        place = int(torch.randint(len(self.encoders), ()))
        widths = [int(encoder.num_features) for encoder in self.encoders]  # type: ignore[arg-type]
        features = self.encoders[place](sr).float()
        return self.distance(features, target_features.split(widths, dim=1)[place]).mean()


class WarmedUp(HallucinationLoss):
    """Lambda that rises from zero in so many steps, and once more where a run goes on."""

    def __init__(self, *arguments: Any, steps: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.full, self.done, self.steps = self.weight, 0, steps

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """As `HallucinationLoss`."""
        self.done += 1
        self.weight = self.full * min(1.0, self.done / self.steps)
        return super().forward(*arguments, **options)


def losses(
    recipe: Recipe,
    fnet: Any,
    identity: type[IdentityPreservedLoss] = IdentityPreservedLoss,
    kind: Callable[..., HallucinationLoss] = HallucinationLoss,
    **encoder_options: Any,
) -> HallucinationLoss:
    """What a recipe asks for, but for what is given."""
    asked = identity(fnet, crop=recipe.crop, distance=recipe.distance, **encoder_options)
    return kind(asked, weight=recipe.identity_weight, image_loss=recipe.image_loss)


def moved(recipe: Recipe) -> HallucinationLoss:
    """Losses whose FNets see each face a little elsewhere."""
    fnets = recipe.fnet if isinstance(recipe.fnet, dict) else {recipe.fnet: 1.0}
    return losses(recipe, {Moved(name): weight for name, weight in fnets.items()})


LOSSES: dict[str, Callable[[Recipe], HallucinationLoss]] = {
    "moved": moved,
    "both_moved": moved,
    "both_moved_contrastive": moved,
    "layers": lambda recipe: losses(recipe, Layers(str(recipe.fnet))),
    "drawn": lambda recipe: losses(recipe, recipe.fnet, Drawn),
    "warmed_up": lambda recipe: losses(
        recipe, recipe.fnet, kind=partial(WarmedUp, steps=math.ceil(recipe.iterations / 2))
    ),
    "train_mode": lambda recipe: losses(recipe, TrainMode(str(recipe.fnet))),
    "bgr": lambda recipe: losses(recipe, recipe.fnet, channel_order="bgr"),
}
"""What a variant of that name is trained with, from its recipe."""
