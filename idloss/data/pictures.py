"""Picture files of whatever size and number, from people or places that nobody vouches for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from idloss.data.faces import MOST_PIXELS, decode_image, is_picture
from idloss.data.files import DataError, Fault, read_file

MOST_BYTES = 8 * MOST_PIXELS
"""Of a picture file: four channels of 16 bits, not compressed."""


def find_pictures(
    paths: Sequence[str], faults: list[Fault], *, without: Path | None = None
) -> Iterator[Path]:
    """The picture files meant by photos, folders and patterns, but those below a folder.

    They come as they are found, in the file system's order, and no list of them is kept. A folder
    is looked into once, however many ways lead to it, and a file that is named by itself is not
    taken from its folder again. What is none, or cannot be listed, is added to the faults.
    """
    seen = set() if without is None or not without.is_dir() else {_identity(without)}
    named: set[str] = set()
    for text in paths:
        found = iter([text]) if os.path.lexists(text) else glob.iglob(text)  # noqa: PTH207
        none = True
        for path in found:
            none = False
            if os.path.isdir(path):  # noqa: PTH112
                yield from _below(path, seen, named, faults)
            elif (place := _place(path)) not in named and not _was_below(place, seen):
                named.add(place)
                yield Path(path)
        if none:
            faults.append(Fault(text, "there is no such file or folder"))


def _below(
    top: str, seen: set[tuple[int, int]], named: set[str], faults: list[Fault]
) -> Iterator[Path]:
    """Pictures in a folder and those in it, depth first, without recursion: folders may be deep."""
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            identity = _identity(folder)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        folders.append(entry.path)
                    elif is_picture(entry.name) and not (named and _place(entry.path) in named):
                        yield Path(entry.path)
        except OSError as error:
            faults.append(Fault(folder, f"cannot be listed ({error.strerror or error})"))


def _was_below(place: str, seen: set[tuple[int, int]]) -> bool:
    """Whether a file was found in its folder before it was named."""
    folder, name = os.path.split(place)
    return is_picture(name) and os.path.isdir(folder) and _identity(folder) in seen  # noqa: PTH112


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: told when it is read
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)  # noqa: PTH116
    return about.st_dev, about.st_ino


def _place(path: str | Path) -> str:
    """A file by its real folder and its name."""
    folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118


def read_photo(path: str | os.PathLike[str]) -> Tensor:
    """A picture file as uint8 RGB `[3, H, W]`, upright; a DataError says what is wrong with it."""
    return decode_image(read_picture(path), str(path))


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """What a picture file holds; a DataError where that cannot be a picture."""
    place = Path(path)
    try:
        if place.exists() and not place.is_file():
            raise DataError([Fault(str(path), "it is no regular file")])
        if place.exists() and place.stat().st_size > MOST_BYTES:
            raise DataError([Fault(str(path), f"larger than a picture can be ({MOST_BYTES:,} B)")])
    except OSError as error:  # links in a circle
        raise DataError([Fault(str(path), error.strerror or str(error))]) from error
    return read_file(place)
