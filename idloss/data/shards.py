"""Crops on disk: `.npy` files that are mapped into memory and read as one array."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from idloss.data.files import DataError
from idloss.data.packing import damaged
from idloss.weights.files import written_whole

HASH_BYTES = 16
"""128 bits: a hash tells damage and copies apart, nobody forges a training face."""

Pixels = NDArray[np.uint8]


def shard_file(number: int) -> str:
    """The name of a shard, numbered from 0."""
    return f"crops-{number:05d}.npy"


def crop_hash(crop: Pixels) -> str:
    """Hash of a crop's bytes, channel by channel and row by row: BLAKE2b, 32 hex digits."""
    return hashlib.blake2b(crop.data, digest_size=HASH_BYTES).hexdigest()


def write_shard(path: Path, crops: Pixels) -> None:
    """Write crops as an `.npy` file, whole or not at all.

    Args:
        path: the file to be.
        crops: `[n, 3, H, W]`.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": crops.shape}
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        # np.save would lose the reason why a write failed
        file.write(np.ascontiguousarray(crops).data)


def open_shard(path: Path, count: int, size: tuple[int, int]) -> Pixels:
    """Map a shard into memory.

    Args:
        path: its file.
        count: crops it must hold.
        size: their rows and columns.

    Returns:
        uint8 RGB `[count, 3, H, W]`, not writable.

    Raises:
        DataError: it is missing, cut short, or holds something else; says what.
    """
    wanted = (count, 3, *size)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise damaged(path, "the shard is missing") from error
    except (ValueError, EOFError, OSError) as error:
        there = path.stat().st_size
        what = f"{there:,} bytes, where {prod(wanted):,} of crops and a header belong ({error})"
        raise damaged(path, what) from error
    if mapped.dtype != np.uint8 or mapped.shape != wanted:
        what = f"holds {mapped.dtype} {list(mapped.shape)}, expected uint8 {list(wanted)}"
        raise damaged(path, what)
    # a plain array over the same pages: np.memmap costs time at every access
    crops: Pixels = mapped.view(np.ndarray)
    return crops


def is_whole(path: Path, count: int, size: tuple[int, int]) -> bool:
    """Whether a file is a shard of so many crops; see `open_shard`."""
    try:
        open_shard(path, count, size)
    except DataError:
        return False
    return True


class Shards:
    """Shards read as one array; an unpickled copy maps them anew.

    Args:
        folder: where they are.
        counts: crops in each, by file name.
        size: the crops' rows and columns.

    Raises:
        DataError: one is missing or damaged; names it.
    """

    def __init__(self, folder: Path, counts: Mapping[str, int], size: tuple[int, int]) -> None:
        self.folder = folder
        self.counts = dict(counts)
        self.size = size
        self._open()

    def gather(self, rows: NDArray[np.int64]) -> Pixels:
        """Copy some crops.

        Crop by crop: half again as fast as a fancy index a shard, which copies twice.

        Args:
            rows: which, `B` of them, counted over all shards.

        Returns:
            uint8 RGB `[B, 3, H, W]`.
        """
        gathered = np.empty((len(rows), 3, *self.size), dtype=np.uint8)
        numbers = np.searchsorted(self._ends, rows, side="right")
        places = rows - self._starts[numbers]
        for slot, number, place in zip(gathered, numbers.tolist(), places.tolist(), strict=True):
            slot[...] = self._arrays[number][place]
        return gathered

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "counts": self.counts, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._arrays = [
            open_shard(self.folder / name, count, self.size) for name, count in self.counts.items()
        ]
        counts = np.array(list(self.counts.values()), dtype=np.int64)
        self._ends = counts.cumsum()
        self._starts = self._ends - counts
