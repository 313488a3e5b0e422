"""Aligned crops for each draw: from the device's memory, the host's, disk, or photos."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idloss.data import AlignedDataset, AlignedFaces, FileFaces, PackedFaces
from idloss.geometry import get_template
from idloss.training.task import Draw

Faces: TypeAlias = AlignedFaces | PackedFaces | FileFaces

DEVICE_SHARE = 1 / 3
"""Of a GPU's free memory that crops may take; networks and activations need the rest."""


class Crops:
    """Reads the crops of draws, ahead of time where they come from disk.

    Args:
        faces: Crops in memory or prepared, or photos, which are aligned as they are asked for.
        template: The crops' geometry.
        device: Where they go.
        keep: `"device"`, `"host"` or `"auto"`; see `RunOptions.crops`.
        workers: Processes that read photos, or prepared crops on their way to a GPU.

    Raises:
        ValueError: The faces are aligned to another template, or are photos that are to be kept on
            the device.
    """

    def __init__(
        self,
        faces: Faces,
        *,
        template: str = "sphereface",
        device: torch.device,
        keep: str = "auto",
        workers: int = 0,
    ) -> None:
        if faces.template not in (None, template):
            raise ValueError(
                f"the faces are aligned to {faces.template!r} and the recipe says "
                f"crop={template}: set crop={faces.template}, or prepare them anew"
            )
        self.faces = faces
        self.template = get_template(template)
        self.device = device
        self.workers = workers
        self.resident: Tensor | None = None
        if isinstance(faces, FileFaces):
            if keep == "device":
                raise ValueError("crops=device needs prepared faces: run 'idloss prepare' first")
        elif keep == "device" or (keep == "auto" and self._fits()):
            everything = faces.load() if isinstance(faces, PackedFaces) else faces
            self.resident = everything.crops.to(device)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        height, width = self.template.size
        return len(self.faces) * 3 * height * width < free * DEVICE_SHARE

    def read(self, draws: Iterable[Draw]) -> Iterator[tuple[Draw, Tensor]]:
        """The crops of each draw.

        Args:
            draws: Which faces.

        Yields:
            The draw, and its crops, uint8 RGB `[B, 3, H, W]`, on the device.
        """
        if self.resident is not None:
            for draw in draws:
                yield draw, self.resident.index_select(0, draw.faces.to(self.device))
            return
        if isinstance(self.faces, FileFaces):
            dataset: Dataset[Tensor] = _Decoded(self.faces, self.template.name)
            workers = self.workers
        else:
            dataset = _Held(self.faces)
            # a copy within the host's memory is faster than a worker's answer
            workers = min(self.workers, 1) if self.device.type == "cuda" else 0
        pending: deque[Draw] = deque()
        loader = DataLoader(
            dataset,
            batch_sampler=_positions(draws, pending),
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # its seeds of workers are not to come from the run's
        )
        for crops in loader:
            yield pending.popleft(), crops.to(self.device, non_blocking=True)


class _Held(Dataset[Tensor]):
    """Whole batches of crops that are aligned already."""

    def __init__(self, faces: AlignedFaces | PackedFaces) -> None:
        self.faces = faces

    def __getitems__(self, places: list[int]) -> Tensor:
        return self.faces.crops_at(torch.tensor(places))


class _Decoded(Dataset[Tensor]):
    """Whole batches of photos, aligned as they are asked for."""

    def __init__(self, faces: FileFaces, template: str) -> None:
        self.aligned = AlignedDataset(faces, template)

    def __getitems__(self, places: list[int]) -> Tensor:
        return torch.stack([crop for crop, _, _ in self.aligned.__getitems__(places)])


def _positions(draws: Iterable[Draw], pending: deque[Draw]) -> Iterator[list[int]]:
    """The faces of each draw, which is put by until its crops arrive."""
    for draw in draws:
        pending.append(draw)
        yield draw.faces.tolist()


def _as_it_is(crops: Any) -> Any:
    return crops
