"""A `pairs.csv` of two images and a label a row, beside the images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from idloss.data.faces import FileFaces
from idloss.data.files import FolderFiles, skip_or_raise
from idloss.data.folder import LANDMARKS, folder_faces
from idloss.data.pairs import PAIR_COLUMNS, EvaluationSet, index_of, read_pairs_csv
from idloss.data.tables import read_own_table


def pairs_csv(
    path: str | os.PathLike[str], *, crop: str | None = None, skip_missing: bool = False
) -> EvaluationSet:
    """Read pairs to verify from a table of one's own.

    Args:
        path: rows of two images, as paths from the table's folder, and 1 (same person) or 0; with
            or without the header `first,second,same`.
        crop: the template the images are aligned to; None for photos, whose points are in a
            `landmarks.csv` in the same folder.
        skip_missing: leave out pairs with missing images.

    Returns:
        The faces and the pairs; each kind of pair is cut into 10 folds, or as many as it has pairs.

    Raises:
        DataError: the tables or images have faults; names file and line.
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
