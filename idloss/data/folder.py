"""A folder or a tar of photos with one `landmarks.csv`."""

from __future__ import annotations

import os

from idloss.data.faces import FileFaces, number_identities
from idloss.data.files import DataError, Files, open_files, skip_or_raise
from idloss.data.tables import POINT_COLUMNS, read_points, read_table

LANDMARKS = "landmarks.csv"
IDENTITY = "identity"


def folder_faces(path: str | os.PathLike[str] | Files, *, skip_missing: bool = False) -> FileFaces:
    """Read photos that stand beside a `landmarks.csv`.

    The table's header is `image_id, lefteye_x, lefteye_y, righteye_x, ..., rightmouth_y` and, where
    identities are known, `identity`; `image_id` is the photo's path from the table's folder.

    Args:
        path: a folder or a tar that holds the table at its top or one folder down.
        skip_missing: leave out photos that are missing or have no readable points.

    Returns:
        The faces, in the table's order.

    Raises:
        DataError: there is no such table, or it has faults; names file and line.
    """
    files = open_files(path) if isinstance(path, (str, os.PathLike)) else path
    name = find_landmarks(files)
    if name is None:
        raise FileNotFoundError(f"no {LANDMARKS} at the top of {files.location} or one folder down")
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
    identities = {}
    for line, cells in body.rows:
        if cells[0] not in points.by_name or cells[0] in identities:
            continue
        if len(cells) != len(header) or not cells[-1]:
            faults.append(body.fault(line, f"expected {len(header)} filled fields, got {cells}"))
        elif folder + cells[0] not in files:
            faults.append(body.fault(line, f"{cells[0]} is not in {files.location}"))
        else:
            identities[cells[0]] = cells[11] if IDENTITY in header else ""
    skipped = skip_or_raise(faults, skip_missing=skip_missing)
    labels, names = number_identities(identities.values())
    known = IDENTITY in header
    return FileFaces(
        files=files,
        members=tuple(folder + name for name in identities),
        names=tuple(identities),
        labels=labels if known else None,
        identities=names if known else (),
        landmarks=points.stack(identities),
        skipped=skipped,
    )


def find_landmarks(files: Files) -> str | None:
    """Where the `landmarks.csv` is.

    Args:
        files: the folder or archive.

    Returns:
        Its name, at the top or one folder down, or None.
    """
    if LANDMARKS in files:
        return LANDMARKS
    return next((name for name in files.names() if name.split("/")[1:] == [LANDMARKS]), None)
