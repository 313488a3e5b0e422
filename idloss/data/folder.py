"""A folder or a tar of photos with one `landmarks.csv`."""

from __future__ import annotations

import os
import posixpath
import warnings
from dataclasses import replace

from idloss.data.faces import FileFaces, is_picture
from idloss.data.files import DataError, Fault, Files, open_files, skip_or_raise, spellings
from idloss.data.landmarks import POINT_COLUMNS, labelled_faces, read_points
from idloss.data.tables import read_table

LANDMARKS = "landmarks.csv"
IDENTITY = "identity"


def folder_faces(path: str | os.PathLike[str] | Files, *, skip_missing: bool = False) -> FileFaces:
    """Read photos that stand beside a `landmarks.csv`.

    The table's header is `image_id, lefteye_x, lefteye_y, righteye_x, ..., rightmouth_y` and, where
    identities are known, `identity`; `image_id` is the photo's path from the table's folder.

    Args:
        path: A folder or a tar that holds the table at its top or one folder down.
        skip_missing: Leave out photos that are missing or have no readable points.

    Returns:
        The faces, in the table's order.

    Raises:
        FileNotFoundError: There is no such table.
        DataError: The table has faults; names file and line.
    """
    files = open_files(path)
    name = find_landmarks(files)
    if name is None:
        what = f"no {LANDMARKS} at the top of {files.location} or one folder down"
        raise FileNotFoundError(f"{what}; idloss landmarks {files.location} FILE writes one")
    table = read_table(files, name)
    header_line, header = table.rows[0] if table.rows else (1, [])
    expected = ["image_id", *POINT_COLUMNS]
    if header[:11] != expected or header[11:] not in ([], [IDENTITY]):
        what = f"expected the header {','.join(expected)}[,{IDENTITY}], got {','.join(header)!r}"
        raise DataError([table.fault(header_line, what)])
    body = table.after(1)
    points = read_points(body)
    folder = name.removesuffix(LANDMARKS)
    faults = points.faults
    identities: dict[str, str] = {}
    had: dict[str, str] = {}
    for line, cells in body.rows:
        image = cells[0]
        member = posixpath.normpath(folder + image)
        if image not in points.by_name or image in identities:
            continue
        if len(cells) != len(header) or not cells[-1]:
            faults.append(body.fault(line, f"expected {len(header)} filled fields, got {cells}"))
        elif member.startswith(("../", "/")) or member not in files:
            faults.append(body.fault(line, f"{image} is not in {files.location}"))
        elif member in had:
            faults.append(body.fault(line, f"{image} is the photo of {had[member]} once more"))
        else:
            identities[image] = cells[11] if IDENTITY in header else ""
            had[member] = image
    skipped = skip_or_raise(faults, skip_missing=skip_missing)
    listed = set(had) | {posixpath.normpath(folder + cells[0]) for _, cells in body.rows}
    unlisted = [name for name in files.names() if is_picture(name)]
    unlisted = [name for name in unlisted if not any(each in listed for each in spellings(name))]
    if unlisted:
        warnings.warn(
            f"{table.where} has no line of {len(unlisted)} pictures, which are not taken, such as "
            f"{unlisted[0]!a}",
            stacklevel=2,
        )
    taken = dict(zip(identities, had, strict=True))
    people = identities.values()
    found = labelled_faces(files, taken, people, points, where=table.where, skipped=skipped)
    return found if IDENTITY in header else replace(found, labels=None, identities=())


def find_landmarks(files: Files) -> str | None:
    """Where the `landmarks.csv` is, at the top or in one folder below it."""
    if LANDMARKS in files:
        return LANDMARKS
    found = [name for name in files.names() if name.split("/")[1:] == [LANDMARKS]]
    if len(found) > 1:
        what = f"there are {len(found)} tables, {found[0]} and {found[1]} among them"
        raise DataError([Fault(files.location, what)], "Name the folder of one of them.")
    return found[0] if found else None
