"""Files by name out of a folder, a tar read in place, or memory, and what is wrong with them."""

from __future__ import annotations

import gzip
import mmap
import os
import posixpath
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

from huggingface_hub.utils.tqdm import tqdm

GZIP_MAGIC = b"\x1f\x8b"
UNPACK = "Unpack it and name the folder."
BLOCK = 1 << 20
"""Bytes unpacked at a time."""
MOST_UNPACKED = 1 << 30
"""Bytes that an archive may unpack to beyond 20 times its own, which photos never do."""
SHOWN = 10


class Fault(NamedTuple):
    """One thing wrong with a data set.

    Attributes:
        where: The file, with its line or archive member, e.g. `pairs.txt:17`.
        what: What is wrong there.
    """

    where: str
    what: str

    def __str__(self) -> str:
        # names come from other people's archives, and may hold what a terminal obeys
        return "".join(
            letter if letter.isprintable() else ascii(letter)[1:-1]
            for letter in f"{self.where}: {self.what}"
        )


class DataError(ValueError):
    """A data set cannot be used as it is.

    Args:
        faults: What is wrong; the first ten are spelt out in the message.
        remedy: The way out, one sentence.
    """

    def __init__(self, faults: Iterable[Fault] | str, remedy: str = "") -> None:
        self.remedy = remedy
        if isinstance(faults, str):
            # a DataLoader rebuilds what a worker raised from its traceback, which ends in the error
            self.faults: tuple[Fault, ...] = ()
            super().__init__(faults.rpartition(f"{type(self).__name__}: ")[2].rstrip())
            return
        self.faults = tuple(faults)
        super().__init__(describe(self.faults) + (f"\n{remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[DataError], tuple[tuple[Fault, ...] | str, str]]:
        # the default would rebuild from the message alone, and lose the faults
        return (type(self), (self.faults or str(self), self.remedy))


def describe(faults: tuple[Fault, ...]) -> str:
    """Spell out a single fault, or count several and list the first ten, one a line."""
    if len(faults) == 1:
        return str(faults[0])
    lines = [f"{len(faults)} faults:", *(f"  {fault}" for fault in faults[:SHOWN])]
    if len(faults) > SHOWN:
        lines.append(f"  ... and {len(faults) - SHOWN} more")
    return "\n".join(lines)


def skip_or_raise(faults: Iterable[Fault], *, skip_missing: bool) -> tuple[Fault, ...]:
    """Stop at faults, or skip them with a warning and hand them on to be recorded."""
    found = tuple(faults)
    if found and not skip_missing:
        raise DataError(found, "Mend them, or pass skip_missing=True to leave them out.")
    if found:
        warnings.warn(f"left out: {describe(found)}", UserWarning, stacklevel=3)
    return found


class Files(Protocol):
    """Named byte strings. Names use forward slashes; safe to share between threads and workers."""

    @property
    def location(self) -> str:
        """Where the files are, for messages."""

    def where(self, name: str) -> str:
        """One of the files, for messages."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a file of that name."""

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names that start with a folder prefix (`""` or `"folder/"`), in a stable order."""

    def read(self, name: str) -> bytes:
        """The bytes of one file; a DataError names it where it cannot be read."""


class FolderFiles:
    """The files below a folder, through links too; a folder that cannot be listed is an error."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.root)

    def where(self, name: str) -> str:
        """The file's path."""
        return str(self.root / name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._path(name).is_file()

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names below a sub-folder, depth first, sorted within each folder."""
        place = self._path(prefix)
        if place.is_dir():
            yield from self._below(place, prefix, {place.resolve()})

    def _below(self, folder: Path, start: str, above: set[Path]) -> Iterator[str]:
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: (entry.is_dir(), entry.name))
        except OSError as error:
            what = f"cannot be listed ({error.strerror or error})"
            raise DataError([Fault(str(folder), what)], "Let it be read.") from error
        for entry in entries:
            name = readable(entry.name)
            if name != entry.name and os.path.lexists(folder / name):
                raise DataError(
                    [Fault(str(folder / name), "is the name of two files")], "Rename one."
                )
            if not entry.is_dir():
                yield start + name
            elif (real := Path(entry.path).resolve()) not in above:  # a link upwards is a loop
                yield from self._below(Path(entry.path), f"{start}{name}/", above | {real})

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise DataError([Fault(self.where(name), error.strerror or str(error))]) from error

    def _path(self, name: str) -> Path:
        """The file of that name, in another spelling of its accents where it has that."""
        if name.isascii():
            return self.root / name
        found = self.root
        for part in PurePosixPath(name).parts:
            paths = [found / spelling for spelling in spellings(part)]
            found = next((path for path in paths if path.exists()), paths[0])
        return found


def readable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are taken for Latin-1."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("latin-1")
    return name


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is, composed, decomposed (macOS: `e` and an accent), and in Latin-1's bytes."""
    if name.isascii():
        return (name,)
    composed = unicodedata.normalize("NFC", name)
    spelt = (name, composed, unicodedata.normalize("NFD", name))
    try:
        return (*spelt, os.fsdecode(composed.encode("latin-1")))
    except UnicodeEncodeError:
        return spelt


class _Members:
    """Files that are told by an index of their names."""

    location: str
    """The archive, or where the files come from."""
    _index: dict[str, Any]

    def where(self, name: str) -> str:
        """The archive and the file in it."""
        return f"{self.location}:{name}"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(each in self._index for each in spellings(name))

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names below a folder of the archive, in the archive's order."""
        return (name for name in self._index if name.startswith(prefix))

    def _found(self, name: str) -> Any:
        for each in spellings(name):
            if each in self._index:
                return self._index[each]
        raise DataError([Fault(self.where(name), "there is no such file in the archive")])


class MemoryFiles(_Members):
    """Byte strings held in memory by name; `location` says where they came from."""

    def __init__(self, location: str, contents: Mapping[str, bytes]) -> None:
        self.location = location
        self._index = dict(contents)

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        content: bytes = self._found(name)
        return content


class TarFiles(_Members):
    """The files inside a `.tar`, `.tar.gz` or `.tgz`, indexed once, read through a memory map.

    A memory map needs no seek, so threads and forked workers share it without a lock. A compressed
    tar is unpacked once into an unnamed temporary file, which goes when the object does.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.location = path, str(path)
        self._index: dict[str, tuple[int, int]] = {}
        self._bytes = self._open()

    def read(self, name: str) -> bytes:
        """The bytes of one member."""
        offset, size = self._found(name)
        if size < 0:
            what = "it is a link to what the archive does not hold"
            raise DataError([Fault(self.where(name), what)])
        return self._bytes[offset : offset + size]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bytes = self._open()

    def _open(self) -> mmap.mmap:
        with self.path.open("rb") as packed, tempfile.TemporaryFile() as unpacked:
            plain: IO[bytes] = packed
            if packed.read(len(GZIP_MAGIC)) == GZIP_MAGIC:
                self._unpack(packed, unpacked)
                plain = unpacked
            plain.seek(0)
            if not self._index:
                self._read_index(plain)
            return mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ)

    def _unpack(self, packed: IO[bytes], unpacked: IO[bytes]) -> None:
        packed.seek(0)
        whole = self.path.stat().st_size
        what = f"unpacking {self.path.name}"
        bar = tqdm(total=whole, desc=what, unit="B", unit_scale=True, delay=2)
        try:
            with bar, gzip.open(packed) as stream:
                while block := stream.read(BLOCK):
                    unpacked.write(block)
                    if unpacked.tell() > MOST_UNPACKED + 20 * whole:
                        raise self._damaged(f"it unpacks to over {unpacked.tell() / 1e9:.1f} GB")
                    bar.update(packed.tell() - bar.n)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(f"the gzip stream is damaged or cut short ({error})") from error
        unpacked.flush()

    def _read_index(self, plain: IO[bytes]) -> None:
        last = "the start"
        links: dict[str, str] = {}
        try:
            with tarfile.open(fileobj=plain, mode="r:") as archive:
                for member in archive:
                    last = name = posixpath.normpath(readable(member.name))
                    to = readable(member.linkname)
                    if member.issparse():
                        what = "a sparse member, whose holes this reader does not fill"
                        raise DataError([Fault(self.where(name), what)], UNPACK)
                    if member.isreg():
                        self._index[name] = (member.offset_data, member.size)
                    elif member.islnk():
                        links[name] = posixpath.normpath(to)
                    elif member.issym():
                        links[name] = posixpath.normpath(
                            posixpath.join(posixpath.dirname(name), to)
                        )
                end = archive.offset
        except tarfile.TarError as error:
            if not self._index:
                what = f"not a tar or tar.gz, or cut short at its start ({error})"
                raise DataError([Fault(str(self.path), what)], UNPACK) from error
            raise self._damaged(f"cut short after {last} ({error})") from error
        # the tar module stops in silence at a header that is damaged or missing: a whole archive
        # ends in blocks of zeros
        plain.seek(end)
        tail = plain.read(tarfile.BLOCKSIZE)
        if len(tail) < tarfile.BLOCKSIZE or any(tail):
            raise self._damaged(f"cut short or damaged after {last}: no end-of-archive block")
        self._follow(links)
        if not self._index:
            raise self._damaged("the archive holds no files")

    def _follow(self, links: dict[str, str]) -> None:
        """Index links to files, also over other links, and then those to folders of files."""
        folders = {}
        for link, target in links.items():
            seen = {link}
            while target in links and target not in seen:
                seen.add(target)
                target = links[target]
            if target in self._index:
                self._index[link] = self._index[target]
            else:
                folders[link] = target
        files = tuple(self._index.items())  # not what is added: links to links could go on for ever
        for link, target in folders.items():
            below = [(name, place) for name, place in files if name.startswith(f"{target}/")]
            for name, place in below:
                self._index[link + name.removeprefix(target)] = place
            if not below and target not in (".", posixpath.dirname(link)):
                self._index[link] = (0, -1)

    def _damaged(self, what: str) -> DataError:
        return DataError([Fault(str(self.path), what)], "Copy or download the archive again.")


def read_file(path: Path) -> bytes:
    """The bytes of a file of its own; a DataError names it if it cannot be read."""
    return FolderFiles(path.parent).read(path.name)


def open_files(path: str | os.PathLike[str] | Files) -> Files:
    """The files of a folder, a `.tar`, `.tar.gz` or `.tgz`; files are given back."""
    if not isinstance(path, (str, os.PathLike)):
        return path
    place = Path(path).expanduser()
    if place.is_dir():
        return FolderFiles(place)
    if zipfile.is_zipfile(place):
        raise DataError([Fault(str(place), "zip archives are not read")], UNPACK)
    if place.is_file():
        return TarFiles(place)
    raise FileNotFoundError(f"no folder and no archive at {place}")
