"""Two tasks for an FNet: to tell identities apart, and to embed faces as a teacher does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from idloss.degradation import Degradation, draw_batch, mirror
from idloss.encoder import FaceEncoder
from idloss.losses import cosine_distance
from idloss.resample import Size, resize, to_float
from idloss.training.crops import Crops, Faces
from idloss.training.task import Batch, Draw, generator_for

if TYPE_CHECKING:
    from idloss.training.margins import Margin

_LOW = 2  # purpose of the numbers that choose who is seen at low resolution


class Recognition(nn.Module):
    """An FNet with a margin loss: what is trained, compiled and wrapped as one.

    Args:
        fnet: Normalised RGB `[B, 3, H, W]` to embeddings `[B, D]`.
        margin: Loss over identities.
    """

    def __init__(self, fnet: nn.Module, margin: Margin) -> None:
        super().__init__()
        self.fnet = fnet
        self.margin = margin

    def forward(self, images: Tensor, labels: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Embed faces and compare them with the centres of identities.

        Args:
            images: Input of the FNet, `[B, 3, H, W]`.
            labels: Who they are, int64 `[B]`.
            step: Which step it is, a scalar.

        Returns:
            `"loss"`, and `"accuracy"`: the share of faces nearest to their own centre.
        """
        embeddings = self.fnet(images)
        right = self.margin.nearest(embeddings) == labels
        return {
            "loss": self.margin(embeddings, labels, step),
            "accuracy": right.float().mean(),
        }


class Distillation(nn.Module):
    """An FNet that learns the embeddings of a frozen one.

    Args:
        fnet: Normalised RGB `[B, 3, H, W]` to embeddings `[B, D]`.
        teacher: RGB [0, 1] crops to embeddings `[B, E]`. Where E is not D, a linear map that is
            learned and then dropped stands between the two.
    """

    def __init__(self, fnet: nn.Module, teacher: FaceEncoder) -> None:
        super().__init__()
        self.fnet = fnet
        self.teacher = teacher
        width, wanted = int(fnet.num_features), teacher.num_features  # type: ignore[arg-type]
        self.projection = nn.Identity() if width == wanted else nn.Linear(width, wanted, bias=False)

    def forward(self, images: Tensor, faces: Tensor) -> dict[str, Tensor]:
        """Embed faces with both and compare.

        Args:
            images: Input of the FNet, `[B, 3, H, W]`.
            faces: The same faces for the teacher, RGB [0, 1] `[B, 3, H, W]`.

        Returns:
            `"loss"`: one minus the cosine of the two embeddings.
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
        """Whom it is to happen to.

        Args:
            draw: Which step and faces.
            seed: Of the run.

        Returns:
            Positions in the draw.
        """
        chance = torch.rand(draw.total, generator=generator_for(seed, _LOW, draw.step))
        places: list[int] = (chance[draw.rows] < self.share).nonzero().flatten().tolist()
        return places

    def __call__(self, faces: Tensor, size: Size, seeds: list[int]) -> Tensor:
        """Make faces small and enlarge them.

        Args:
            faces: uint8 RGB `[B, 3, H, W]`.
            size: Rows and columns in between.
            seeds: One for each face.

        Returns:
            float32 RGB [0, 1] `[B, 3, H, W]`.
        """
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
        """The faces of each draw.

        Args:
            draws: Which.

        Yields:
            The draw, input of the FNet `[B, 3, h, w]`, and the faces as they were but for the
            mirroring, RGB [0, 1] `[B, 3, H, W]`.
        """
        for draw, crops in self.crops.read(draws):
            faces, seen = self.view(draw, crops)
            images = self.input(seen).contiguous(memory_format=self.format)
            yield draw, images, faces.contiguous(memory_format=self.format)

    def view(self, draw: Draw, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the crops of one draw to chance.

        Args:
            draw: Which step and faces.
            crops: uint8 RGB `[B, 3, H, W]`.

        Returns:
            The faces mirrored, and what the FNet is to see of them, both RGB [0, 1]
            `[B, 3, H, W]`.
        """
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


class FNetTask:
    """What the two tasks have in common.

    Args:
        module: FNet and loss.
        views: The faces.
        content: Hash of them.
    """

    def __init__(self, module: Recognition | Distillation, views: Views, *, content: str) -> None:
        self.module = module
        self.views = views
        self.content = content

    @property
    def network(self) -> nn.Module:
        """The FNet."""
        return self.module.fnet

    def __len__(self) -> int:
        return len(self.views.crops.faces)


class RecognitionTask(FNetTask):
    """Labelled faces, to be told apart.

    Args:
        module: FNet and margin.
        views: The faces.
        content: Hash of them.

    Raises:
        ValueError: Faces are without identities, or identities without faces.
    """

    def __init__(self, module: Recognition, views: Views, *, content: str) -> None:
        super().__init__(module, views, content=content)
        self.labels = labels_of(views.crops.faces)

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Input of the FNet, who is seen, and which step it is."""
        for draw, images, _ in self.views.read(draws):
            labels = self.labels[draw.faces].to(images.device, non_blocking=True)
            step = torch.full((), draw.step, device=images.device)
            yield {"images": images, "labels": labels, "step": step}


class DistillationTask(FNetTask):
    """Faces of anybody, to be embedded as a teacher does.

    Args:
        module: FNet and teacher.
        views: The faces.
        content: Hash of them.
    """

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Input of the FNet, and what the teacher sees."""
        for _, images, faces in self.views.read(draws):
            yield {"images": images, "faces": faces}


def labels_of(faces: Faces) -> Tensor:
    """Who faces are, if it is known of all.

    Args:
        faces: The faces.

    Returns:
        int64 `[N]` in 0 ... K-1.

    Raises:
        ValueError: Faces are without identities, or identities without faces.
    """
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
    """What brings crops to an FNet's input, as a FaceEncoder would, which freezes its FNet.

    Args:
        fnet: From `create_fnet`.
        crop: Template of the crops.

    Returns:
        RGB [0, 1] crops `[B, 3, H, W]` to the FNet's input.
    """
    stand_in = nn.Identity()
    for name in ("pretrained_cfg", "num_features", "crop"):
        setattr(stand_in, name, getattr(fnet, name))
    return FaceEncoder(stand_in, crop=crop)
