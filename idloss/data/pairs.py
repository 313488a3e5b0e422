"""Lists of face pairs, and what an evaluation needs beside the faces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from idloss.data.faces import AlignedFaces, FileFaces
from idloss.data.files import DataError, Fault
from idloss.data.folds import FOLDS, balanced_folds
from idloss.data.tables import Table, read_number

PAIR_COLUMNS = ["first", "second", "same"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of faces to verify.

    Attributes:
        first: positions of the first faces, int64 `[P]`.
        second: positions of the second faces, int64 `[P]`.
        same: whether both show one person, bool `[P]`.
        fold: the cross-validation fold of each pair, int64 `[P]`, from 0.
    """

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.same)

    def select(self, keep: Tensor) -> Pairs:
        """Some of the pairs, in their folds.

        Args:
            keep: int64 positions, or a bool mask `[P]`.

        Returns:
            The pairs left.
        """
        return Pairs(self.first[keep], self.second[keep], self.same[keep], self.fold[keep])


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Faces to evaluate on, with what to compare.

    Attributes:
        name: what the set is called in tables.
        faces: all its faces.
        pairs: the pairs to verify, where it has some.
        gallery: positions of the enrolled faces, int64, where it has a fixed gallery.
        probes: positions of the faces to identify, by the name of the probe set. A probe whose
            label is -1 is of nobody in the gallery.
    """

    name: str
    faces: FileFaces | AlignedFaces
    pairs: Pairs | None = None
    gallery: Tensor | None = None
    probes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class PairList:
    """Pairs while they are read; the faults are collected.

    Args:
        where: the list, for messages.
        index: the position of each face by name.
    """

    where: str
    index: Mapping[str, int]
    rows: list[tuple[int, int, bool, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _seen: dict[frozenset[str], str] = field(default_factory=dict)

    def add(self, where: str, first: str, second: str, *, same: bool, fold: int = 0) -> None:
        """Take one pair, or note what is wrong with it.

        Args:
            where: the file and its line.
            first: the name of the first face.
            second: the name of the second face.
            same: whether they show one person.
            fold: its fold.
        """
        pair = frozenset((first, second))
        missing = sorted(pair - self.index.keys())
        if len(pair) == 1:
            self.faults.append(Fault(where, f"{first} is paired with itself"))
        elif pair in self._seen:
            what = f"{first} and {second} were paired before, at {self._seen[pair]}"
            self.faults.append(Fault(where, what))
        elif missing:
            self.faults.append(Fault(where, f"there is no image {' and no '.join(missing)}"))
        else:
            self.rows.append((self.index[first], self.index[second], same, fold))
        self._seen.setdefault(pair, where)

    def finish(self, *, refold: bool = False) -> Pairs:
        """The pairs taken.

        Args:
            refold: cut them into balanced folds, fewer where there are fewer than ten pairs of a
                kind; else they keep the folds given.

        Returns:
            The pairs, in the list's order.

        Raises:
            DataError: not one pair is left.
        """
        if not self.rows:
            raise DataError(self.faults or [Fault(self.where, "there are no pairs")])
        first, second, same, fold = torch.tensor(self.rows, dtype=torch.int64).unbind(1)
        same = same.bool()
        if refold:
            alike = int(same.sum())
            rarer = min(alike, len(same) - alike)
            fold = balanced_folds(same, max(2, min(FOLDS, rarer)))
        return Pairs(first, second, same, fold)


def read_lfw_pairs(table: Table, index: Mapping[str, int]) -> PairList:
    """Read LFW's `pairs.txt` (View 2) or `pairsDevTrain.txt` (View 1).

    The first line is the number of folds (View 1 leaves it out) and that of the same, and of the
    different, pairs in each; then `Name 1 4` is images 1 and 4 of a person and `Name 1 Other 2` is
    one image each of two.

    Args:
        table: the list, blank-separated.
        index: the position of each face by name, `Name/Name_0001.jpg`.

    Returns:
        The pairs, with the faults of single lines.

    Raises:
        DataError: the number of pairs is not the one announced, or a line cannot be read.
    """
    if not table.rows:
        raise DataError([Fault(table.where, "the file is empty")])
    line, head = table.rows[0]
    if len(head) > 2:
        raise DataError([table.fault(line, f"expected '10 300', folds and pairs, got {head}")])
    counts = [read_number(table, line, cell, least=1) for cell in head]
    folds, half = (1, *counts)[-2:]
    body = table.after(1).rows
    if len(body) != folds * 2 * half:
        announced = f"{folds} x 2 x {half} = {folds * 2 * half}"
        raise DataError([table.fault(line, f"announces {announced} pairs, lists {len(body)}")])
    pairs = PairList(table.where, index)
    for position, (line, cells) in enumerate(body):
        same = position // half % 2 == 0
        if len(cells) != (3 if same else 4):
            wanted = "a name and two numbers" if same else "two names, each with a number"
            raise DataError([table.fault(line, f"expected {wanted}, got {' '.join(cells)!r}")])
        one, one_number, *other, two_number = cells
        two = other[0] if other else one
        first = lfw_name(one, read_number(table, line, one_number, least=1))
        second = lfw_name(two, read_number(table, line, two_number, least=1))
        pairs.add(table.at(line), first, second, same=same, fold=position // (2 * half))
    return pairs


def lfw_name(person: str, number: int) -> str:
    """LFW's name of an image.

    Args:
        person: such as `Aaron_Eckhart`.
        number: counted from 1.

    Returns:
        `Aaron_Eckhart/Aaron_Eckhart_0001.jpg`.
    """
    return f"{person}/{person}_{number:04d}.jpg"


def read_pairs_csv(table: Table, index: Mapping[str, int]) -> PairList:
    """Read rows of two images and 1 (same) or 0, with or without the header `first,second,same`.

    Args:
        table: the list, comma-separated.
        index: the position of each face by name.

    Returns:
        The pairs, with the faults of single lines.

    Raises:
        DataError: a line is not of that form.
    """
    rows = table.rows[1:] if table.rows and table.rows[0][1] == PAIR_COLUMNS else table.rows
    pairs = PairList(table.where, index)
    for line, cells in rows:
        if len(cells) != 3 or cells[2] not in ("0", "1"):
            what = f"expected two images and 0 or 1, got {','.join(cells)!r}"
            raise DataError([table.fault(line, what)])
        pairs.add(table.at(line), cells[0], cells[1], same=cells[2] == "1")
    return pairs


def index_of(names: Sequence[str]) -> dict[str, int]:
    """The position of each name."""
    return {name: position for position, name in enumerate(names)}
