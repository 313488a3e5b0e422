"""What is to be prepared: photos of a source with their people, all or those of a clean list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from idloss.data.faces import Faces, FileFaces, cut_crops
from idloss.data.files import Fault, skip_or_raise
from idloss.data.packing import Dropped
from idloss.data.pairs import index_of
from idloss.data.tables import read_own_table, read_points
from idloss.geometry import Template

UNLISTED = "not in the clean list"
ABSENT = "in the clean list, but not in the source"
HEADERS = frozenset({"path", "name", "image", "image_id", "file", "filename"})
"""First fields that no image is called; `path` is that of the paper's list."""
COLUMNS = 11
"""Fields of a row with five points: a name and ten numbers."""


@dataclass(frozen=True, eq=False)
class Photos:
    """Some photos of a source, a `Faces` themselves for what aligns them.

    Attributes:
        source: where their pixels are.
        rows: their positions in it, int64 `[N]`.
        names: the name of each.
        people: the name of each one's identity, empty where it is not known.
        landmarks: five points a photo, float64 `[N, 5, 2]`, nan where there are none.
        labels: None: identities are in `people`.
        identities: none likewise.
        skipped: nothing: what the source left out is told elsewhere.
    """

    source: Faces
    rows: Tensor
    names: tuple[str, ...]
    people: tuple[str, ...]
    landmarks: Tensor
    labels: None = None
    identities: tuple[str, ...] = ()
    skipped: tuple[Fault, ...] = ()

    @staticmethod
    def of(source: Faces) -> Photos:
        """All photos of a source."""
        count = len(source)
        labels = [-1] * count if source.labels is None else source.labels.tolist()
        points = source.landmarks
        if points is None:
            points = torch.full((count, 5, 2), torch.nan, dtype=torch.float64)
        return Photos(
            source=source,
            rows=torch.arange(count),
            names=tuple(source.names),
            people=tuple("" if label < 0 else source.identities[label] for label in labels),
            landmarks=points,
        )

    @property
    def crop(self) -> str | None:
        """The template the source is aligned to, if it is."""
        return self.source.crop

    @property
    def content(self) -> str:
        """Hash of the source."""
        return self.source.content

    def digest(self, index: int) -> bytes:
        """SHA-256 of a photo."""
        return self.source.digest(int(self.rows[index]))

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Some photos as crops `[B, 3, H, W]`; see `Faces.crops_at`."""
        return cut_crops(self, indices, crop, faults=faults)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Tensor:
        """One photo, uint8 RGB `[3, H, W]`."""
        return self.source.read(int(self.rows[index]))

    def select(self, kept: Tensor) -> Photos:
        """The photos at some positions, int64."""
        return replace(
            self,
            rows=self.rows[kept],
            names=tuple(self.names[i] for i in kept.tolist()),
            people=tuple(self.people[i] for i in kept.tolist()),
            landmarks=self.landmarks[kept],
        )

    @property
    def origin(self) -> str:
        """The name of the folder, archive or class that the photos are from."""
        if isinstance(self.source, FileFaces):
            return Path(self.source.files.location).name
        return type(self.source).__name__

    def describe(self) -> dict[str, object]:
        """What tells these photos from others: counts and hashes of their tables."""
        return {
            "faces": len(self),
            "labelled": self.source.labels is not None,
            "names": _digest(repr(self.names).encode()),
            "identities": _digest(repr(self.people).encode()),
            "landmarks": _digest(self.landmarks.contiguous().numpy().tobytes()),
        }


def keep_listed(photos: Photos, path: Path, *, skip_missing: bool) -> tuple[Photos, list[Dropped]]:
    """Keep the photos of a clean list, with its landmarks where it has some.

    The list is a text file whose rows begin with the name of an image, separated by commas or
    blanks; a header is allowed. Where rows go on with ten numbers these are the five points, as in
    `celeba_clean_landmarks.csv` of the paper's authors (`path,x1,y1,...,x5,y5`).

    Args:
        photos: those to choose from.
        path: the list.
        skip_missing: do without images of the list that are not there.

    Returns:
        The photos of the list in their old order, and what was dropped.

    Raises:
        DataError: the list has faults, or images that are not there; names file and line.
    """
    table = read_own_table(path)
    if all(len(cells) == 1 for _, cells in table.rows):
        table = read_own_table(path, None)
    positions = index_of(photos.names)
    if table.rows and _is_header(table.rows[0][1], positions):
        table = table.after(1)
    listed = {cells[0]: line for line, cells in table.rows}
    faults = [
        table.fault(line, f"{name} is not in the source")
        for name, line in listed.items()
        if name not in positions
    ]
    points = None
    if any(len(cells) >= COLUMNS for _, cells in table.rows):
        points = read_points(table)
        faults += points.faults
        listed = {name: line for name, line in listed.items() if name in points.by_name}
    skip_or_raise(faults, skip_missing=skip_missing)
    dropped = [Dropped(name, UNLISTED) for name in photos.names if name not in listed]
    dropped += [Dropped(name, ABSENT) for name in listed if name not in positions]
    chosen = photos.select(torch.tensor([i for n, i in positions.items() if n in listed]).long())
    if points is not None:
        chosen = replace(chosen, landmarks=points.stack(chosen.names))
    return chosen, dropped


def _is_header(cells: list[str], positions: dict[str, int]) -> bool:
    if cells[0] in positions:
        return False
    numbers = cells[1:COLUMNS]
    return cells[0].lower() in HEADERS or (
        len(cells) >= COLUMNS and not any(map(_is_number, numbers))
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
