"""Fill a prepared folder, step by step, and go on where a run was stopped.

Each step takes effect with one rename: a shard's crops, then its index, which says that the shard
is finished; the list of what an evaluation set shares, then each shard without it; last the joint
index and `dataset.json`, which says that all is done. A run that is killed leaves the steps it
finished, and the next one takes the others.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm

from idloss.data.exclusion import Exclusion, write_matches
from idloss.data.faces import align_all
from idloss.data.files import DataError, Fault
from idloss.data.packed import pack
from idloss.data.packing import (
    DATASET,
    DROPPED,
    FORMAT,
    INDEX,
    OVERLAP,
    Dropped,
    Index,
    dropped_part,
    index_part,
    read_dropped,
    write_dropped,
    write_json,
)
from idloss.data.pairs import index_of
from idloss.data.photos import Photos
from idloss.data.shards import Shards, crop_hash, is_whole, open_shard, shard_file, write_shard
from idloss.geometry import Template
from idloss.weights.files import file_sha256

OF_PLAN = ("source", "clean_list", "template", "size", "labelled", "software")
"""What `dataset.json` repeats of the plan."""
UNALIGNED = "could not be read or aligned"
ROW_BYTES = 1024
"""Bytes of a face in the tables, rather too many: 233 with CelebA's short names, written twice."""


class Filling:
    """The steps from photos to a prepared folder.

    Args:
        folder: the folder, which holds the plan already.
        photos: what to prepare.
        template: what to align it to.
        shard_faces: photos a shard; some crops fewer where photos are dropped.
        skip_missing: drop photos that cannot be read or aligned.
        threads: decoding threads; None for one a core, eight at most.
        progress: show progress bars.
    """

    def __init__(
        self,
        folder: Path,
        photos: Photos,
        template: Template,
        shard_faces: int,
        *,
        skip_missing: bool,
        threads: int | None,
        progress: bool,
    ) -> None:
        self.folder = folder
        self.photos = photos
        self.template = template
        self.parts = torch.arange(len(photos)).split(shard_faces)
        self.how: dict[str, Any] = {"skip_missing": skip_missing, "threads": threads}
        self.progress = progress

    def align(self) -> None:
        """Write the shards that are not finished.

        Raises:
            DataError: photos cannot be read or aligned, or the disk is too small.
        """
        missing = [number for number in range(len(self.parts)) if not self._finished(number)]
        left = sum(len(self.parts[number]) for number in missing)
        self._check_space(left)
        total = len(self.photos)
        with tqdm(
            total=total,
            initial=total - left,
            desc="aligning",
            unit="face",
            delay=2,
            disable=not self.progress,
        ) as bar:
            for number in missing:
                photos = self.photos.select(self.parts[number])
                aligned = align_all(photos, self.template, progress=bar.update, **self.how)
                crops = aligned.crops.numpy()
                write_shard(self._shard(number), crops)
                places = index_of(photos.names)
                kept = photos.select(torch.tensor([places[name] for name in aligned.names]).long())
                hashes = tuple(map(crop_hash, crops))
                faults = [Dropped(fault.where, UNALIGNED, fault.what) for fault in aligned.skipped]
                write_dropped(self.folder / dropped_part(number), faults)
                index = Index(kept.names, kept.people, kept.landmarks, hashes)
                index.write(self.folder / index_part(number))

    def exclude(self, exclusion: Exclusion) -> None:
        """Find the people of an evaluation set, and write the shards without them.

        Args:
            exclusion: the evaluation set.

        Raises:
            DataError: its photos cannot be read or aligned; names each.
        """
        parts = [self._index(number) for number in range(len(self.parts))]
        if not (self.folder / dropped_part("overlap")).is_file():
            counts = {shard_file(number): len(part) for number, part in enumerate(parts)}
            shards = Shards(self.folder, counts, self.template.size)
            faces = pack(shards, Index.join(parts), self.template.name, labelled=True)
            matches = exclusion.find(faces, progress=self.progress, **self.how)
            write_matches(self.folder / OVERLAP, matches)
            write_dropped(self.folder / dropped_part("overlap"), exclusion.drop(faces, matches))
        for number, part in enumerate(self._bar(parts, "removing")):
            kept = self._kept(part)
            path, size = self._shard(number), self.template.size
            if not is_whole(path, len(kept), size):
                write_shard(path, open_shard(path, len(part), size)[kept])

    def finish(self, plan: Mapping[str, object], dropped: Sequence[Dropped]) -> None:
        """Join the shards' tables and say that all is done.

        Args:
            plan: how the folder was prepared.
            dropped: what was dropped before.
        """
        parts = [self._index(number) for number in range(len(self.parts))]
        parts = [part.select(self._kept(part)) for part in parts]
        index = Index.join(parts)
        every = list(dropped)
        for part in (*range(len(self.parts)), "overlap"):
            every += self._dropped(part)
        index.write(self.folder / INDEX)
        write_dropped(self.folder / DROPPED, every)
        shards = []
        for number, part in enumerate(self._bar(parts, "hashing")):
            name = shard_file(number)
            sha256 = file_sha256(self.folder / name)
            shards.append({"file": name, "faces": len(part), "sha256": sha256})
        dataset = {
            "format": FORMAT,
            **{key: plan[key] for key in OF_PLAN},
            "faces": len(index),
            "identities": len(set(index.people) - {""}),
            "duplicates": len(index) - len(set(index.hashes)),
            "dropped": dict(Counter(one.reason for one in every)),
            "content": index.content(self.template.name),
            "shards": shards,
        }
        write_json(self.folder / DATASET, dataset)

    def stopped(self, error: OSError) -> DataError:
        """The error for a step that the system did not let through, e.g. as the disk was full.

        Args:
            error: what the system said.

        Returns:
            It, with what there is already and the way out.
        """
        done = sum(map(self._finished, range(len(self.parts))))
        what = f"cannot be written to: {error.strerror or error}"
        remedy = (
            f"{done} of {len(self.parts)} shards are finished and stay. Make room and run the same "
            "again: it goes on from there."
        )
        return DataError([Fault(str(self.folder), what)], remedy)

    def _check_space(self, left: int) -> None:
        """Refuse to begin what the disk has no room for."""
        crop = 3 * self.template.size[0] * self.template.size[1]
        # and one shard that is written anew beside the old one
        needed = left * crop + len(self.parts[0]) * crop + len(self.photos) * ROW_BYTES
        free = shutil.disk_usage(self.folder).free
        if left and free < needed:
            what = (
                f"{needed / 1e9:.1f} GB are needed for {left:,} faces, {free / 1e9:.1f} GB are free"
            )
            raise DataError([Fault(str(self.folder), what)], "Make room, or name another folder.")

    def _bar(self, parts: list[Index], what: str) -> Iterable[Index]:
        return tqdm(parts, desc=what, unit="shard", delay=2, disable=not self.progress)

    def _finished(self, number: int) -> bool:
        if not (self.folder / index_part(number)).is_file():
            return False
        part = self._index(number)
        path, size = self._shard(number), self.template.size
        return any(is_whole(path, count, size) for count in (len(part), len(self._kept(part))))

    def _kept(self, part: Index) -> list[int]:
        """The rows of a shard that the evaluation set leaves."""
        gone = {one.name for one in self._dropped("overlap")}
        return [place for place, name in enumerate(part.names) if name not in gone]

    def _dropped(self, part: int | str) -> list[Dropped]:
        path = self.folder / dropped_part(part)
        return read_dropped(path) if path.is_file() else []

    def _index(self, number: int) -> Index:
        return Index.read(self.folder / index_part(number))

    def _shard(self, number: int) -> Path:
        return self.folder / shard_file(number)
