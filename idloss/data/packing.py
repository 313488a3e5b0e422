"""The tables of a prepared folder: what each crop is, what was dropped, how it was made."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from idloss.data.files import DataError, Fault
from idloss.data.tables import POINT_COLUMNS
from idloss.weights.files import written_whole

FORMAT = 1
PLAN = "plan.json"
DATASET = "dataset.json"
INDEX = "index.csv"
DROPPED = "dropped.csv"
OVERLAP = "overlap.csv"

INDEX_COLUMNS = ("image_id", "identity", *POINT_COLUMNS, "hash")
DROPPED_COLUMNS = ("name", "reason", "detail")


@dataclass(frozen=True, eq=False)
class Index:
    """What is known of each crop of a shard, or of them all.

    Attributes:
        names: the name of each photo.
        people: the name of each one's identity, empty where it is not known.
        points: five points a photo, float64 `[N, 5, 2]`, nan where there are none.
        hashes: the hash of each crop, see `shards.crop_hash`.
    """

    names: tuple[str, ...]
    people: tuple[str, ...]
    points: Tensor
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def select(self, kept: Sequence[int]) -> Index:
        """The rows at some positions."""
        return Index(
            tuple(self.names[i] for i in kept),
            tuple(self.people[i] for i in kept),
            self.points[list(kept)],
            tuple(self.hashes[i] for i in kept),
        )

    def write(self, path: Path) -> None:
        """Write the rows, whole or not at all."""
        points = self.points.flatten(1).tolist()
        columns = zip(self.names, self.people, points, self.hashes, strict=True)
        rows = ((name, person, *numbers, own) for name, person, numbers, own in columns)
        write_rows(path, INDEX_COLUMNS, rows)

    @staticmethod
    def read(path: Path) -> Index:
        """Read what `write` wrote.

        Raises:
            DataError: the file is missing, or a row is not of the index's form.
        """
        rows = read_rows(path, INDEX_COLUMNS)
        try:
            numbers = map(float, chain.from_iterable(row[2:12] for row in rows))
            points = np.fromiter(numbers, np.float64, 10 * len(rows)).reshape(-1, 5, 2)
        except ValueError as error:
            raise DataError([Fault(str(path), f"unreadable coordinates ({error})")]) from error
        return Index(
            tuple(row[0] for row in rows),
            tuple(row[1] for row in rows),
            torch.from_numpy(points),
            tuple(row[12] for row in rows),
        )

    @staticmethod
    def join(parts: Sequence[Index]) -> Index:
        """The rows of some indexes, at least one, one after another."""
        return Index(
            tuple(name for part in parts for name in part.names),
            tuple(person for part in parts for person in part.people),
            torch.cat([part.points for part in parts]),
            tuple(own for part in parts for own in part.hashes),
        )

    def content(self, template: str) -> str:
        """Hash of the crops: of their template, names and pixels.

        Args:
            template: what the crops are aligned to.

        Returns:
            64 hex digits.
        """
        total = hashlib.sha256(template.encode())
        for row in zip(self.names, self.hashes, strict=True):
            total.update(repr(row).encode())
        return total.hexdigest()


class Dropped(NamedTuple):
    """A photo that is not among the crops.

    Attributes:
        name: the photo; the line of a table where that was the fault.
        reason: one of a few, to count by.
        detail: what exactly, possibly nothing.
    """

    name: str
    reason: str
    detail: str = ""

    def fault(self) -> Fault:
        """The same, as data sets keep what they left out."""
        return Fault(self.name, f"{self.reason}: {self.detail}" if self.detail else self.reason)


def index_part(number: int | str) -> str:
    """The index of a shard while a folder is being filled; `"*"` for the pattern of them all."""
    return f"index-{_five(number)}.csv"


def dropped_part(number: int | str) -> str:
    """What was dropped from a shard, or as `"overlap"`, while a folder is being filled."""
    return f"dropped-{_five(number)}.csv"


def write_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    """Write which photos were dropped, whole or not at all."""
    write_rows(path, DROPPED_COLUMNS, dropped)


def read_dropped(path: Path) -> list[Dropped]:
    """Read what `write_dropped` wrote."""
    return [Dropped(*row) for row in read_rows(path, DROPPED_COLUMNS)]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, whole or not at all.

    Args:
        path: the file to be.
        columns: its header.
        rows: its fields, floats to their last digit.
    """
    with (
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Read what `write_rows` wrote.

    Args:
        path: the file.
        columns: the header it must have.

    Returns:
        The fields of each row.

    Raises:
        DataError: it is missing, has another header, or a row of other length; names the row.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise damaged(path, str(error)) from error
    if header != list(columns):
        raise damaged(path, f"expected the header {','.join(columns)}, got {','.join(header)!r}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise damaged(path, f"row {number} has {len(row)} fields, expected {len(columns)}")
    return rows


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        DataError: it is missing, no JSON object, or of another version of this format.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        what = f"prepared faces of format {version}, this version of idloss reads {FORMAT}"
        raise damaged(path, what)
    return dict(content)


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a prepared folder that is not as it was written."""
    return DataError([Fault(str(path), what)], f"Delete {path.parent} and prepare the faces anew.")


def _five(number: int | str) -> str:
    return f"{number:05d}" if isinstance(number, int) else number
