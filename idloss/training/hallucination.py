"""The paper's task: an SRNet between an image loss and an identity loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from idloss.degradation import Degradation, draw_batch, mirror
from idloss.losses import HallucinationLoss
from idloss.resample import Size, to_float
from idloss.training.crops import Crops
from idloss.training.task import Batch, Draw


class Hallucination(nn.Module):
    """An SRNet with its losses: what is trained, compiled and wrapped as one.

    Args:
        srnet: RGB [0, 1] `[B, 3, h, w]` to RGB `[B, 3, scale * h, scale * w]`.
        criterion: Compares SR with HR.
    """

    def __init__(self, srnet: nn.Module, criterion: HallucinationLoss) -> None:
        super().__init__()
        self.srnet = srnet
        self.criterion = criterion

    def forward(
        self, lr: Tensor, hr: Tensor, target_features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Super-resolve faces and compare them with their originals.

        Args:
            lr: RGB [0, 1] `[B, 3, h, w]`.
            hr: RGB [0, 1] `[B, 3, H, W]`.
            target_features: HR features `[B, D]`, instead of running the FNet on `hr`.

        Returns:
            `"loss"`, and its parts before weighting: `"image"` and, if there is one, `"identity"`.
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
        content: Hash of the faces.
        features: What `stored_features` gave, `[2, N, D]`; None to run the FNet on HR each step.
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
        content: str,
        features: Tensor | None = None,
        channels_last: bool = True,
    ) -> None:
        self.module = module
        self.crops = crops
        self.sizes = sizes
        self.degradation = degradation
        self.seed = seed
        self.content = content
        self.features: Tensor | None = None
        if features is not None:
            self.take_features(features)
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    @property
    def network(self) -> nn.Module:
        """The SRNet."""
        return self.module.srnet

    def __len__(self) -> int:
        return len(self.crops.faces)

    def take_features(self, features: Tensor) -> None:
        """Spare each step the FNet's pass over HR.

        Args:
            features: What `stored_features` gave, `[2, N, D]`; kept where the crops are.
        """
        resident = self.crops.resident is not None
        self.features = features.to(self.crops.device) if resident else features

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """LR, HR and, where they are stored, HR features of each draw."""
        for draw, crops in self.crops.read(draws):
            yield self.batch(draw, crops)

    def batch(self, draw: Draw, crops: Tensor) -> Batch:
        """Degrade the crops of one draw.

        Args:
            draw: Which step and faces.
            crops: uint8 RGB `[B, 3, H, W]`.

        Returns:
            Inputs of the module.
        """
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
