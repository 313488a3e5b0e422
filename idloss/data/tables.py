"""Text tables: those of data sets, rows with their line numbers, and the package's own."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from idloss.data.files import DataError, Fault, Files, FolderFiles


@dataclass(frozen=True)
class Table:
    """Rows of the text file `where`: the number of the line, from 1, and its fields."""

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
    """Read a text table in UTF-8, its accents composed.

    Fields stand between commas and may be quoted; where the first line has none, between tabs or
    semicolons if it has those. A `separator` of None is any run of blanks.
    """
    table = Table(files.where(name), [])
    data = files.read(name)
    try:
        text = unicodedata.normalize("NFC", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        what = f"not UTF-8 text ({error}): save the table as UTF-8"
        raise DataError([table.fault(line, what)]) from error
    lines = [(line, part) for line, part in enumerate(text.splitlines(), start=1) if part.strip()]
    if lines and separator == "," and separator not in lines[0][1]:
        separator = next((other for other in "\t;" if other in lines[0][1]), separator)
    table.rows.extend((line, _cells(table, line, part, separator)) for line, part in lines)
    return table


def _cells(table: Table, line: int, content: str, separator: str | None) -> list[str]:
    if separator is None:
        return content.split()
    try:
        cells = next(csv.reader([content], delimiter=separator, skipinitialspace=True))
    except csv.Error as error:
        raise DataError([table.fault(line, f"not a row of a table ({error})")]) from error
    return [cell.strip() for cell in cells]


def read_own_table(path: str | os.PathLike[str], separator: str | None = ",") -> Table:
    """Read a text table that is a file of its own; see `read_table`."""
    place = Path(path).expanduser()
    return read_table(FolderFiles(place.parent), place.name, separator)


def read_number(table: Table, line: int, cell: str, *, least: int = 0) -> int:
    """Read a whole number of at least `least`; a DataError names file and line otherwise."""
    if not cell.isdecimal() or int(cell) < least:
        raise DataError([table.fault(line, f"expected a whole number from {least}, got {cell!r}")])
    return int(cell)


def first_file(files: Files, folders: Iterable[str], name: str) -> str | None:
    """The first `folder + name` that there is, of folder prefixes `""` or `"folder/"`."""
    return next((folder + name for folder in folders if folder + name in files), None)
