"""Five points a face: read from tables, and checked against what faces and photos look like."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from math import isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from idloss.data.faces import Faces, FileFaces, image_size, number_identities
from idloss.data.files import DataError, Fault, Files
from idloss.data.tables import Table, read_own_table
from idloss.geometry import get_template

POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
POINT_COLUMNS = tuple(f"{point}_{axis}" for point in POINTS for axis in "xy")
HEADERS = frozenset({"path", "name", "image", "image_id", "file", "filename"})
"""First fields of a clean list that no image is called; `path` is that of the paper's list."""
LISTED_COLUMNS = 11
"""Fields of a row with five points: a name and ten numbers."""

MOST_LEFT_OVER = 0.4
"""Median share of the spread that the fit leaves: 0.015 on LFW, 0.023 on CelebA; over 0.5 for
points in another order (x1..x5,y1..y5: 0.64, the other eye first: 0.96)."""
SAMPLE = 64
"""Photos that are looked at, spread over the set."""
MARGIN = 0.1
"""Of a photo's longer side, by which points may lie outside it."""
LEAST_LIKENESS, DOUBTFUL_LIKENESS = 0.4, 0.7
"""Correlation of the mean crop with `MEAN_FACE`, around eyes, nose and mouth: 0.88 to 0.99 for 16
faces of LFW or CelebA, 0.2 to 0.6 for drawn ones, at most 0.34 where photos were scaled by 0.9 and
their points not or for unaligned LFW taken for crops."""
LEAST_FACES = 16
"""Below that a mean crop says nothing."""
INNER = (..., slice(32, 96), slice(24, 72))
"""Of a sphereface crop, from the brows to the mouth: hair and background say less."""
# Mean grey there of 2,000 faces each of LFW and of CelebA in the wild, in cells of 8x8
MEAN_FACE = (
    (11, 18, 22, 21, 17, 10),
    (-5, -3, 12, 11, -5, -5),
    (-15, -9, 8, 7, -9, -14),
    (9, 10, 15, 15, 11, 10),
    (20, 15, 17, 17, 15, 20),
    (13, 8, 4, 4, 8, 12),
    (5, 8, 6, 6, 8, 5),
    (3, -4, 0, 1, -3, 4),
)


@dataclass
class Points:
    """Five points by image name, and rows that could not be read."""

    by_name: dict[str, list[float]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def stack(self, names: Iterable[str]) -> Tensor:
        """The points of images that are in `by_name`, float64 `[N, 5, 2]`."""
        rows = [self.by_name[name] for name in names]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 5, 2)


def read_points(table: Table) -> Points:
    """Rows of an image name and ten numbers, each but once; further fields are left alone.

    A first row that names the columns is not one of them.
    """
    points = Points()
    for line, cells in table.rows:
        if cells[1:11] == list(POINT_COLUMNS):
            continue
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


def read_clean_list(path: Path, names: Sequence[str]) -> tuple[list[str], Points]:
    """The images of a clean list without those of faulty points, and its points if it has some."""
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
    words = [
        cell for cell in cells[1:LISTED_COLUMNS] if cell[:1].isalpha() and cell.lower() != "nan"
    ]
    named = cells[0].lower() in HEADERS or len(words) == LISTED_COLUMNS - 1
    return named and cells[0] not in known


def labelled_faces(
    files: Files,
    members: Mapping[str, str],
    identities: Iterable[str | None],
    points: Points | None,
    *,
    where: str,
    crop: str | None = None,
    skipped: tuple[Fault, ...] = (),
) -> FileFaces:
    """Faces of files `members` by name, with their people and, out of the table `where`, points."""
    labels, people = number_identities(identities)
    landmarks = points.stack(members) if points else None
    found = FileFaces(
        files, tuple(members.values()), tuple(members), labels, people, landmarks, crop, skipped
    )
    return check_landmarks(found, where)


def check_landmarks(faces: FileFaces, where: str) -> FileFaces:
    """The faces themselves, if their points can be theirs.

    A set is judged as a whole: by the median of what the fit to a face leaves over (another order),
    by the size of a sample of its photos and by the mean of their crops (points of other photos, or
    of these before they were scaled or cut). A DataError says what was found; `where` is the table.
    """
    points = faces.landmarks
    if faces.crop is not None or points is None or not len(points):
        return faces
    _check_order(faces, points, where)
    sample = _sample(faces)
    _check_sizes(faces, points, sample, where)
    likeness = _likeness(faces, sample)
    if likeness < DOUBTFUL_LIKENESS:
        what = (
            f"the mean of {len(sample)} faces aligned by these points is like a face by "
            f"{likeness:.2f} (0.9 and more for true points)"
        )
        doubt = "Are they points of these photos, in their size?"
        if likeness < LEAST_LIKENESS:
            raise DataError([Fault(where, what)], doubt)
        warnings.warn(f"{Fault(where, what)}. {doubt}", UserWarning, stacklevel=3)
    return faces


def warn_of_unaligned(faces: Faces, where: str) -> None:
    """Say if pictures that are said to be crops of a template do not look like that on average."""
    likeness = _likeness(faces, _sample(faces))
    if likeness < DOUBTFUL_LIKENESS:
        warnings.warn(
            f"{where}: the mean of its pictures is like an aligned face by {likeness:.2f} (0.9 and "
            f"more for true crops). Are they {faces.crop} crops?",
            stacklevel=3,
        )


def _sample(faces: Faces) -> Tensor:
    places: Tensor = torch.linspace(0, len(faces) - 1, min(SAMPLE, len(faces))).long().unique()
    return places


def _check_order(faces: FileFaces, points: Tensor, where: str) -> None:
    each, left, upright = _fit(points)
    if left <= MOST_LEFT_OVER and upright > 0:
        if wrong := (each > MOST_LEFT_OVER).nonzero().flatten().tolist():
            warnings.warn(
                f"{where}: the points of {len(wrong)} of {len(faces)} faces form no face, or are "
                f"in another order, such as those of {faces.names[wrong[0]]!a}",
                stacklevel=4,
            )
        return
    few = points[_sample(faces)]
    found = [(*_fit(moved)[1:], words) for moved, words in _orders(few)]
    likely = min(
        ((left, words) for left, upright, words in found if upright > 0.5), default=(1, "")
    )
    seen = f"a fit to a face leaves {left:.0%} of their spread in the median, 2% for true points"
    if left <= MOST_LEFT_OVER:
        seen = "most faces stand on their heads"
    order = f"Expected {', '.join(POINT_COLUMNS)} (left and right as seen in the photo)"
    remedy = f"{order}."
    if likely[0] <= MOST_LEFT_OVER:
        remedy = f"{order}; it is likely {likely[1]} ({likely[0]:.0%} left): sort the columns."
    raise DataError([Fault(where, f"these are no landmarks in the expected order: {seen}")], remedy)


def _fit(points: Tensor) -> tuple[Tensor, float, float]:
    """The share of each face's spread that the fit leaves, its median, and how upright most are."""
    template = torch.as_tensor(get_template("sphereface").points, dtype=torch.float64)
    template = template - template.mean(0)
    centred = points.double() - points.double().mean(1, keepdim=True)
    spread = centred.square().sum((1, 2))
    x, y = centred.unbind(-1)
    along = (x * template[:, 0] + y * template[:, 1]).sum(1)
    across = (y * template[:, 0] - x * template[:, 1]).sum(1)
    explained = (along.square() + across.square()) / template.square().sum()
    real = spread > 0
    left = 1 - explained / spread
    upright = along[real] / along[real].hypot(across[real]).clamp(min=1e-12)
    if not real.any():
        return left, 1.0, 0.0
    return left, float(left[real].nanmedian()), float(upright.nanmedian())


def _orders(points: Tensor) -> Iterator[tuple[Tensor, str]]:
    """The points `[N, 5, 2]` put right from other orders, and what order that is."""
    blocks = torch.stack(points.flatten(1).view(-1, 2, 5).unbind(1), -1)
    layouts = ((points, "x,y"), (blocks, "x1..x5,y1..y5"), (points.flip(-1), "y,x"))
    for moved, layout in layouts:
        for order in permutations(range(5)):
            words = ", ".join(POINTS[i] for i in order)
            back = [order.index(i) for i in range(5)]
            yield moved[:, back], f"{words} as {layout}"


def _check_sizes(faces: FileFaces, points: Tensor, sample: Tensor, where: str) -> None:
    outside = []
    seen = 0
    for index in sample.tolist():
        member = faces.members[index]
        try:
            height, width = image_size(faces.files.read(member), faces.files.where(member))
        except DataError:  # it is told when the photo is wanted
            continue
        seen += 1
        slack = MARGIN * max(height, width)
        size = torch.tensor([width, height], dtype=points.dtype)
        if ((points[index] < -slack) | (points[index] > size + slack)).any():
            outside.append(f"{faces.names[index]} ({width}x{height})")
    if len(outside) > seen / 2:
        what = f"points lie outside {len(outside)} of {seen} photos, such as {outside[0]}"
        raise DataError(
            [Fault(where, what)], "Are they of these photos before they were cut or scaled?"
        )


def _likeness(faces: Faces, sample: Tensor) -> float:
    """How much the mean of some crops is like a face; 1 where they are too few to say."""
    faults: dict[int, Fault] = {}
    if len(sample) < LEAST_FACES:
        return 1.0
    crops = [
        faces.crops_at(part, "sphereface", faults=faults).double().mean(1, keepdim=True)
        for part in sample.split(8)
    ]
    good = torch.tensor([index not in faults for index in sample.tolist()])
    if int(good.sum()) < LEAST_FACES:
        return 1.0
    cells = F.avg_pool2d(torch.cat(crops)[good][INNER], 8)[:, 0]
    return float((_normalised(_normalised(cells).mean(0)) * _normalised(MEAN_FACE)).mean())


def _normalised(cells: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Pictures `[..., H, W]` of mean 0 and deviation 1."""
    values = torch.as_tensor(cells, dtype=torch.float64)
    values = values - values.mean((-2, -1), keepdim=True)
    deviation = values.square().mean((-2, -1), keepdim=True).sqrt()
    return values / deviation.clamp(min=1e-9)
