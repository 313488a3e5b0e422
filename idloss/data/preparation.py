"""Preparing faces: from photos to a prepared folder, whatever stops the run on its way."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss import __version__
from idloss.data.faces import Faces, FileFaces, like_sized_batches, map_ahead
from idloss.data.files import DataError, Fault, skip_or_raise
from idloss.data.landmarks import check_landmarks, read_clean_list
from idloss.data.overlap import Exclusion, Match, identity_names, kept_array, matched_faces
from idloss.data.pairs import index_of
from idloss.data.prepared import (
    CROPS,
    DATASET,
    DROPPED,
    FORMAT,
    HASH_BYTES,
    HASHES,
    INDEX,
    PreparedFaces,
    Report,
    crop_hash,
    damaged,
    is_prepared,
    mapped,
    read_record,
    read_report,
    write_record,
    write_table,
)
from idloss.geometry import Template, get_template

SOFTWARE = ("torch", "numpy", "pillow")
"""What may change a pixel beside idloss itself."""
CHUNK = 8192
"""Photos sorted by size, and judged, at once."""
UNALIGNED = "could not be read or aligned"
ABSENT = "in the clean list, but not in the source"


def prepare(
    source: Faces,
    out: str | os.PathLike[str],
    *,
    crop: str = "sphereface",
    clean_list: str | os.PathLike[str] | None = None,
    exclude: Exclusion | None = None,
    skip_missing: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Report:
    """Align faces once and write them as memory-mapped crops, 32 kB a face at 112x96.

    A run that was stopped goes on where it was when it is started again; a finished one is found
    finished if its photos are still the same.

    Args:
        source: Photos with landmarks, or crops of another template.
        out: The folder to fill.
        crop: Name of the template to align to.
        clean_list: Text file of the images to take, one a row, with or without a header; None
            takes all. Where ten numbers follow, these are the points to align by, as in
            `celeba_clean_landmarks.csv` of the paper's authors (`path,x1,y1,...,x5,y5`).
        exclude: An evaluation set whose people are to be found and removed.
        skip_missing: Drop what is missing or cannot be read or aligned, and record it.
        threads: Decoding threads; None for one a core, eight at most.
        progress: Show progress bars.

    Returns:
        The faces, and what was dropped.

    Raises:
        DataError: Photos or lists have faults, the folder holds something else, was prepared
            otherwise or from other photos, or cannot be written; says what and the way out.
        ValueError: There is no such template, or the encoder takes another.
    """
    folder, template = Path(out).expanduser(), get_template(crop)
    unread = "left out when the source was read"
    dropped = [Fault(fault.where, f"{unread}: {fault.what}") for fault in source.skipped]
    photos = source
    if clean_list is not None:
        photos, unlisted = _keep_listed(source, Path(clean_list), skip_missing=skip_missing)
        dropped += unlisted
    _refuse_hopeless(photos, exclude)
    if exclude:
        skip_or_raise(exclude.faces.skipped, skip_missing=skip_missing)
    plan: dict[str, object] = {
        "format": FORMAT,
        "source": _origin(source),
        "clean_list": None if clean_list is None else Path(clean_list).name,
        "crop": template.name,
        "size": list(template.size),
        "photos": len(photos),
        "labelled": photos.labels is not None,
        "names": _hex(repr(tuple(photos.names)).encode()),
        "people": _hex(repr(identity_names(photos)).encode()),
        "landmarks": _hex(_points(photos).numpy().tobytes()),
        **(exclude.describe(template) if exclude else {"overlap": None}),
        "software": {"idloss": __version__, **{name: metadata.version(name) for name in SOFTWARE}},
    }
    filling = _Filling(folder, photos, template, skip_missing, threads, progress)
    finished = _is_finished(folder)
    try:
        if not finished:
            folder.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(folder / ".lock"):
                _begin(folder, plan)
                finished = _is_finished(folder)
                if not finished:
                    filling.fill(plan, dropped, exclude)
    except OSError as error:
        remedy = (
            "What is aligned stays. Make room, or let the folder be written to, and run the same "
            "again: it goes on from there; or name another folder to fill."
        )
        what = f"cannot be written to: {error.strerror or error}"
        raise DataError([Fault(str(folder), what)], remedy) from error
    if finished:
        _refuse_other_plan(folder, {**plan, "software": None})
        filling.refuse_other_photos()
    for embeddings in folder.glob("embeddings-*.npy"):
        with suppress(OSError):
            embeddings.unlink()
    report = read_report(folder)
    left_out = [one for one in report.faces.skipped if one.what.startswith((UNALIGNED, ABSENT))]
    if not skip_missing and (faults := [*left_out, *report.unchecked]):
        remedy = f"Left out of {folder} by skip_missing=True. Pass it again, or mend them and "
        raise DataError(faults, f"{remedy}prepare the faces anew.")
    return report


@dataclass(frozen=True)
class _Filling:
    """The way from photos to a prepared folder, also from where a run was stopped."""

    folder: Path
    photos: Faces
    template: Template
    skip_missing: bool
    threads: int | None
    progress: bool

    def fill(
        self, plan: Mapping[str, object], dropped: Sequence[Fault], exclude: Exclusion | None
    ) -> None:
        """Align what is not aligned yet, remove who is to be excluded, and write the tables."""
        gone = {place: f"{UNALIGNED}: {fault.what}" for place, fault in self._align().items()}
        matches: Sequence[Match] = ()
        unchecked: tuple[Fault, ...] = ()
        faces = self._faces(gone)
        if exclude:
            matches, unread = exclude.find(
                faces,
                self.folder,
                skip_missing=self.skip_missing,
                threads=self.threads,
                progress=self.progress,
            )
            unchecked = (*exclude.faces.skipped, *unread)
            for index, detail in matched_faces(faces, matches).items():
                gone[int(faces.rows[index])] = f"also in {exclude.name}: {detail}"
            faces = self._faces(gone)
        # no pixel of those dropped is left; if the run stops here, they are aligned once more
        self._crops[sorted(gone)] = 0
        self._hashes[sorted(gone), :HASH_BYTES] = 0
        self._crops.flush()
        self._hashes.flush()
        every = [*dropped, *(Fault(self.photos.names[at], gone[at]) for at in sorted(gone))]
        points = _points(self.photos)[faces.rows].flatten(1).T.tolist()
        table = zip(faces.names, identity_names(faces), *points, faces.rows.tolist(), strict=True)
        result = {
            **plan,
            "faces": len(faces),
            "identities": len(faces.identities),
            "duplicates": len(faces) - len(np.unique(faces.hashes, axis=0)),
            "dropped": dict(Counter(one.what.partition(": ")[0] for one in every)),
            "matches": [astuple(match) for match in matches],
            "unchecked": unchecked,
            "tables": {
                INDEX: write_table(self.folder / INDEX, table),
                DROPPED: write_table(self.folder / DROPPED, every),
            },
            "content": faces.content,
        }
        write_record(self.folder, result)

    def refuse_other_photos(self) -> None:
        """Refuse a finished folder if a photo is not the one it was made from."""
        before = mapped(self.folder / HASHES, (len(self.photos), 2 * HASH_BYTES))[:, HASH_BYTES:]
        places = range(len(self.photos))
        found = self._bar(map_ahead(self._photo, places, self.threads), "comparing", len(places))
        faults = [
            Fault(name, "is not the photo that was prepared")
            for name, old, new in zip(self.photos.names, before, found, strict=True)
            if old.tobytes() != new
        ]
        if faults:
            raise DataError(faults, f"Name another folder, or delete {self.folder}.")

    @cached_property
    def _crops(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        shape = (len(self.photos), 3, *self.template.size)
        return kept_array(self.folder / CROPS, shape, np.uint8)

    @cached_property
    def _hashes(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        shape = (len(self.photos), 2 * HASH_BYTES)
        return kept_array(self.folder / HASHES, shape, np.uint8)

    def _align(self) -> dict[int, Fault]:
        """Align the photos that are not done; those that cannot be aligned, by their place."""
        count = len(self._crops)
        assert count == len(self._hashes)  # both files are there before threads ask for them
        faults: dict[int, Fault] = {}
        with self._bar(None, "aligning", count) as bar:
            for start in range(0, count, CHUNK):
                # whole batches: what a photo is warped with may change its crop by a level
                batches = like_sized_batches(self.photos, start, min(start + CHUNK, count))
                found: dict[int, Fault] = {}
                for batch, unaligned in map_ahead(self._align_batch, batches, self.threads):
                    found.update(unaligned)
                    bar.update(len(batch))
                skip_or_raise((found[i] for i in sorted(found)), skip_missing=self.skip_missing)
                faults.update(found)
        return faults

    def _align_batch(self, batch: list[int]) -> tuple[list[int], dict[int, Fault]]:
        faults: dict[int, Fault] = {}
        photos = [self._photo(place) for place in batch]
        if all(map(self._is_done, batch, photos)):
            return batch, faults
        crops = self.photos.crops_at(batch, self.template, faults=faults).numpy()
        for place, crop, photo in zip(batch, crops, photos, strict=True):
            self._crops[place] = crop
            both = (bytes(HASH_BYTES) if place in faults else crop_hash(crop)) + photo
            self._hashes[place] = np.frombuffer(both, dtype=np.uint8)
        return batch, faults

    def _is_done(self, place: int, photo: bytes) -> bool:
        """Whether a crop is whole, and its photo still the one that it was made from."""
        hashes: bytes = self._hashes[place].tobytes()
        return hashes.endswith(photo) and hashes.startswith(crop_hash(self._crops[place]))

    def _photo(self, place: int) -> bytes:
        """Hash of a photo as it is kept; zeros if it cannot be read."""
        with suppress(DataError):
            return self.photos.digest(place)[:HASH_BYTES]
        return bytes(HASH_BYTES)

    def _bar(self, work: Any, what: str, total: int) -> Any:
        return tqdm(work, what, total, unit="face", delay=2, disable=not self.progress)

    def _faces(self, gone: Iterable[int]) -> PreparedFaces:
        """The crops of the folder, without those of some places."""
        kept = torch.ones(len(self.photos), dtype=torch.bool)
        kept[list(gone)] = False
        whole = PreparedFaces(
            folder=self.folder,
            places=len(self.photos),
            rows=torch.arange(len(self.photos)),
            names=tuple(self.photos.names),
            labels=self.photos.labels,
            identities=tuple(self.photos.identities),
            hashes=np.array(self._hashes[:, :HASH_BYTES]),
            crop=self.template.name,
        )
        return whole.select(kept)


def _keep_listed(source: Faces, path: Path, *, skip_missing: bool) -> tuple[Faces, list[Fault]]:
    """The photos of a clean list in their old order, with its points if any, and the dropped."""
    places = index_of(source.names)
    listed, points = read_clean_list(path, source.names)
    if points.by_name and source.crop is not None:
        what = f"has points of photos, and the faces are {source.crop} crops already"
        raise DataError([Fault(str(path), what)], "Leave the names alone in the list.")
    skip_or_raise(points.faults, skip_missing=skip_missing)
    wanted = frozenset(listed)
    dropped = [Fault(name, "not in the clean list") for name in places if name not in wanted]
    dropped += [Fault(name, ABSENT) for name in listed if name not in places]
    chosen = source.select(torch.tensor([i for name, i in places.items() if name in wanted]).long())
    if points.by_name:  # photos are files
        pointed = replace(cast(FileFaces, chosen), landmarks=points.stack(chosen.names))
        chosen = check_landmarks(pointed, str(path))
    return chosen, dropped


def _refuse_hopeless(photos: Faces, exclude: Exclusion | None) -> None:
    """Refuse before the work what would fail after it."""
    where, what = _origin(photos), None
    if not len(photos):
        what = "there are no faces to prepare"
    elif photos.crop is None and _points(photos).isnan().all():
        what = "there are no landmarks to align the photos by"
    elif exclude and not all(identity_names(photos)):
        what = "the overlap can only be found where the identity of every face is known"
    elif exclude and exclude.faces.crop is None and exclude.faces.landmarks is None:
        where, what = exclude.name, "there are no landmarks to align its photos by"
    if what:
        raise DataError([Fault(where, what)])


def _begin(folder: Path, plan: Mapping[str, object]) -> None:
    """Write the plan, or see that the one there is the same."""
    for path in folder.iterdir():
        if path.is_symlink():
            raise damaged(path, "is a link: what is written to it lands elsewhere")
        if path.match(".*.tmp"):  # of a run that was killed
            path.unlink()
    if is_prepared(folder):
        _refuse_other_plan(folder, plan)
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        what = f"holds other files, and no {DATASET} of a preparation"
        raise DataError([Fault(str(folder), what)], "Name a new folder.")
    else:
        write_record(folder, plan)


def _is_finished(folder: Path) -> bool:
    return is_prepared(folder) and "content" in read_record(folder)


def _refuse_other_plan(folder: Path, plan: Mapping[str, object]) -> None:
    """Refuse to go on otherwise than begun; software None: of crops that are finished."""
    before = read_record(folder)
    different = [
        f"{key} was {before.get(key)}, now it is {value}"
        for key, value in plan.items()
        if not (key == "software" and value is None) and not _same(before.get(key), value)
    ]
    if different:
        what = f"was prepared otherwise: {'; '.join(different)}"
        raise DataError([Fault(str(folder), what)], "Name another folder, or delete this one.")


def _same(before: object, now: object) -> bool:
    """Equal, lists of numbers to a hundredth: other devices give other last digits."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        with suppress(TypeError):
            return bool(np.allclose(before, now, rtol=0, atol=0.01))
    return before == now


def _hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[: 2 * HASH_BYTES]


def _origin(faces: Faces) -> str:
    """The name of the folder, archive or class that faces are from."""
    files = getattr(faces, "files", None)
    return type(faces).__name__ if files is None else Path(files.location).name


def _points(faces: Faces) -> Tensor:
    """Landmarks, float64 `[N, 5, 2]`, nan where there are none."""
    points = faces.landmarks
    if points is None:
        return torch.full((len(faces), 5, 2), torch.nan, dtype=torch.float64)
    return points.contiguous()
