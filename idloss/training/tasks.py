"""What can be trained: an SRNet between two losses, an FNet on identities or after a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from idloss.data import Faces
from idloss.degradation import BatchDraw, Degradation, draw_batch, get_degradation, mirror
from idloss.encoder import FaceEncoder
from idloss.losses import HallucinationLoss, cosine_distance
from idloss.resample import resize, to_float
from idloss.training.batches import Batch, Crops, Draw, generator_for
from idloss.training.recipe import FNetRecipe, RunOptions

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


class FaceTask:
    """A module to train, and its batches, each made of its draw alone.

    `module`'s `forward(**batch)` gives losses by name, scalars that are means over the faces;
    `"loss"` is minimised. `network` is the part of it that is kept: averaged, validated, saved. A
    run is not resumed on data of another `content`.
    """

    def __init__(
        self,
        module: nn.Module,
        network: nn.Module,
        faces: Faces,
        recipe: RunOptions,
        device: torch.device,
        degradation: Degradation | None = None,
    ) -> None:
        self.module = module.to(device)
        self.network = network
        self.crops = Crops(faces, recipe, device)
        self.content = faces.content
        self.recipe = recipe
        self.sizes = recipe.lr_sizes()
        self.degradation = degradation or get_degradation(
            recipe.degradation, **recipe.degradation_options
        )
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return len(self.crops.faces)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Inputs of the module for each draw."""
        for draw, crops in self.crops.read(draws):
            yield self.batch(draw, crops)

    def batch(self, draw: Draw, crops: Tensor) -> Batch:
        """Inputs of the module for one draw, made of its crops, uint8 RGB `[B, 3, H, W]`."""
        raise NotImplementedError

    def mirror(self, draw: Draw, crops: Tensor) -> tuple[BatchDraw, Tensor]:
        """What chance has for a whole batch, and the crops of a draw, mirrored by it."""
        chance = draw_batch(draw.step, draw.total, seed=self.recipe.seed, sizes=self.sizes)
        mirrored = chance.mirrored[draw.rows].to(crops.device, non_blocking=True)
        return chance, mirror(crops, mirrored)


class HallucinationTask(FaceTask):
    """Faces made small at random, at one of the sizes for each batch (paper, section 4.1)."""

    features: Tensor | None = None

    def take_features(self, features: Tensor) -> None:
        """Spare each step the FNet's pass over HR by stored features `[2, N, D]`."""
        resident = self.crops.resident is not None
        self.features = features.to(self.crops.device) if resident else features

    def batch(self, draw: Draw, crops: Tensor) -> Batch:
        """LR, HR and, where they are stored, HR features."""
        chance, hr = self.mirror(draw, crops)
        lr = self.degradation(hr, chance.size, seeds=chance.seeds[draw.rows])
        batch = {
            "lr": lr.contiguous(memory_format=self.format),
            "hr": to_float(hr).contiguous(memory_format=self.format),
        }
        if self.features is not None:
            at = self.features.device
            mirrored = chance.mirrored[draw.rows].long().to(at)
            rows = self.features[mirrored, draw.faces.to(at)]
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
        loss = self.margin(embeddings, labels, step)
        return {"loss": loss, "accuracy": right.float().mean()}


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


class FNetTask(FaceTask):
    """Faces on their way into an FNet, some of them at low resolution.

    These are made small and enlarged again, as a probe is that nobody restores. A `Recognition`
    gets who is seen and which step it is, too; a `Distillation` the faces as they were.
    """

    recipe: FNetRecipe

    def __init__(
        self,
        module: Recognition | Distillation,
        faces: Faces,
        recipe: FNetRecipe,
        device: torch.device,
    ) -> None:
        super().__init__(module, module.fnet, faces, recipe, device)
        self.input = input_of(module.fnet, recipe.crop).to(device)
        self.labels = faces.labels if isinstance(module, Recognition) else None

    def batch(self, draw: Draw, crops: Tensor) -> Batch:
        """Input of the FNet, and what its lesson needs."""
        chance, mirrored = self.mirror(draw, crops)
        faces = to_float(mirrored)
        chosen = self.choose(draw)
        seen = faces
        if chosen:
            places = torch.tensor(chosen, device=crops.device)
            seeds = [chance.seeds[draw.rows][place] for place in chosen]
            lr = self.degradation(mirrored[places], chance.size, seeds=seeds)
            seen = faces.index_copy(0, places, resize(lr, faces.shape[-2:], mode="bilinear"))
        batch = {"images": self.input.preprocess(seen).contiguous(memory_format=self.format)}
        if self.labels is None:
            return batch | {"faces": faces.contiguous(memory_format=self.format)}
        labels = self.labels[draw.faces].to(crops.device, non_blocking=True)
        return batch | {"labels": labels, "step": torch.full((), draw.step, device=crops.device)}

    def choose(self, draw: Draw) -> list[int]:
        """Which rows of a draw are made small, by the seed of the run."""
        chance = torch.rand(draw.total, generator=generator_for(self.recipe.seed, _LOW, draw.step))
        small = chance[draw.rows] < self.recipe.low_resolution
        places: list[int] = small.nonzero().flatten().tolist()
        return places


def only_labelled(faces: Faces) -> tuple[Faces, str]:
    """Leave out faces of nobody known and identities without faces, and say so in a line."""
    if faces.labels is None:
        raise ValueError(
            "the faces have no identities to tell apart: give labelled ones, or a teacher to learn "
            "from"
        )
    kept = faces.select(faces.labels >= 0)
    counts = {
        "faces of nobody known": len(faces) - len(kept),
        "identities without faces": len(faces.identities) - len(kept.identities),
    }
    lost = [f"{count} {what}" for what, count in counts.items() if count]
    return (kept, f"left out: {', '.join(lost)}") if lost else (faces, "")


def input_of(fnet: nn.Module, crop: str) -> FaceEncoder:
    """What brings crops to an FNet's input, as a FaceEncoder would, which freezes its FNet."""
    stand_in = nn.Identity()
    for name in ("pretrained_cfg", "num_features", "crop"):
        setattr(stand_in, name, getattr(fnet, name))
    return FaceEncoder(stand_in, crop=crop)
