"""Prepared faces: photos aligned once, kept as crops that training reads without decoding.

A prepared folder holds `crops.npy` (uint8 `[M, 3, H, W]`, mapped into memory), `hashes.npy` (of
each crop and of its photo; zeros where there is none yet), `index.csv` (a row for each face: its
photo, person, points and place among the crops), `dropped.csv` and `dataset.json`: what was asked
for and, once all is done, what came of it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idloss.data.faces import AlignedCrops, number_identities, positions, selected
from idloss.data.files import DataError, Fault
from idloss.data.landmarks import POINT_COLUMNS
from idloss.data.overlap import Match
from idloss.geometry import get_template
from idloss.weights.files import written_whole

FORMAT = 3
"""Of the folder; of other versions none is read."""
CROPS, HASHES, DATASET = "crops.npy", "hashes.npy", "dataset.json"
INDEX, DROPPED = "index.csv", "dropped.csv"
COLUMNS = {
    INDEX: ("image_id", "identity", *POINT_COLUMNS, "row"),
    DROPPED: ("name", "reason"),
}
HASH_BYTES = 16
"""128 bits: a hash tells damage and copies apart, nobody forges a training face."""
UNREADABLE = (
    OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, OverflowError, csv.Error
)  # fmt: skip
"""What reading a damaged file raises; RuntimeError: torch 2.8, for a number too large."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class PreparedFaces(AlignedCrops):
    """Aligned crops in a prepared folder, a `Faces`; also a map-style set of (crop, label) pairs.

    It holds no pixels: copies for other processes are small, and the page cache is shared.

    Attributes:
        folder: The prepared folder; its `index.csv` has the points of the photos.
        places: Crops in its file, those of dropped photos included.
        rows: Where each face is among them, int64 `[N]`.
        hashes: Hash of each crop, uint8 `[N, 16]`.
    """

    folder: Path
    places: int
    rows: Tensor
    names: tuple[str, ...]
    labels: Tensor | None
    identities: tuple[str, ...]
    hashes: Bytes
    crop: str
    skipped: tuple[Fault, ...] = ()

    @cached_property
    def content(self) -> str:
        """Hash of these crops, 64 hex digits: of their template, names and pixels, in order."""
        total = hashlib.sha256(repr((self.crop, self.names)).encode())
        total.update(self.hashes.tobytes())
        return total.hexdigest()

    @cached_property
    def pixels(self) -> Bytes:
        """All crops as they lie on the disk, uint8 `[places, 3, H, W]`."""
        return mapped(self.folder / CROPS, (self.places, 3, *get_template(self.crop).size))

    def __getstate__(self) -> dict[str, Any]:
        # a copy maps the crops anew
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}

    def digest(self, index: int) -> bytes:
        """SHA-256 of a crop's hash and template."""
        return hashlib.sha256(self.crop.encode() + self.hashes[index].tobytes()).digest()

    def _copies(self, indices: Tensor) -> Tensor:
        rows = self.rows.index_select(0, indices).tolist()
        gathered = np.empty((len(rows), *self.pixels.shape[1:]), dtype=np.uint8)
        # crop by crop: half again as fast as a fancy index, which copies twice
        for slot, row in zip(gathered, rows, strict=True):
            slot[...] = self.pixels[row]
        return torch.from_numpy(gathered)

    def select(self, keep: Tensor) -> PreparedFaces:
        """A view of the same folder; no pixel is read."""
        kept = positions(keep)
        hashes = self.hashes[kept.numpy()]
        return replace(self, rows=self.rows[kept], hashes=hashes, **selected(self, kept))


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
    dataset = read_record(folder)
    if "content" not in dataset:
        remedy = "Run the same 'idloss prepare' again: it goes on from there."
        raise DataError([Fault(str(folder), "the preparation is not finished")], remedy)
    with reading(folder / DATASET):
        places, labelled = int(dataset["photos"]), bool(dataset["labelled"])
        template = get_template(str(dataset["crop"]))
        counts = {str(reason): int(count) for reason, count in dataset["dropped"].items()}
        duplicates = int(dataset["duplicates"])
        matches = tuple(Match(*match) for match in dataset["matches"])
        unchecked = tuple(Fault(*fault) for fault in dataset["unchecked"])
        tables = {name: str(dataset["tables"][name]) for name in (INDEX, DROPPED)}
    skipped = [Fault(*row) for row in _read_table(folder / DROPPED, tables[DROPPED])]
    index = _read_table(folder / INDEX, tables[INDEX])
    hashes = mapped(folder / HASHES, (places, 2 * HASH_BYTES))
    labels, identities = number_identities(row[1] or None for row in index)
    with reading(folder / INDEX):
        rows = torch.tensor([int(row[12]) for row in index], dtype=torch.int64)
        faces = PreparedFaces(
            folder=folder,
            places=places,
            rows=rows,
            names=tuple(row[0] for row in index),
            labels=labels if labelled else None,
            identities=identities if labelled else (),
            hashes=hashes[rows.numpy(), :HASH_BYTES],
            crop=template.name,
            skipped=tuple(skipped),
        )
    if faces.content != dataset["content"]:
        raise damaged(folder / HASHES, f"not the hashes that {DATASET} was written with")
    _ = faces.pixels  # or damage would be found in mid-training
    return Report(faces, counts, duplicates, matches, unchecked)


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> str:
    """Write one of a folder's tables, whole or not at all; gives its hash."""
    with written_whole(path) as temporary:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS[path.name], *rows])
        return hashlib.sha256(temporary.read_bytes()).hexdigest()


def _read_table(path: Path, digest: str) -> list[list[str]]:
    with reading(path):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"not the table that {DATASET} was written with")
        text = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
        return list(csv.reader(text))[1:]


def crop_hash(crop: Bytes) -> bytes:
    """Hash of a crop's bytes, channel by channel and row by row: BLAKE2b."""
    return hashlib.blake2b(crop.data, digest_size=HASH_BYTES).digest()


def mapped(path: Path, shape: tuple[int, ...]) -> Bytes:
    """Bytes of a folder's file, which are read as they are wanted."""
    with reading(path):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if found.dtype != np.uint8 or found.shape != shape or not found.flags.c_contiguous:
            what = f"holds {found.dtype} {list(found.shape)}, expected uint8 {list(shape)}"
            raise ValueError(what)
    # a plain array over the same pages: np.memmap costs time at every access
    return cast(Bytes, found.view(np.ndarray))


def write_record(folder: Path, content: Mapping[str, object]) -> None:
    """Write `dataset.json`, whole or not at all."""
    with written_whole(folder / DATASET) as temporary:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        temporary.write_text(text, "utf-8", "surrogateescape")


def read_record(folder: Path) -> dict[str, Any]:
    """What `dataset.json` holds, if it is of this format; it has a `content` once all is done."""
    with reading(folder / DATASET) as path:
        content = json.loads(path.read_text("utf-8", "surrogateescape"))
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT:
            what = f"prepared faces of format {version}, this version of idloss reads {FORMAT}"
            raise ValueError(what)
    return cast("dict[str, Any]", content)


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Name the file, and the way out, if what reads it fails."""
    try:
        yield path
    except DataError:
        raise
    except UNREADABLE as error:
        what = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise damaged(path, f"not as it was written ({what})") from error


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a prepared folder that is not as it was written."""
    return DataError([Fault(str(path), what)], f"Delete {path.parent} and prepare the faces anew.")
