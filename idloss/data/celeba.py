"""CelebA as its authors and torchvision lay it out."""

from __future__ import annotations

import os
import warnings

from idloss.data.faces import FileFaces, is_picture
from idloss.data.files import DataError, Fault, Files, open_files, skip_or_raise
from idloss.data.landmarks import labelled_faces, read_points
from idloss.data.tables import Table, first_file, read_number, read_table
from idloss.errors import did_you_mean

SPLITS = {"train": "0", "valid": "1", "test": "2"}
IDENTITIES = "identity_CelebA.txt"
PARTITION = "list_eval_partition.txt"
KAGGLE = "list_landmarks_align_celeba.csv"
# folders of the official distribution, of torchvision, and of both one level up
TEXT_FOLDERS = ("", "Anno/", "Eval/", "celeba/", "celeba/Anno/", "celeba/Eval/")
IMAGE_FOLDERS = ("", "Img/", "celeba/", "celeba/Img/")
WILD = "list_landmarks_celeba.txt"
ALIGNED = "list_landmarks_align_celeba.txt"
EDITIONS = {WILD: "img_celeba/", ALIGNED: "img_align_celeba/"}
"""The folder of the photos by the table of their landmarks, the edition to prefer first."""


def celeba_faces(
    path: str | os.PathLike[str] | Files, *, split: str = "all", skip_missing: bool = False
) -> FileFaces:
    """Read CelebA, in the wild where it is there, else the aligned edition with a warning.

    Args:
        path: A folder or tar with `img_celeba/`, `list_landmarks_celeba.txt` and
            `identity_CelebA.txt` (the official `Anno/`, `Eval/` and `Img/` folders are found too),
            or torchvision's root with `celeba/img_align_celeba/` and
            `list_landmarks_align_celeba.txt`.
        split: `"all"`, or `"train"`, `"valid"`, `"test"` after `list_eval_partition.txt`.
        skip_missing: Leave out photos that are missing or lack readable points.

    Returns:
        The faces, in the landmark table's order.

    Raises:
        FileNotFoundError: Neither edition is there; lists what was looked for.
        DataError: A table has faults; names file and line.
        ValueError: There is no such split.
    """
    if split != "all" and split not in SPLITS:
        raise ValueError(did_you_mean("split", split, ["all", *SPLITS]))
    files = open_files(path)
    if not (edition := find_layout(files)):
        if first_file(files, TEXT_FOLDERS, KAGGLE):
            remedy = (
                f"Put {IDENTITIES} and {ALIGNED} of the authors' Anno folder beside "
                "img_align_celeba."
            )
            raise DataError([Fault(files.location, "Kaggle's tables have no identities")], remedy)
        raise FileNotFoundError(f"no CelebA in {files.location}; looked for {looked_for()}")
    landmarks, folder = edition
    if landmarks == ALIGNED:
        warnings.warn(
            f"{files.location} holds the aligned CelebA (img_align_celeba); the paper was trained "
            "on the photos in the wild (img_celeba), which have not been resampled once already",
            stacklevel=2,
        )
    name = _required(files, landmarks)
    body = _body(read_table(files, name, separator=None))
    points = read_points(body)
    members, faults = _photos(files, folder)
    faults += points.faults
    identities = _by_image(files, _required(files, IDENTITIES))
    parts = None if split == "all" else _by_image(files, _required(files, PARTITION))
    names = []
    for line, cells in body.rows:
        image = cells[0]
        if image not in points.by_name:
            continue
        if parts is not None and parts.get(image) not in SPLITS.values():
            faults.append(body.fault(line, f"{image} is in no split of {PARTITION}"))
        elif parts is not None and parts[image] != SPLITS[split]:
            continue
        elif image not in members:
            faults.append(body.fault(line, f"{image} is not in {files.location}"))
        elif image not in identities:
            faults.append(body.fault(line, f"{image} has no identity in {IDENTITIES}"))
        else:
            names.append(image)
    listed = {cells[0] for _, cells in body.rows}
    faults += [
        Fault(files.where(member), f"a photo that {landmarks} has no line of")
        for image, member in members.items()
        if image not in listed
    ]
    skipped = skip_or_raise(faults, skip_missing=skip_missing)
    taken = {image: members[image] for image in names}
    people = (identities[image] for image in taken)
    return labelled_faces(files, taken, people, points, where=files.where(name), skipped=skipped)


def _photos(files: Files, folder: str) -> tuple[dict[str, str], list[Fault]]:
    """Photos by name, wherever below a folder (Kaggle's stand one deeper), and those had twice."""
    members: dict[str, str] = {}
    faults = []
    for member in files.names(folder):
        name = member.rpartition("/")[2]
        if not is_picture(name):
            continue
        if name in members:
            what = f"a second photo of this name, beside {members[name]}"
            faults.append(Fault(files.where(member), what))
        members.setdefault(name, member)
    return members, faults


def find_layout(files: Files) -> tuple[str, str] | None:
    """The landmark table and the folder of photos of the edition of CelebA that is there."""
    for landmarks, images in EDITIONS.items():
        folders = (above + images for above in IMAGE_FOLDERS if any(files.names(above + images)))
        if first_file(files, TEXT_FOLDERS, landmarks) and (folder := next(folders, None)):
            return landmarks, folder
    return None


def looked_for() -> str:
    """What makes a folder or an archive a CelebA, for messages."""
    return " or ".join(f"{images} with {landmarks}" for landmarks, images in EDITIONS.items())


def _required(files: Files, name: str) -> str:
    found = first_file(files, TEXT_FOLDERS, name)
    if found is None:
        folders = ", ".join(folder or "./" for folder in TEXT_FOLDERS)
        raise DataError([Fault(files.location, f"no {name} in {folders}")])
    return found


def _body(table: Table) -> Table:
    """The rows below the count and the column names; the count must be theirs."""
    (first, head), *_ = table.rows or [(1, [""])]
    body = table.after(2)
    count = read_number(table, first, head[0])
    if count != len(body.rows):
        what = f"the file announces {count} images and lists {len(body.rows)}"
        raise DataError([table.fault(first, what)])
    return body


def _by_image(files: Files, name: str) -> dict[str, str]:
    table = read_table(files, name, separator=None)
    faults = [
        table.fault(line, f"expected an image and a number, got {cells}")
        for line, cells in table.rows
        if len(cells) != 2 or not cells[1].isdecimal()
    ]
    found: dict[str, str] = {}
    for line, cells in table.rows:
        if cells[0] in found:
            faults.append(table.fault(line, f"{cells[0]} stands here a second time"))
        found.setdefault(cells[0], cells[-1])
    skip_or_raise(faults, skip_missing=False)
    return found
