"""Text tables that come with data sets: rows with their line numbers, five points a row."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from idloss.data.files import DataError, Fault, Files, FolderFiles
from idloss.weights.files import written_whole

POINT_COLUMNS = tuple(
    f"{point}_{axis}"
    for point in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    for axis in "xy"
)
HEADERS = frozenset({"path", "name", "image", "image_id", "file", "filename"})
"""First fields of a clean list that no image is called; `path` is that of the paper's list."""
LISTED_COLUMNS = 11
"""Fields of a clean list's row with five points: a name and ten numbers."""


@dataclass(frozen=True)
class Table:
    """Rows of a text file.

    Attributes:
        where: the file, for messages.
        rows: line number, counted from 1, and fields of each line that is not empty.
    """

    where: str
    rows: list[tuple[int, list[str]]]

    def at(self, line: int) -> str:
        """A line of this file, for messages."""
        return f"{self.where}:{line}"

    def fault(self, line: int, what: str) -> Fault:
        """A fault at a line of this file."""
        return Fault(self.at(line), what)

    def after(self, count: int) -> Table:
        """The table without its first rows."""
        return Table(self.where, self.rows[count:])


def read_table(files: Files, name: str, separator: str | None = ",") -> Table:
    """Read a text table.

    Args:
        files: where it is.
        name: its name there.
        separator: between fields, which may be quoted; None for any run of blanks.

    Returns:
        Its rows, fields stripped of blanks.

    Raises:
        DataError: the file is missing, or a line is not UTF-8 text or no row.
    """
    table = Table(files.where(name), [])
    data = files.read(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise DataError([table.fault(line, f"not UTF-8 text ({error})")]) from error
    for line, content in enumerate(text.splitlines(), start=1):
        if content.strip():
            table.rows.append((line, _cells(table, line, content, separator)))
    return table


def _cells(table: Table, line: int, content: str, separator: str | None) -> list[str]:
    if separator is None:
        return content.split()
    try:
        cells = next(csv.reader([content], delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise DataError([table.fault(line, f"not a row of a table ({error})")]) from error
    return [cell.strip() for cell in cells]


@dataclass
class Points:
    """Five points by image name.

    Attributes:
        by_name: x1, y1 ... x5, y5 of each image.
        faults: rows that could not be read.
    """

    by_name: dict[str, list[float]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def stack(self, names: Iterable[str]) -> Tensor:
        """The points of some images.

        Args:
            names: images that are in `by_name`.

        Returns:
            float64 `[N, 5, 2]`.
        """
        rows = [self.by_name[name] for name in names]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5, 2)


def read_points(table: Table) -> Points:
    """Read rows of an image name and ten numbers; further fields are left alone.

    Args:
        table: rows without header.

    Returns:
        The points, and a fault for each row that is short, not finite, or of an image had before.
    """
    points = Points()
    for line, cells in table.rows:
        try:
            numbers = [float(cell) for cell in cells[1:11]]
        except ValueError as error:
            points.faults.append(table.fault(line, f"{cells[0]}: {error}"))
            continue
        if len(numbers) < 10 or not all(map(isfinite, numbers)):
            what = f"{cells[0]}: expected ten finite coordinates, got {cells[1:11]}"
            points.faults.append(table.fault(line, what))
        elif cells[0] in points.by_name:
            points.faults.append(table.fault(line, f"{cells[0]}: its points are given twice"))
        else:
            points.by_name[cells[0]] = numbers
    return points


def read_own_table(path: str | os.PathLike[str], separator: str | None = ",") -> Table:
    """Read a text table that is a file of its own; see `read_table`."""
    place = Path(path).expanduser()
    return read_table(FolderFiles(place.parent), place.name, separator)


def read_number(table: Table, line: int, cell: str, *, least: int = 0) -> int:
    """Read a whole number.

    Args:
        table: where it stands.
        line: its line.
        cell: its text.
        least: the smallest number allowed.

    Returns:
        The number.

    Raises:
        DataError: it is no whole number of at least `least`; names file and line.
    """
    if not cell.isdecimal() or int(cell) < least:
        raise DataError([table.fault(line, f"expected a whole number from {least}, got {cell!r}")])
    return int(cell)


def first_file(files: Files, folders: Iterable[str], names: Iterable[str]) -> str | None:
    """The first file there is, of some names in some folders.

    Args:
        files: where to look.
        folders: folder prefixes, `""` or `"folder/"`.
        names: file names.

    Returns:
        `folder/name`, or None.
    """
    choice: Callable[[str], bool] = files.__contains__
    return next(filter(choice, (folder + name for folder in folders for name in names)), None)


def read_clean_list(path: Path, names: Sequence[str]) -> tuple[list[str], Points]:
    """The images of a clean list, and their points if it has some.

    Rows are an image and what follows it after commas or blanks; a header is allowed. Faults are
    those of the points, whose images are not given then, and of images that are not among `names`.
    """
    table = read_own_table(path)
    if all(len(cells) == 1 for _, cells in table.rows):
        table = read_own_table(path, None)
    known = frozenset(names)
    if table.rows and _is_header(table.rows[0][1], known):
        table = table.after(1)
    listed = {cells[0]: line for line, cells in table.rows}
    pointed = any(len(cells) >= LISTED_COLUMNS for _, cells in table.rows)
    points = read_points(table) if pointed else Points()
    for name, line in listed.items():
        if name not in known:
            points.faults.append(table.fault(line, f"{name} is not in the source"))
    return [name for name in listed if not pointed or name in points.by_name], points


def _is_header(cells: list[str], known: frozenset[str]) -> bool:
    numbers = cells[1:LISTED_COLUMNS]
    return cells[0] not in known and (
        cells[0].lower() in HEADERS
        or (len(cells) >= LISTED_COLUMNS and not any(map(_is_number, numbers)))
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, whole or not at all, floats to their last digit."""
    with (
        written_whole(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The rows that `write_rows` wrote; a ValueError or OSError says where they are damaged."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            header, *rows = list(csv.reader(file)) or [[]]
        except csv.Error as error:
            raise ValueError(str(error)) from error
    if header != list(columns):
        raise ValueError(f"expected the header {','.join(columns)}, got {','.join(header)!r}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {len(row)} fields, expected {len(columns)}")
    return rows
