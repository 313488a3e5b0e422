"""Picture files of whatever size and number, from people or places that nobody vouches for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from idloss.data.faces import decode_image, is_picture
from idloss.data.files import DataError, Fault, read_file


def find_pictures(
    paths: Sequence[str], faults: list[Fault], *, without: Path | None = None
) -> Iterator[Path]:
    """The picture files meant by photos, folders and patterns, but those below a folder.

    They come as they are found, in the file system's order; a folder is looked into once, however
    many ways lead to it. What is none, or cannot be listed, is added to the faults.
    """
    seen = set() if without is None or not without.is_dir() else {_identity(without)}
    for text in paths:
        found = iter([text]) if os.path.lexists(text) else glob.iglob(text)  # noqa: PTH207
        none = True
        for path in found:
            none = False
            if os.path.isdir(path):  # noqa: PTH112
                yield from _below(path, seen, faults)
            else:
                yield Path(path)
        if none:
            faults.append(Fault(text, "there is no such file or folder"))


def _below(top: str, seen: set[tuple[int, int]], faults: list[Fault]) -> Iterator[Path]:
    """Pictures in a folder and in those below it."""

    def note(error: OSError) -> None:
        faults.append(Fault(error.filename, f"cannot be listed ({error.strerror or error})"))

    for folder, inner, names in os.walk(top, onerror=note, followlinks=True):
        if (identity := _identity(folder)) in seen:
            inner.clear()
            continue
        seen.add(identity)
        yield from (Path(folder, name) for name in names if is_picture(name))


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)  # noqa: PTH116
    return about.st_dev, about.st_ino


def read_photo(path: str | os.PathLike[str]) -> Tensor:
    """A picture file as uint8 RGB `[3, H, W]`, upright; a DataError says what is wrong with it."""
    return decode_image(read_picture(path), str(path))


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """What a picture file holds; a DataError where it cannot be read."""
    place = Path(path)
    if place.is_fifo():  # reading it would wait for ever
        raise DataError([Fault(str(path), "it is no regular file")])
    return read_file(place)
