"""Photos to aligned crops: one at a time for a loader, or all at once in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor
from torch.utils.data import Dataset

from idloss.data.faults import DataError, Fault, settle
from idloss.data.source import FaceSource, positions, select_labels
from idloss.geometry import Template, convert_crop, fit_similarity, get_template, warp
from idloss.resample import to_float, to_uint8

BICUBIC_REACH = 2
"""Pixels beyond a sampling point that a bicubic kernel reads."""
BATCH_PIXELS = 1 << 20
"""Source pixels warped at once: 12 MB of float RGB, so that a batch stays near the caches."""
BATCH_IMAGES = 64
"""Faces warped at once: enough to hide the overhead of a call, few enough to share out."""


@dataclass(frozen=True, eq=False)
class AlignedFaces:
    """Aligned crops in memory; also a map-style data set of (crop, label) pairs.

    Attributes:
        crops: uint8 RGB `[N, 3, H, W]`.
        names: one name a crop.
        labels: identities as int64 `[N]` in 0 ... K-1, or None.
        identities: the K names of the identities.
        template: the template the crops are aligned to.
        skipped: what was left out, and why.
    """

    crops: Tensor
    names: tuple[str, ...]
    labels: Tensor | None
    identities: tuple[str, ...]
    template: str
    skipped: tuple[Fault, ...] = ()

    @property
    def landmarks(self) -> Tensor:
        """The template's points for each crop, float64 `[N, 5, 2]`."""
        return template_landmarks(self.template, len(self))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.crops[index], -1 if self.labels is None else int(self.labels[index])

    def read(self, index: int) -> Tensor:
        """One crop, uint8 RGB `[3, H, W]`."""
        return self.crops[index]

    def crops_at(self, index: Tensor) -> Tensor:
        """Copy some crops.

        Args:
            index: their positions, int64 `[B]`.

        Returns:
            uint8 RGB `[B, 3, H, W]`.

        Raises:
            IndexError: there is no such position.
        """
        # whole crops at a time: ten times as fast as self.crops[index] on bytes
        return self.crops.index_select(0, index)

    def select(self, keep: Tensor) -> AlignedFaces:
        """The crops at some positions; identities that lose all their faces go.

        Args:
            keep: int64 positions, or a bool mask `[N]`.

        Returns:
            A copy of those crops.
        """
        kept = positions(keep)
        labels, identities = select_labels(self.labels, self.identities, kept)
        return replace(
            self,
            crops=self.crops[kept],
            names=tuple(self.names[i] for i in kept.tolist()),
            labels=labels,
            identities=identities,
        )


def template_landmarks(template: str, count: int) -> Tensor:
    """The points of faces that are aligned to a template.

    Args:
        template: its name.
        count: number of faces N.

    Returns:
        float64 `[N, 5, 2]`, the same for each.
    """
    points = torch.as_tensor(get_template(template).points, dtype=torch.float64)
    return points.expand(count, 5, 2)


class AlignedDataset(Dataset[tuple[Tensor, int, str]]):
    """Faces aligned as they are asked for, for a `DataLoader` with workers.

    Items are (crop uint8 RGB `[3, H, W]`, label or -1, name).

    Args:
        source: photos with landmarks, or crops of another template.
        template: the crops' geometry.
    """

    def __init__(self, source: FaceSource, template: str | Template = "sphereface") -> None:
        self.source = source
        self.template = get_template(template)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, str]]:
        """Items for a whole batch at once, which a `DataLoader` prefers."""
        crops = align_some(self.source, indices, self.template)
        labels = self.source.labels
        return [
            (crop, -1 if labels is None else int(labels[i]), self.source.names[i])
            for crop, i in zip(crops, indices, strict=True)
        ]


def align_all(
    source: FaceSource,
    template: str | Template = "sphereface",
    *,
    skip_missing: bool = False,
    threads: int | None = None,
    progress: bool | Callable[[int], object] = True,
) -> AlignedFaces:
    """Align all faces of a source in memory, 32 kB a face at 112x96.

    Args:
        source: photos with landmarks, or crops of another template.
        template: the crops' geometry.
        skip_missing: leave out photos that cannot be read or aligned.
        threads: decoding threads; None for one a core, eight at most.
        progress: show a progress bar when it takes more than two seconds; or what to tell of every
            few faces that are done, such as the `update` of a bar that stands for more.

    Returns:
        The crops, in the source's order.

    Raises:
        DataError: photos cannot be read or aligned; names each.
    """
    target = get_template(template)
    crops = torch.empty(len(source), 3, *target.size, dtype=torch.uint8)
    faults: dict[int, Fault] = {}

    def work(indices: list[int]) -> int:
        try:
            crops[indices] = align_some(source, indices, target)
        except ValueError as error:
            if len(indices) > 1:
                return sum(work([index]) for index in indices)
            found = error.faults[0] if isinstance(error, DataError) else None
            faults[indices[0]] = found or Fault(source.names[indices[0]], str(error))
        return len(indices)

    workers = threads or min(8, os.cpu_count() or 1)
    own = progress is True
    bar = tqdm(total=len(source), desc="aligning", unit="face", delay=2, disable=not own)
    tell = progress if callable(progress) else bar.update
    with bar, ThreadPoolExecutor(workers) as pool:
        for done in pool.map(work, _batches(source, target)):
            tell(done)
    skipped = settle((faults[i] for i in sorted(faults)), skip_missing=skip_missing)
    aligned = AlignedFaces(
        crops=crops,
        names=tuple(source.names),
        labels=source.labels,
        identities=tuple(source.identities),
        template=target.name,
        skipped=(*source.skipped, *skipped),
    )
    if not skipped:
        return aligned
    good = torch.ones(len(source), dtype=torch.bool)
    good[list(faults)] = False
    return aligned.select(good)


def align_some(source: FaceSource, indices: Sequence[int], template: Template) -> Tensor:
    """Read and align a few faces, in one warp.

    Only the part of a photo that the crop sees is kept; what lies outside the photo is black, as
    in the released code.

    Args:
        source: photos with landmarks, or crops of another template.
        indices: which faces, `B` of them.
        template: the crops' geometry.

    Returns:
        uint8 RGB `[B, 3, H, W]`.

    Raises:
        DataError: a photo cannot be read, or its face lies outside it.
        ValueError: landmarks cannot be fitted; names the face.
    """
    names = [source.names[i] for i in indices]
    images = [source.read(i) for i in indices]
    if source.template == template.name and all(x.shape[1:] == template.size for x in images):
        return torch.stack(images)
    if source.template is not None:
        convert = partial(convert_crop, source=source.template, target=template)
        return torch.cat([to_uint8(convert(to_float(image[None]))) for image in images])
    matrices = fit_similarity(_points(source, indices), template, names=names).double()
    windows = []
    for image, box, name in zip(images, _boxes(matrices, template), names, strict=True):
        height, width = image.shape[1:]
        left, top, right, bottom = box
        if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
            raise DataError([Fault(name, f"the landmarks lie outside the {width}x{height} photo")])
        left, top = max(left, 0), max(top, 0)
        windows.append((image[:, top:bottom, left:right], left, top))
    tallest = max(window.shape[1] for window, _, _ in windows)
    widest = max(window.shape[2] for window, _, _ in windows)
    batch = torch.zeros(len(windows), 3, tallest, widest)
    for slot, (window, _, _) in zip(batch, windows, strict=True):
        slot[:, : window.shape[1], : window.shape[2]] = to_float(window)
    # moving a photo's origin to (left, top) adds A @ (left, top) to the shift
    origin = torch.tensor([[left, top] for _, left, top in windows], dtype=torch.float64)
    shift = matrices[:, :, 2:] + matrices[:, :, :2] @ origin[:, :, None]
    moved = torch.cat([matrices[:, :, :2], shift], dim=2)
    return to_uint8(warp(batch, moved, template.size))


def _points(source: FaceSource, indices: Sequence[int]) -> Tensor:
    if source.landmarks is None:
        raise DataError([Fault(source.names[indices[0]], "there are no landmarks to align it by")])
    return source.landmarks[list(indices)]


def _boxes(matrices: Tensor, template: Template) -> list[list[int]]:
    """What a crop sees of its photo, in whole pixels: left, top, right, bottom (exclusive)."""
    height, width = template.size
    corners = torch.tensor(
        [[0.0, 0.0], [width - 1, 0.0], [0.0, height - 1], [width - 1, height - 1]],
        dtype=matrices.dtype,
    )
    linear, shift = matrices[:, :, :2], matrices[:, :, 2]
    seen = torch.linalg.solve(linear[:, None], (corners[None] - shift[:, None])[..., None])[..., 0]
    low = seen.amin(1).floor() - BICUBIC_REACH
    high = seen.amax(1).ceil() + BICUBIC_REACH + 1
    # far outside any photo is all the same, and fits an int
    boxes: list[list[int]] = torch.cat([low, high], 1).clamp(-1e9, 1e9).long().tolist()
    return boxes


def _batches(source: FaceSource, template: Template) -> Iterator[list[int]]:
    """Faces of a like size together, so that little of a padded batch is padding."""
    everything = torch.arange(len(source))
    if source.template is not None or source.landmarks is None:
        yield from (part.tolist() for part in everything.split(BATCH_IMAGES))
        return
    spread = source.landmarks.amax(1) - source.landmarks.amin(1)
    # a crop is about 3.2 times as wide and high as the spread of its five points
    sides = (3.2 * spread.amax(1)).nan_to_num(0.0).clamp(1, 1e4)
    batch: list[int] = []
    for index in sides.argsort().tolist():
        pixels = (len(batch) + 1) * float(sides[index]) ** 2
        if batch and (len(batch) == BATCH_IMAGES or pixels > BATCH_PIXELS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
