"""Pairs of faces to verify: their lists, their folds, and what an evaluation needs beside faces."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from idloss.data.faces import Faces, FileFaces
from idloss.data.files import DataError, Fault, FolderFiles, skip_or_raise
from idloss.data.folder import LANDMARKS, folder_faces
from idloss.data.tables import Table, read_number, read_own_table

PAIR_COLUMNS = ["first", "second", "same"]
FOLDS = 10
"""Folds of a verification list that does not say its own, as in LFW's View 2 and insightface."""

Remainder = Literal["first", "spread"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of faces to verify.

    Attributes:
        first: Positions of the first faces, int64 `[P]`.
        second: Positions of the second faces, int64 `[P]`.
        same: Whether both show one person, bool `[P]`.
        fold: The cross-validation fold of each pair, int64 `[P]`, from 0.
    """

    first: Tensor
    second: Tensor
    same: Tensor
    fold: Tensor

    def __len__(self) -> int:
        return len(self.same)

    def select(self, keep: Tensor) -> Pairs:
        """The pairs at int64 positions or under a bool mask `[P]`, in their folds."""
        return Pairs(self.first[keep], self.second[keep], self.same[keep], self.fold[keep])


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Faces to evaluate on, with what to compare.

    Attributes:
        name: What the set is called in tables.
        faces: All its faces.
        pairs: The pairs to verify, where it has some.
        gallery: Positions of the enrolled faces, int64, where it has a fixed gallery.
        probes: Positions of the faces to identify, by the name of the probe set. A probe whose
            label is -1 is of nobody in the gallery.
    """

    name: str
    faces: Faces
    pairs: Pairs | None = None
    gallery: Tensor | None = None
    probes: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class PairList:
    """Pairs while they are read from the list `where`, with the position of each face by name."""

    where: str
    index: Mapping[str, int]
    rows: list[tuple[int, int, bool, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _seen: dict[frozenset[str], str] = field(default_factory=dict)

    def add(self, where: str, first: str, second: str, *, same: bool, fold: int = 0) -> None:
        """Take one pair, or note what is wrong with it."""
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
        """The pairs taken, in the folds given, or `refold`: in ten, or as many as a kind has."""
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
    """Read LFW's `pairs.txt` (View 2) or `pairsDevTrain.txt` (View 1); collects faults of pairs."""
    # the first line is the number of folds, which View 1 leaves out, and of pairs of each kind in
    # one; then `Name 1 4` is two images of a person, and `Name 1 Other 2` is one each of two
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
    """LFW's name of an image, `Aaron_Eckhart/Aaron_Eckhart_0001.jpg` for number 1."""
    return f"{person}/{person}_{number:04d}.jpg"


def read_pairs_csv(table: Table, index: Mapping[str, int]) -> PairList:
    """Read rows of two images and 1 (same) or 0, with or without the header `first,second,same`."""
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


def draw_pairs(faces: Faces, count: int, *, seed: int = 0) -> Pairs:
    """Draw pairs to verify from labelled faces, half of one person and half of two, in ten folds.

    Every pair there is can be drawn, none twice: for some thousand faces, not for a million.

    Args:
        faces: Labelled faces; those of nobody known are not drawn.
        count: Pairs, of both kinds together.
        seed: Of the draw.

    Raises:
        ValueError: The faces have no identities, or too few pairs of a kind.
    """
    if faces.labels is None:
        raise ValueError("pairs of one person and of two need faces with identities")
    first, second = torch.combinations(torch.arange(len(faces))).T
    known = (faces.labels >= 0)[first] & (faces.labels >= 0)[second]
    alike = faces.labels[first] == faces.labels[second]
    generator, kinds = torch.Generator().manual_seed(seed), []
    for kind in (alike & known, ~alike & known):
        places = kind.nonzero().flatten()
        if len(places) < count // 2:
            raise ValueError(f"{count} pairs need {count // 2} of each kind; one has {len(places)}")
        kinds.append(places[torch.randperm(len(places), generator=generator)[: count // 2]])
    drawn = torch.stack(kinds, dim=1).flatten()
    return Pairs(first[drawn], second[drawn], alike[drawn], balanced_folds(alike[drawn]))


def contiguous_folds(count: int, folds: int = FOLDS, remainder: Remainder = "first") -> Tensor:
    """Cut a list of `count` pairs, in its order, into folds: int64 `[count]`, rising from 0."""
    # the first folds are a pair longer in scikit-learn and insightface; "spread": the paper's code
    places = torch.arange(folds + 1)
    if remainder == "spread":
        cuts = places * count // folds
    else:
        cuts = places * (count // folds) + places.clamp(max=count % folds)
    return torch.arange(folds).repeat_interleave(cuts.diff())


def balanced_folds(same: Tensor, folds: int = FOLDS) -> Tensor:
    """Cut the pairs of each kind, bool `[P]`, into contiguous folds, int64 `[P]`; LFW's on LFW."""
    fold = torch.empty(len(same), dtype=torch.int64)
    for kind in (same, ~same):
        fold[kind] = contiguous_folds(int(kind.sum()), folds)
    return fold


def pairs_csv(
    path: str | os.PathLike[str], *, crop: str | None = None, skip_missing: bool = False
) -> EvaluationSet:
    """Read pairs to verify from a table of one's own.

    Rows are two images, as paths from the table's folder, and 1 (same person) or 0, with or without
    the header `first,second,same`. Photos, which are aligned to no `crop`, have their points in a
    `landmarks.csv` beside it. Each kind of pair is cut into 10 folds, or as many as it has pairs.
    """
    place = Path(path).expanduser()
    table = read_own_table(place)
    files = FolderFiles(place.parent)
    if crop is None and LANDMARKS in files:
        faces = folder_faces(files, skip_missing=skip_missing)
    else:
        listed = (name for _, cells in table.rows if cells != PAIR_COLUMNS for name in cells[:2])
        names = tuple(name for name in dict.fromkeys(listed) if name in files)
        faces = FileFaces(files, names, names, crop=crop)
    pairs = read_pairs_csv(table, index_of(faces.names))
    skipped = skip_or_raise(pairs.faults, skip_missing=skip_missing)
    faces = replace(faces, skipped=faces.skipped + skipped)
    return EvaluationSet(place.stem, faces, pairs.finish(refold=True))


def warn_of_doubles(data: EvaluationSet, where: str) -> None:
    """Say which pairs are of one and the same file under two names."""
    if data.pairs is None or not isinstance(data.faces, FileFaces):
        return
    faces = data.faces
    hashes: dict[int, bytes] = {}
    pairs = list(zip(data.pairs.first.tolist(), data.pairs.second.tolist(), strict=True))
    for place in chain.from_iterable(pairs):
        with suppress(DataError):  # it is told when the picture is wanted
            if place not in hashes:
                hashes[place] = hashlib.sha256(faces.files.read(faces.members[place])).digest()
    doubles = [(a, b) for a, b in pairs if a in hashes and hashes[a] == hashes.get(b)]
    if doubles:
        first, second = (ascii(faces.names[place]) for place in doubles[0])
        warnings.warn(
            f"{len(doubles)} pairs of {where} are of one and the same picture under two names, "
            f"such as {first} and {second}",
            stacklevel=3,
        )
