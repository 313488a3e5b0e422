"""Prepared faces: photos aligned once, kept as crops that training reads without decoding.

A prepared folder holds `crops.npy` (uint8 `[M, 3, H, W]`, mapped into memory), `index.csv` (a row
for each crop: its photo, person, points, place in `crops.npy`, and the hashes of photo and crop),
`dropped.csv` and `dataset.json`: what was asked for and, once all is done, what came of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor

from idloss.data.faces import (
    convert_crops,
    number_identities,
    positions,
    select_labels,
    template_landmarks,
)
from idloss.data.files import DataError, Fault
from idloss.data.overlap import Match
from idloss.data.tables import POINT_COLUMNS, read_rows
from idloss.geometry import Template, get_template
from idloss.weights.files import written_whole

FORMAT = 2
CROPS, INDEX, DROPPED, DATASET = "crops.npy", "index.csv", "dropped.csv", "dataset.json"
COLUMNS = {
    INDEX: ("image_id", "identity", *POINT_COLUMNS, "row", "photo", "hash"),
    DROPPED: ("name", "reason", "detail", "photo"),
}
HASH_BYTES = 16
"""128 bits: a hash tells damage and copies apart, nobody forges a training face."""

Pixels = NDArray[np.uint8]


class Dropped(NamedTuple):
    """A photo, or a line of a table, that gave no crop: why, in detail, and the photo's hash."""

    name: str
    reason: str
    detail: str = ""
    photo: str = ""

    def fault(self) -> Fault:
        """The same, as data sets keep what they left out."""
        return Fault(self.name, f"{self.reason}: {self.detail}" if self.detail else self.reason)


@dataclass(frozen=True, eq=False)
class PreparedFaces:
    """Aligned crops in a prepared folder, a `Faces`; also a map-style set of (crop, label) pairs.

    It holds no pixels: copies for other processes are small, and the page cache is shared.

    Attributes:
        folder: The prepared folder.
        places: Crops in its file, those of dropped photos included.
        rows: Where each face is among them, int64 `[N]`.
        names: One name a crop.
        labels: Identities as int64 `[N]` in 0 ... K-1, -1 for nobody known, or None.
        identities: The K names of the identities, sorted.
        photo_landmarks: Five points in each photo, float64 `[N, 5, 2]`, nan for none.
        hashes: Hash of each crop.
        crop: The template the crops are aligned to.
        skipped: What was dropped, and why.
    """

    folder: Path
    places: int
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
        total = hashlib.sha256(self.crop.encode())
        for row in zip(self.names, self.hashes, strict=True):
            total.update(repr(row).encode())
        return total.hexdigest()

    @cached_property
    def pixels(self) -> Pixels:
        """All crops as they lie on the disk, uint8 `[places, 3, H, W]`."""
        path, shape = self.folder / CROPS, (self.places, 3, *get_template(self.crop).size)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError, OverflowError) as error:
            there = f"{path.stat().st_size:,}" if path.is_file() else "no"
            what = f"{there} bytes, where {self.places:,} crops belong ({error})"
            raise damaged(path, what) from error
        if mapped.dtype != np.uint8 or mapped.shape != shape or not mapped.flags.c_contiguous:
            what = f"holds {mapped.dtype} {list(mapped.shape)}, expected uint8 {list(shape)}"
            raise damaged(path, what)
        # a plain array over the same pages: np.memmap costs time at every access
        return cast(Pixels, mapped.view(np.ndarray))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), -1 if self.labels is None else int(self.labels[index])

    def __getstate__(self) -> dict[str, Any]:
        # a copy maps the crops anew
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    def read(self, index: int) -> Tensor:
        """One crop, uint8 RGB `[3, H, W]`."""
        return self.crops_at([index])[0]

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
        rows = self.rows.index_select(0, torch.as_tensor(indices, dtype=torch.int64)).tolist()
        pixels = self.pixels
        gathered = np.empty((len(rows), *pixels.shape[1:]), dtype=np.uint8)
        # crop by crop: half again as fast as a fancy index, which copies twice
        for slot, row in zip(gathered, rows, strict=True):
            slot[...] = pixels[row]
        crops = torch.from_numpy(gathered)
        return crops if crop is None else convert_crops(crops, self.crop, crop)

    def select(self, keep: Tensor) -> PreparedFaces:
        """A view of the same folder; no pixel is read."""
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

    def verify(self, *, progress: bool = True) -> None:
        """Compare every crop with its hash, and raise a DataError that names those damaged."""
        faults = []
        every = zip(self.names, self.rows.tolist(), self.hashes, strict=True)
        for name, row, own in tqdm(every, "verifying", len(self), delay=2, disable=not progress):
            if (found := crop_hash(self.pixels[row]).hex()) != own:
                faults.append(Fault(name, f"damaged: its hash is {found}, the index has {own}"))
        if faults:
            raise DataError(faults, f"Delete {self.folder} and prepare the faces anew.")


@dataclass(frozen=True, eq=False)
class Report:
    """What came of a preparation.

    Attributes:
        faces: The prepared faces.
        dropped: How many photos were dropped, by reason; `dropped.csv` names them.
        duplicates: How many crops equal one before them, pixel by pixel; they are kept.
        matches: What was found in an evaluation set too, and removed.
        unchecked: Photos of the evaluation set that could not be read: people who are only there
            may still be among the faces.
    """

    faces: PreparedFaces
    dropped: Mapping[str, int]
    duplicates: int
    matches: tuple[Match, ...]
    unchecked: tuple[Fault, ...]


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether `idloss prepare` made, or began to make, the folder at a path."""
    return (Path(path).expanduser() / DATASET).is_file()


def open_prepared(path: str | os.PathLike[str]) -> PreparedFaces:
    """Open a prepared folder; its crops are mapped, not read.

    Args:
        path: What `prepare` wrote.

    Returns:
        The faces.

    Raises:
        FileNotFoundError: Nothing was prepared there.
        DataError: The preparation is not finished, or files are missing or damaged; names them.
    """
    return read_report(Path(path).expanduser()).faces


def read_report(folder: Path) -> Report:
    """What `prepare` returned when it filled a folder."""
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"no prepared faces at {folder} (there is no {DATASET}); "
            f"make them with: idloss prepare KIND PHOTOS {folder}"
        )
    if not is_finished(folder):
        remedy = "Run the same 'idloss prepare' again: it goes on from there."
        raise DataError([Fault(str(folder), "the preparation is not finished")], remedy)
    dataset, rows, dropped = read_record(folder), read_table(folder, INDEX), read_dropped(folder)
    try:
        points = [[float(cell) for cell in row[2:12]] for row in rows]
        places = torch.tensor([int(row[12]) for row in rows], dtype=torch.int64)
    except (ValueError, OverflowError) as error:
        raise damaged(folder / INDEX, f"unreadable numbers ({error})") from error
    try:
        crop = get_template(str(dataset.get("crop"))).name
    except ValueError as error:  # perhaps of a plug-in that is not there
        raise DataError([Fault(str(folder / DATASET), str(error))]) from error
    try:
        labels, identities = number_identities(row[1] or None for row in rows)
        faces = PreparedFaces(
            folder=folder,
            places=int(dataset["photos"]),
            rows=places,
            names=tuple(row[0] for row in rows),
            labels=labels if dataset["labelled"] else None,
            identities=identities if dataset["labelled"] else (),
            photo_landmarks=torch.tensor(points, dtype=torch.float64).reshape(-1, 5, 2),
            hashes=tuple(row[14] for row in rows),
            crop=crop,
            skipped=tuple(one.fault() for one in dropped),
        )
        matches = tuple(Match(*match) for match in dataset["matches"])
        unchecked = tuple(Fault(*fault) for fault in dataset["unchecked"])
        counts, duplicates = dict(Counter(one.reason for one in dropped)), dataset["duplicates"]
        if len(faces) != dataset["faces"] or faces.content != dataset["content"]:
            raise damaged(folder / INDEX, f"not the index that {DATASET} was written with")
    except (KeyError, TypeError, OverflowError) as error:
        raise damaged(folder / DATASET, f"not as it was written ({error!r})") from error
    if len(rows) and not 0 <= int(places.min()) <= int(places.max()) < len(faces.pixels):
        raise damaged(folder / INDEX, f"rows beyond the {len(faces.pixels)} crops")
    return Report(faces, counts, int(duplicates), matches, unchecked)


def crop_hash(crop: Pixels) -> bytes:
    """Hash of a crop's bytes, channel by channel and row by row: BLAKE2b."""
    return hashlib.blake2b(crop.data, digest_size=HASH_BYTES).digest()


def is_finished(folder: Path) -> bool:
    """Whether all is done in a folder."""
    return is_prepared(folder) and "content" in read_record(folder)


def read_table(folder: Path, name: str) -> list[list[str]]:
    """The rows of one of a folder's tables."""
    try:
        return read_rows(folder / name, COLUMNS[name])
    except (OSError, ValueError) as error:
        raise damaged(folder / name, str(error)) from error


def read_dropped(folder: Path) -> list[Dropped]:
    """The photos that gave no crop."""
    return [Dropped(*row) for row in read_table(folder, DROPPED)]


def write_record(folder: Path, content: Mapping[str, object]) -> None:
    """Write `dataset.json`, whole or not at all."""
    with written_whole(folder / DATASET) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, "utf-8", "surrogateescape")


def read_record(folder: Path) -> dict[str, Any]:
    """What `dataset.json` holds, if it is of this format."""
    path = folder / DATASET
    try:
        content = json.loads(path.read_text("utf-8", "surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        what = f"prepared faces of format {version}, this version of idloss reads {FORMAT}"
        raise damaged(path, what)
    return dict(content)


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a prepared folder that is not as it was written."""
    return DataError([Fault(str(path), what)], f"Delete {path.parent} and prepare the faces anew.")
