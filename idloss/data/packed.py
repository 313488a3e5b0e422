"""Prepared faces: aligned crops that training reads from disk with no decoding."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss.data.faces import (
    AlignedFaces,
    convert_crops,
    number_identities,
    positions,
    select_labels,
    template_landmarks,
)
from idloss.data.files import DataError, Fault
from idloss.data.packing import (
    DATASET,
    DROPPED,
    INDEX,
    PLAN,
    Index,
    damaged,
    index_part,
    read_dropped,
    read_json,
)
from idloss.data.shards import Shards, crop_hash
from idloss.geometry import Template

BATCH = 256
"""Crops copied at once where all are read: 8 MB at 112x96."""


@dataclass(frozen=True, eq=False)
class PackedFaces:
    """Aligned crops in a prepared folder; also a map-style data set of (crop, label) pairs.

    It holds no pixels: copies for other processes are small, and the page cache is shared.

    Attributes:
        folder: the prepared folder.
        shards: its crops.
        rows: where each face is in the shards, int64 `[N]`.
        names: one name a crop.
        labels: identities as int64 `[N]` in 0 ... K-1, -1 for nobody known; None where no identity
            is known.
        identities: the K names of the identities, sorted.
        photo_landmarks: five points in the photo of each crop, float64 `[N, 5, 2]`, nan where there
            were none.
        hashes: hash of each crop.
        crop: the template the crops are aligned to.
        skipped: what was dropped, and why.
    """

    folder: Path
    shards: Shards
    rows: Tensor
    names: tuple[str, ...]
    labels: Tensor | None
    identities: tuple[str, ...]
    photo_landmarks: Tensor
    hashes: tuple[str, ...]
    crop: str
    skipped: tuple[Fault, ...] = ()

    @property
    def landmarks(self) -> Tensor:
        """The template's points for each crop, float64 `[N, 5, 2]`."""
        return template_landmarks(self.crop, len(self))

    @cached_property
    def content(self) -> str:
        """Hash of these crops, 64 hex digits: of their template, names and pixels, in order."""
        return self.index.content(self.crop)

    @property
    def index(self) -> Index:
        """What is known of each crop, as a table."""
        labels = [-1] * len(self) if self.labels is None else self.labels.tolist()
        people = tuple("" if label < 0 else self.identities[label] for label in labels)
        return Index(self.names, people, self.photo_landmarks, self.hashes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), -1 if self.labels is None else int(self.labels[index])

    def read(self, index: int) -> Tensor:
        """One crop, uint8 RGB `[3, H, W]`."""
        return self.crops_at(torch.tensor([index]))[0]

    def digest(self, index: int) -> bytes:
        """SHA-256 of a crop's hash and template."""
        return hashlib.sha256(f"{self.crop}/{self.hashes[index]}".encode()).digest()

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Copies of some crops, uint8 RGB `[B, 3, H, W]`; see `Faces.crops_at`."""
        rows = self.rows.index_select(0, torch.as_tensor(indices))
        crops = torch.from_numpy(self.shards.gather(rows.numpy()))
        return crops if crop is None else convert_crops(crops, self.crop, crop)

    def select(self, keep: Tensor) -> PackedFaces:
        """The crops at some positions; identities that lose all their faces go.

        Args:
            keep: int64 positions, or a bool mask `[N]`.

        Returns:
            A view of the same folder; no pixel is read.
        """
        kept = positions(keep)
        labels, identities = select_labels(self.labels, self.identities, kept)
        return replace(
            self,
            rows=self.rows[kept],
            names=tuple(self.names[i] for i in kept.tolist()),
            labels=labels,
            identities=identities,
            photo_landmarks=self.photo_landmarks[kept],
            hashes=tuple(self.hashes[i] for i in kept.tolist()),
        )

    def load(self, *, progress: bool = True) -> AlignedFaces:
        """All crops in memory, 32 kB a face at 112x96.

        Args:
            progress: show a progress bar when it takes more than two seconds.

        Returns:
            A copy of them.
        """
        crops = torch.empty(len(self), 3, *self.shards.size, dtype=torch.uint8)
        for places in self._batches("loading", progress=progress):
            crops[places.start : places.stop] = self.crops_at(torch.tensor(places))
        return AlignedFaces(
            crops, self.names, self.labels, self.identities, self.crop, self.skipped
        )

    def verify(self, *, progress: bool = True) -> None:
        """Compare every crop with its hash.

        Args:
            progress: show a progress bar when it takes more than two seconds.

        Raises:
            DataError: crops are damaged; names them.
        """
        faults = []
        for places in self._batches("verifying", progress=progress):
            crops = self.crops_at(torch.tensor(places)).numpy()
            for place, crop in zip(places, crops, strict=True):
                if (found := crop_hash(crop)) != self.hashes[place]:
                    what = f"damaged: its hash is {found}, the index has {self.hashes[place]}"
                    faults.append(Fault(self.names[place], what))
        if faults:
            raise DataError(faults, f"Delete {self.folder} and prepare the faces anew.")

    def _batches(self, what: str, *, progress: bool) -> Iterator[range]:
        bar = tqdm(total=len(self), desc=what, unit="face", delay=2, disable=not progress)
        with bar:
            for start in range(0, len(self), BATCH):
                places = range(start, min(start + BATCH, len(self)))
                yield places
                bar.update(len(places))


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `idloss prepare` made, or began to make, the folder at a path."""
    return (Path(path).expanduser() / PLAN).is_file()


def open_packed(path: str | os.PathLike[str]) -> PackedFaces:
    """Open a prepared folder; its crops are mapped, not read.

    Args:
        path: what `prepare` wrote.

    Returns:
        The faces.

    Raises:
        FileNotFoundError: nothing was prepared there.
        DataError: the preparation is not finished, or files are missing or damaged; names them.
    """
    folder = Path(path).expanduser()
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"no prepared faces at {folder} (there is no {PLAN}); "
            f"make them with: idloss prepare KIND PHOTOS {folder}"
        )
    if not (folder / DATASET).is_file():
        done = sum(1 for _ in folder.glob(index_part("*")))
        what = f"the preparation is not finished, {done} shards are there"
        remedy = "Run the same 'idloss prepare' again: it goes on from there."
        raise DataError([Fault(str(folder), what)], remedy)
    dataset = read_json(folder / DATASET)
    index = Index.read(folder / INDEX)
    counts = {shard["file"]: shard["faces"] for shard in dataset["shards"]}
    total = sum(counts.values())
    if len(index) != total:
        raise damaged(
            folder / INDEX, f"{len(index)} rows for {total} crops in {len(counts)} shards"
        )
    if index.content(dataset["template"]) != dataset["content"]:
        raise damaged(folder / INDEX, f"not the index that {DATASET} was written with")
    skipped = tuple(dropped.fault() for dropped in read_dropped(folder / DROPPED))
    shards = Shards(folder, counts, tuple(dataset["size"]))
    return pack(shards, index, dataset["template"], labelled=dataset["labelled"], skipped=skipped)


def pack(
    shards: Shards,
    index: Index,
    crop: str,
    *,
    labelled: bool,
    skipped: tuple[Fault, ...] = (),
) -> PackedFaces:
    """Put shards and their index together.

    Args:
        shards: the crops.
        index: a row for each, in their order.
        crop: what they are aligned to.
        labelled: whether identities are known.
        skipped: what was dropped.

    Returns:
        The faces.
    """
    labels, identities = number_identities(person or None for person in index.people)
    return PackedFaces(
        folder=shards.folder,
        shards=shards,
        rows=torch.arange(len(index)),
        names=index.names,
        labels=labels if labelled else None,
        identities=identities,
        photo_landmarks=index.points,
        hashes=index.hashes,
        crop=crop,
        skipped=skipped,
    )
