"""Prepare faces for training: align them once, and keep them as memory-mapped crops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from idloss import __version__
from idloss.data.exclusion import Exclusion, read_matches
from idloss.data.faces import Faces
from idloss.data.files import DataError, Fault
from idloss.data.filling import Filling
from idloss.data.overlap import Match
from idloss.data.packed import PackedFaces, open_packed
from idloss.data.packing import (
    DATASET,
    FORMAT,
    OVERLAP,
    PLAN,
    Dropped,
    dropped_part,
    index_part,
    read_json,
    write_json,
)
from idloss.data.photos import Photos, keep_listed
from idloss.geometry import get_template

SHARD_FACES = 8192
"""Crops in a shard: 264 MB at 112x96, held in memory until it is written."""
SOFTWARE = ("torch", "numpy", "pillow")
"""What may change a pixel beside idloss itself."""
LOCK = ".lock"
LEFT_OUT = "left out when the source was read"


@dataclass(frozen=True, eq=False)
class Report:
    """What came of a preparation.

    Attributes:
        faces: the prepared faces.
        dropped: how many photos were dropped, by reason; `dropped.csv` names them.
        duplicates: how many crops equal one before them, pixel by pixel; they are kept.
        matches: what was found in an evaluation set too, and removed.
    """

    faces: PackedFaces
    dropped: Mapping[str, int]
    duplicates: int
    matches: tuple[Match, ...]


def prepare(
    source: Faces,
    out: str | os.PathLike[str],
    *,
    crop: str = "sphereface",
    clean_list: str | os.PathLike[str] | None = None,
    exclude: Exclusion | None = None,
    shard_faces: int = SHARD_FACES,
    skip_missing: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Align faces once and write them as memory-mapped crops, 32 kB a face at 112x96.

    A run that was stopped goes on where it was when it is started again; a finished one is found
    finished.

    Args:
        source: photos with landmarks, or crops of another template.
        out: the folder to fill.
        crop: the crops' geometry, one of `idloss.geometry.TEMPLATES`.
        clean_list: the images to take, see `idloss.data.photos.keep_listed`; None takes all.
        exclude: an evaluation set whose people are to be found and removed.
        shard_faces: crops in a file.
        skip_missing: drop what is missing or cannot be read or aligned, and record it.
        threads: decoding threads; None for one a core, eight at most.
        progress: show progress bars.

    Returns:
        The faces, and what was dropped.

    Raises:
        DataError: photos or lists have faults, the folder holds something else or was prepared
            otherwise, or the disk is full; says what and the way out.
        ValueError: an option is out of range.
    """
    if shard_faces < 1:
        raise ValueError(f"shard_faces must be at least 1, got {shard_faces}")
    folder = Path(out).expanduser()
    target = get_template(crop)
    photos = Photos.of(source)
    dropped = [Dropped(fault.where, LEFT_OUT, fault.what) for fault in source.skipped]
    if clean_list is not None:
        photos, unlisted = keep_listed(photos, Path(clean_list), skip_missing=skip_missing)
        dropped += unlisted
    _check(photos, exclude)
    plan: dict[str, object] = {
        "format": FORMAT,
        "source": photos.origin,
        "clean_list": None if clean_list is None else Path(clean_list).name,
        **photos.describe(),
        "template": target.name,
        "size": list(target.size),
        "shard_faces": shard_faces,
        **(exclude.describe() if exclude else {"overlap": None}),
        "software": {"idloss": __version__, **{name: metadata.version(name) for name in SOFTWARE}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / LOCK):
        _begin(folder, plan)
        if not (folder / DATASET).is_file():
            work = Filling(
                folder,
                photos,
                target,
                shard_faces,
                skip_missing=skip_missing,
                threads=threads,
                progress=progress,
            )
            try:
                work.align()
                if exclude:
                    work.exclude(exclude)
                work.finish(plan, dropped)
            except OSError as error:
                raise work.stopped(error) from error
        for pattern in (index_part("*"), dropped_part("*")):
            for part in folder.glob(pattern):
                part.unlink()
    return read_report(folder)


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report of a prepared folder.

    Args:
        path: the folder.

    Returns:
        What `prepare` returned.

    Raises:
        FileNotFoundError: nothing was prepared there.
        DataError: the preparation is not finished, or files are missing or damaged; names them.
    """
    faces = open_packed(path)
    dataset = read_json(faces.folder / DATASET)
    overlap = faces.folder / OVERLAP
    matches = read_matches(overlap) if overlap.is_file() else ()
    return Report(faces, dataset["dropped"], dataset["duplicates"], matches)


def _check(photos: Photos, exclude: Exclusion | None) -> None:
    """Refuse before the work what would fail after it."""
    if not len(photos):
        raise DataError([Fault(photos.origin, "there are no faces to prepare")])
    if photos.crop is None and photos.landmarks.isnan().all():
        raise DataError([Fault(photos.origin, "there are no landmarks to align the photos by")])
    if exclude is None:
        return
    if not all(photos.people):
        what = "the overlap can only be found where the identity of every face is known"
        raise DataError([Fault(photos.origin, what)])
    if exclude.faces.crop is None and exclude.faces.landmarks is None:
        raise DataError([Fault(exclude.name, "there are no landmarks to align its photos by")])


def _begin(folder: Path, plan: Mapping[str, object]) -> None:
    """Write the plan, or see that the one there is the same."""
    finished = (folder / DATASET).is_file()
    if not finished:
        for temporary in folder.glob(".*.tmp"):  # of a run that was killed
            temporary.unlink()
    if not (folder / PLAN).is_file():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            what = f"holds other files, and no {PLAN} of a preparation"
            raise DataError([Fault(str(folder), what)], "Name a new folder.")
        write_json(folder / PLAN, plan)
        return
    before = read_json(folder / PLAN)
    # other software is no reason to refuse crops that are finished
    compared = [key for key in {**before, **plan} if not (finished and key == "software")]
    different = [
        f"{key} was {before.get(key)}, now it is {plan.get(key)}"
        for key in compared
        if before.get(key) != plan.get(key)
    ]
    if different:
        what = f"was prepared otherwise: {'; '.join(different)}"
        raise DataError([Fault(str(folder), what)], "Name another folder, or delete this one.")
