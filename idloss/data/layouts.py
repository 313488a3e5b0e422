"""Whatever faces are at a path, by the layout found there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from idloss.data.celeba import celeba_faces, find_layout, looked_for
from idloss.data.faces import FileFaces
from idloss.data.files import open_files
from idloss.data.folder import find_landmarks, folder_faces
from idloss.data.insightface import insightface_bin
from idloss.data.landmarks import warn_of_unaligned
from idloss.data.lfw import lfw
from idloss.data.pairs import EvaluationSet, pairs_csv, warn_of_doubles
from idloss.data.prepared import PreparedFaces, is_prepared, open_prepared
from idloss.data.surveillance import (
    scface,
    survface_identification,
    survface_verification,
    tinyface,
)
from idloss.errors import did_you_mean
from idloss.geometry import Template, get_template

EVALUATIONS: Mapping[str, Callable[..., EvaluationSet]] = {
    "lfw": lfw,
    "pairs": pairs_csv,
    "bin": insightface_bin,
    "tinyface": tinyface,
    "scface": scface,
    "survface-verification": survface_verification,
    "survface-identification": survface_identification,
}
"""Readers of evaluation sets by name."""

SUFFIXES = {".csv": "pairs", ".bin": "bin"}


def open_faces(
    path: str | os.PathLike[str], *, skip_missing: bool = False
) -> PreparedFaces | FileFaces:
    """Open faces for training: prepared ones, CelebA, or photos with a `landmarks.csv`.

    Args:
        path: A folder that `idloss prepare` made, or a folder, `.tar`, `.tar.gz` or `.tgz` of
            photos.
        skip_missing: Leave out photos that are missing or lack readable points.

    Returns:
        Prepared crops, or photos, which are to be aligned as they are read.

    Raises:
        FileNotFoundError: There is nothing, or no layout that is known; lists what was looked for.
        DataError: The tables have faults, or the preparation is not finished; says what and where.
    """
    if is_prepared(path):
        return open_prepared(path)
    files = open_files(path)
    if find_layout(files):
        return celeba_faces(files, skip_missing=skip_missing)
    if find_landmarks(files):
        return folder_faces(files, skip_missing=skip_missing)
    raise FileNotFoundError(
        f"no faces known in {files.location}; looked for {looked_for()} (CelebA), "
        "and for landmarks.csv at the top or one folder down"
    )


def open_evaluation(
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    crop: str | Template | None = None,
    **options: Any,
) -> EvaluationSet:
    """Open an evaluation set.

    Args:
        path: A `pairs.csv`, an insightface `.bin`, or a folder or tar of LFW or of another set.
        kind: A name in `EVALUATIONS`; None takes `.csv` and `.bin` by their suffix and finds the
            others by their layout.
        crop: Template the pictures are aligned to, which then need no landmarks; None for photos.
        **options: Of every kind: `skip_missing`; of those in folders: `landmarks`, a table of names
            and five points; of single ones: `pairs`, `people` and `download` (LFW), `distractors`
            (TinyFace), `subjects` (SCface). `help(EVALUATIONS[kind])` tells more.

    Returns:
        The set.

    Raises:
        FileNotFoundError: There is nothing, or no layout that is known; lists what was looked for.
        DataError: The set has faults; names file and line.
        ValueError: There is no such kind, or there is nothing to align photos by.
    """
    if kind is not None and kind not in EVALUATIONS:
        raise ValueError(did_you_mean("evaluation set", kind, EVALUATIONS))
    if crop is not None:
        if options.get("landmarks") is not None:
            raise ValueError("pictures aligned to a crop need no landmarks: leave one of them out")
        options["crop"] = get_template(crop).name
    kind = kind or SUFFIXES.get(Path(path).suffix.lower())
    found = EVALUATIONS[kind](path, **options) if kind else _find(path, options)
    if found.faces.crop is None and found.faces.landmarks is None:
        way, photos = "name a table with landmarks=FILE", Path(path)
        if kind == "pairs":
            way, photos = "put landmarks.csv beside it", photos.parent
        raise ValueError(
            f"{path} has no landmarks to align its photos by; {way} (idloss landmarks {photos} "
            "FILE finds them), or name the template the pictures are aligned to with "
            "crop=sphereface or crop=arcface"
        )
    if found.faces.crop is not None:
        warn_of_unaligned(found.faces, str(path))
    warn_of_doubles(found, str(path))
    return found


def _find(path: str | os.PathLike[str], options: dict[str, Any]) -> EvaluationSet:
    absent = []
    for name, reader in EVALUATIONS.items():
        if name in SUFFIXES.values():
            continue
        try:
            return reader(path, **options)
        except FileNotFoundError as error:
            absent.append(f"{name}: {error}")
    raise FileNotFoundError("no evaluation set known:\n  " + "\n  ".join(absent))
