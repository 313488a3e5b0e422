"""What can be trained: an SRNet between two losses, an FNet on identities or after a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from idloss.data import Faces
from idloss.degradation import Degradation, draw_batch, mirror
from idloss.encoder import FaceEncoder
from idloss.losses import HallucinationLoss, cosine_distance
from idloss.resample import Size, resize, to_float
from idloss.training.batches import Batch, Crops, Draw, generator_for

if TYPE_CHECKING:
    from idloss.training.margins import Margin  # slow to import

_LOW = 2  # purpose of the numbers that choose who is seen at low resolution


class Hallucination(nn.Module):
    """An SRNet with its losses: what is trained, compiled and wrapped as one."""

    def __init__(self, srnet: nn.Module, criterion: HallucinationLoss) -> None:
        super().__init__()
        self.srnet = srnet
        self.criterion = criterion

    def forward(
        self, lr: Tensor, hr: Tensor, target_features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of LR `[B, 3, h, w]` against HR `[B, 3, H, W]`, RGB [0, 1], by name.

        `"loss"`, and its parts before weighting: `"image"` and, if there is one, `"identity"`; HR
        features `[B, D]` spare the FNet's run on `hr`.
        """
        total, parts = self.criterion(self.srnet(lr), hr, target_features=target_features)
        return {"loss": total, **parts}


class HallucinationTask:
    """Faces made small at random, one size for each batch (paper, section 4.1).

    Args:
        module: SRNet and losses.
        crops: HR crops.
        sizes: LR sizes that batches are drawn at.
        degradation: From HR to LR.
        seed: Of the sizes, mirrorings and degradations.
        channels_last: Give images in that memory format.
    """

    def __init__(
        self,
        module: Hallucination,
        crops: Crops,
        sizes: tuple[Size, ...],
        degradation: Degradation,
        *,
        seed: int,
        channels_last: bool = True,
    ) -> None:
        self.module = module
        self.network = module.srnet
        self.crops = crops
        self.content = crops.faces.content
        self.sizes = sizes
        self.degradation = degradation
        self.seed = seed
        self.features: Tensor | None = None
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return len(self.crops.faces)

    def take_features(self, features: Tensor) -> None:
        """Spare each step the FNet's pass over HR by stored features `[2, N, D]`."""
        resident = self.crops.resident is not None
        self.features = features.to(self.crops.device) if resident else features

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """LR, HR and, where they are stored, HR features of each draw."""
        for draw, crops in self.crops.read(draws):
            yield self.batch(draw, crops)

    def batch(self, draw: Draw, crops: Tensor) -> Batch:
        """Degrade the crops of one draw, uint8 RGB `[B, 3, H, W]`."""
        chance = draw_batch(draw.step, draw.total, seed=self.seed, sizes=self.sizes)
        mirrored = chance.mirrored[draw.rows]
        hr = mirror(crops, mirrored.to(crops.device, non_blocking=True))
        lr = self.degradation(hr, chance.size, seeds=chance.seeds[draw.rows])
        batch = {
            "lr": lr.contiguous(memory_format=self.format),
            "hr": to_float(hr).contiguous(memory_format=self.format),
        }
        if self.features is not None:
            at = self.features.device
            rows = self.features[mirrored.long().to(at), draw.faces.to(at)]
            batch["target_features"] = rows.to(crops.device, non_blocking=True)
        return batch


class Recognition(nn.Module):
    """An FNet with a margin loss: what is trained, compiled and wrapped as one."""

    def __init__(self, fnet: nn.Module, margin: Margin) -> None:
        super().__init__()
        self.fnet = fnet
        self.margin = margin

    def forward(self, images: Tensor, labels: Tensor, step: Tensor) -> dict[str, Tensor]:
        """`"loss"` of FNet inputs `[B, 3, H, W]` with labels `[B]` at a step, and `"accuracy"`.

        The accuracy is the share of faces that are nearest to their own centre.
        """
        embeddings = self.fnet(images)
        right = self.margin.nearest(embeddings) == labels
        return {
            "loss": self.margin(embeddings, labels, step),
            "accuracy": right.float().mean(),
        }


class Distillation(nn.Module):
    """An FNet that learns the embeddings of a frozen one.

    Where their widths differ, a linear map that is learned and then dropped stands between them.
    """

    def __init__(self, fnet: nn.Module, teacher: FaceEncoder) -> None:
        super().__init__()
        self.fnet = fnet
        self.teacher = teacher
        width, wanted = int(fnet.num_features), teacher.num_features  # type: ignore[arg-type]
        self.projection = nn.Identity() if width == wanted else nn.Linear(width, wanted, bias=False)

    def forward(self, images: Tensor, faces: Tensor) -> dict[str, Tensor]:
        """`"loss"`, one minus the cosine of both embeddings.

        The FNet sees its inputs `[B, 3, h, w]`, the teacher the faces, RGB [0, 1] `[B, 3, H, W]`.
        """
        with torch.no_grad():
            targets = self.teacher(faces)
        embeddings = self.projection(self.fnet(images))
        return {"loss": cosine_distance(embeddings.float(), targets.float()).mean()}


@dataclass(frozen=True)
class LowResolution:
    """A share of faces that are made small and enlarged again, as a probe is that nobody restores.

    Args:
        share: In [0, 1].
        sizes: LR sizes, rows and columns; one is drawn for each batch.
        degradation: From HR to LR.
    """

    share: float
    sizes: tuple[Size, ...]
    degradation: Degradation

    def choose(self, draw: Draw, seed: int) -> list[int]:
        """Which rows of a draw are made small, by the seed of the run."""
        chance = torch.rand(draw.total, generator=generator_for(seed, _LOW, draw.step))
        places: list[int] = (chance[draw.rows] < self.share).nonzero().flatten().tolist()
        return places

    def __call__(self, faces: Tensor, size: Size, seeds: list[int]) -> Tensor:
        """Make uint8 faces `[B, 3, H, W]` small, with a seed each; gives float32 of their size."""
        lr = self.degradation(faces, size, seeds=seeds)
        return resize(lr, faces.shape[-2:], mode="bilinear")


class Views:
    """Crops on their way into an FNet: mirrored at random, some at low resolution.

    Args:
        crops: HR crops.
        fnet: From `create_fnet`; only what it says of its input matters.
        seed: Of mirrorings and degradations.
        low_resolution: What happens to a share of the faces; None for nothing.
        channels_last: Give images in that memory format.
    """

    def __init__(
        self,
        crops: Crops,
        fnet: nn.Module,
        *,
        seed: int,
        low_resolution: LowResolution | None = None,
        channels_last: bool = True,
    ) -> None:
        self.crops = crops
        self.input = input_of(fnet, crops.template.name).to(crops.device)
        self.seed = seed
        self.low = low_resolution
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def read(self, draws: Iterable[Draw]) -> Iterator[tuple[Draw, Tensor, Tensor]]:
        """Each draw, inputs of the FNet `[B, 3, h, w]`, and the faces `[B, 3, H, W]` as they were.

        The faces are RGB [0, 1], and mirrored like the inputs.
        """
        for draw, crops in self.crops.read(draws):
            faces, seen = self.view(draw, crops)
            images = self.input.preprocess(seen).contiguous(memory_format=self.format)
            yield draw, images, faces.contiguous(memory_format=self.format)

    def view(self, draw: Draw, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The uint8 crops of a draw mirrored, and what of them is to be seen, both RGB [0, 1]."""
        sizes = (self.crops.template.size,) if self.low is None else self.low.sizes
        chance = draw_batch(draw.step, draw.total, seed=self.seed, sizes=sizes)
        mirrored = mirror(crops, chance.mirrored[draw.rows].to(crops.device, non_blocking=True))
        faces = to_float(mirrored)
        chosen = () if self.low is None else self.low.choose(draw, self.seed)
        if self.low is None or not len(chosen):
            return faces, faces
        places = torch.tensor(chosen, device=crops.device)
        seeds = chance.seeds[draw.rows]
        low = self.low(mirrored[places], chance.size, [seeds[place] for place in chosen])
        return faces, faces.index_copy(0, places, low)


class RecognitionTask:
    """Labelled faces, to be told apart.

    Args:
        module: FNet and margin.
        views: The faces.

    Raises:
        ValueError: Faces are without identities, or identities without faces.
    """

    def __init__(self, module: Recognition, views: Views) -> None:
        self.module = module
        self.network = module.fnet
        self.views = views
        self.content = views.crops.faces.content
        self.labels = labels_of(views.crops.faces)

    def __len__(self) -> int:
        return len(self.views.crops.faces)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Input of the FNet, who is seen, and which step it is."""
        for draw, images, _ in self.views.read(draws):
            labels = self.labels[draw.faces].to(images.device, non_blocking=True)
            step = torch.full((), draw.step, device=images.device)
            yield {"images": images, "labels": labels, "step": step}


class DistillationTask:
    """Faces of anybody, to be embedded as a teacher does.

    Args:
        module: FNet and teacher.
        views: The faces.
    """

    def __init__(self, module: Distillation, views: Views) -> None:
        self.module = module
        self.network = module.fnet
        self.views = views
        self.content = views.crops.faces.content

    def __len__(self) -> int:
        return len(self.views.crops.faces)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Input of the FNet, and what the teacher sees."""
        for _, images, faces in self.views.read(draws):
            yield {"images": images, "faces": faces}


def only_labelled(faces: Faces) -> tuple[Faces, str]:
    """Leave out faces of nobody known and identities without faces, and say so in a line."""
    if faces.labels is None:
        return faces, ""
    kept = faces.select(faces.labels >= 0)
    counts = {
        "faces of nobody known": len(faces) - len(kept),
        "identities without faces": len(faces.identities) - len(kept.identities),
    }
    lost = [f"{count} {what}" for what, count in counts.items() if count]
    return (kept, f"left out: {', '.join(lost)}") if lost else (faces, "")


def labels_of(faces: Faces) -> Tensor:
    """Who faces are, int64 `[N]` in 0 ... K-1, if it is known of all, and all K are there."""
    if faces.labels is None:
        raise ValueError(
            "the faces have no identities to tell apart: give labelled ones, or a teacher to learn "
            "from"
        )
    unknown = int((faces.labels < 0).sum())
    if unknown:
        raise ValueError(f"{unknown} of {len(faces)} faces are of nobody known: leave them out")
    counts = faces.labels.bincount(minlength=len(faces.identities))
    if not counts.all():
        lacking = faces.identities[int(counts.argmin())]
        raise ValueError(f"identity {lacking!r} has no faces: leave it out")
    return faces.labels


def input_of(fnet: nn.Module, crop: str) -> FaceEncoder:
    """What brings crops to an FNet's input, as a FaceEncoder would, which freezes its FNet."""
    stand_in = nn.Identity()
    for name in ("pretrained_cfg", "num_features", "crop"):
        setattr(stand_in, name, getattr(fnet, name))
    return FaceEncoder(stand_in, crop=crop)
