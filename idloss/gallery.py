"""Gallery: embeddings of the faces in folders of photos, kept on disk, found by a face."""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from numpy.typing import NDArray

from idloss.data.faces import decode_image
from idloss.data.files import DataError, Fault
from idloss.data.pictures import read_picture
from idloss.evaluation.identification import search
from idloss.matching import Face, FaceMatcher

_AT_ONCE = 8  # photos that are read and looked at together
# what is here is written once its embeddings are: a row without a photo is not there
_TABLES = """
CREATE TABLE IF NOT EXISTS settings (value TEXT);
CREATE TABLE IF NOT EXISTS photos
    (id INTEGER PRIMARY KEY, path BLOB UNIQUE, size INT, mtime INT, hash BLOB, seen INT);
CREATE TABLE IF NOT EXISTS faces
    (row INTEGER PRIMARY KEY, photo INT, x0 REAL, y0 REAL, x1 REAL, y1 REAL, rows REAL);
CREATE INDEX IF NOT EXISTS of_photo ON faces (photo);
"""


class Hit(NamedTuple):
    """A face of the gallery that is like a probe."""

    photo: Path
    face: Face


class Gallery:
    """Faces of photos with their embeddings, in a folder of two files, made once and kept fresh.

    `embeddings.npy` is read through a memory map, `index.sqlite` knows whose each row is. A stopped
    update goes on where it was; photos that are changed are embedded anew, those that are gone
    leave. Close it, or use it in a `with` statement.

    Args:
        folder: Where the two files are or are to be.
        matcher: What finds and embeds the faces.

    Raises:
        ValueError: If the folder's embeddings were made otherwise, or it is damaged.
        OSError: If it cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], matcher: FaceMatcher) -> None:
        self.folder, self.matcher = Path(folder), matcher
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = self.folder / "embeddings.npy"
        self._head = len(self._header(0))
        self._index = sqlite3.connect(self.folder / "index.sqlite")
        try:
            with self._alone():
                self._index.executescript(_TABLES)
                made = self._one("SELECT value FROM settings")
                if made is None:
                    self._index.execute("INSERT INTO settings VALUES (?)", (matcher.settings,))
                    self._index.commit()
        except sqlite3.DatabaseError as error:
            self.close()
            told = f"{self.folder} holds no gallery, or a damaged one ({error})"
            raise ValueError(f"{told}; delete it, or name another folder") from error
        if made not in (None, matcher.settings):
            self.close()
            raise ValueError(
                f"{self.folder} holds embeddings of other networks, another detector or crop; name "
                "another folder"
            )

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._one("SELECT COUNT(*) FROM faces"))

    def close(self) -> None:
        """Let go of the files."""
        self._index.close()

    def update(self, photos: Iterable[Path], faults: list[Fault]) -> None:
        """Take in photos that are new or changed, and leave out those that are not there any more.

        Args:
            photos: All that the gallery is to hold.
            faults: What cannot be read is added to them, and tried again next time. Where there
                are some, photos that were not seen are kept if they are still there.
        """
        with self._alone():
            run = 1 + int(self._one("SELECT COALESCE(MAX(seen), 0) FROM photos"))
            new: list[tuple[Path, bytes]] = []
            for path in photos:
                try:
                    if not self._is_known(path, run):
                        new.append((path, read_picture(path)))
                except (DataError, OSError) as error:
                    faults.append(_fault(path, error))
                    self._forget(self._number(path))
                if len(new) == _AT_ONCE:
                    self._take(new, run, faults)
                    new.clear()
            self._take(new, run, faults)
            for number, path in self._index.execute(
                "SELECT id, path FROM photos WHERE seen < ?", (run,)
            ).fetchall():
                if not faults or not os.path.lexists(path):  # perhaps in a folder that was not read
                    self._forget(number)
            self._index.commit()
            self._close_gaps()

    def search(self, faces: Sequence[Face], k: int = 5) -> list[list[Hit]]:
        """The faces most like each of some, best first, exactly."""
        with self._alone():
            count = len(self)
            if not count or not faces:
                return [[] for _ in faces]
            probes = torch.stack([face.embedding for face in faces])
            rows = self.rows()
            places = search(rows, probes, min(k, count)).places
            return [[self._hit(place, rows) for place in own] for own in places.tolist()]

    def rows(self) -> NDArray[np.float32]:
        """The embeddings `[N, D]`, of length 1, read where they are needed."""
        shape = (len(self), self.matcher.num_features)
        # what is read-only would be copied before torch takes it: a fifth of a search
        return np.memmap(self._rows, "<f4", "c", self._head, shape)

    def _alone(self) -> AbstractContextManager[object]:
        """One process at a time; the others wait."""
        return WeakFileLock(self.folder / ".lock")

    def _hit(self, place: int, rows: NDArray[np.float32]) -> Hit:
        row = self._index.execute(
            "SELECT path, x0, y0, x1, y1, rows FROM faces JOIN photos ON photo = id WHERE row = ?",
            (place,),
        ).fetchone()
        face = Face(tuple(row[1:5]), row[5], torch.from_numpy(rows[place].copy()))
        return Hit(Path(os.fsdecode(row[0])), face)

    def _one(self, question: str, *values: object) -> Any:
        row = self._index.execute(question, values).fetchone()
        return None if row is None else row[0]

    def _is_known(self, path: Path, run: int) -> bool:
        """Whether the photo is in the gallery as it is, by its size and time of change."""
        about = path.stat()
        fresh = self._index.execute(
            "UPDATE photos SET seen = ? WHERE path = ? AND size = ? AND mtime = ?",
            (run, os.fsencode(path.absolute()), about.st_size, about.st_mtime_ns),
        )
        return fresh.rowcount > 0

    def _take(self, new: Sequence[tuple[Path, bytes]], run: int, faults: list[Fault]) -> None:
        """Embed the faces of photos, their embeddings first, then what says whose they are."""
        pictures, taken = [], []
        for path, content in new:
            place, about = os.fsencode(path.absolute()), path.stat()
            state = (about.st_size, about.st_mtime_ns, sha256(content).digest(), run)
            known = self._one("SELECT id FROM photos WHERE path = ? AND hash = ?", place, state[2])
            if known is not None:  # copied or touched
                touched = "UPDATE photos SET size = ?, mtime = ?, hash = ?, seen = ? WHERE id = ?"
                self._index.execute(touched, (*state, known))
                continue
            self._forget(self._number(path))
            try:
                pictures.append(decode_image(content, str(path)))
                taken.append((path, place, state))
            except DataError as error:
                faults.append(_fault(path, error))
        self._index.commit()  # before rows that are free now are written to
        names = [str(path) for path, _, _ in taken]
        for (_, place, state), faces in zip(taken, self.matcher.find(pictures, names), strict=True):
            photo = self._index.execute(
                "INSERT INTO photos (path, size, mtime, hash, seen) VALUES (?, ?, ?, ?, ?)",
                (place, *state),
            ).lastrowid
            first = 1 + int(self._one("SELECT COALESCE(MAX(row), -1) FROM faces"))
            self._write(first, [face.embedding.numpy() for face in faces])
            self._index.executemany(
                "INSERT INTO faces VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(first + k, photo, *face.box, face.rows) for k, face in enumerate(faces)],
            )
        self._index.commit()

    def _number(self, path: Path) -> int | None:
        found: int | None = self._one(
            "SELECT id FROM photos WHERE path = ?", os.fsencode(path.absolute())
        )
        return found

    def _forget(self, photo: int | None) -> None:
        self._index.execute("DELETE FROM faces WHERE photo = ?", (photo,))
        self._index.execute("DELETE FROM photos WHERE id = ?", (photo,))

    def _write(self, first: int, rows: Sequence[NDArray[np.float32]]) -> None:
        if not self._rows.exists():
            self._rows.write_bytes(self._header(0))
        with self._rows.open("r+b") as file:
            file.seek(self._head + 4 * self.matcher.num_features * first)
            file.writelines(np.ascontiguousarray(row, dtype="<f4").tobytes() for row in rows)

    def _close_gaps(self) -> None:
        """Move the last rows to where photos left, and make the header true."""
        count = len(self)
        beyond = "SELECT row FROM faces WHERE row >= ? ORDER BY row"
        moving = [row for (row,) in self._index.execute(beyond, (count,))]
        if moving:
            rows = np.memmap(self._rows, "<f4", "r", self._head).reshape(
                -1, self.matcher.num_features
            )
            for place, row in zip(self._gaps(count), moving, strict=True):
                self._write(place, [rows[row]])
                self._index.execute("UPDATE faces SET row = ? WHERE row = ?", (place, row))
            del rows
            self._index.commit()
        if self._rows.exists():
            with self._rows.open("r+b") as file:
                file.write(self._header(count))
                file.truncate(self._head + 4 * self.matcher.num_features * count)

    def _gaps(self, count: int) -> list[int]:
        taken = self._index.execute("SELECT row FROM faces WHERE row < ? ORDER BY row", (count,))
        free = np.ones(count, dtype=np.bool_)
        for (row,) in taken:
            free[row] = False
        return [int(place) for place in np.flatnonzero(free)]

    def _header(self, count: int) -> bytes:
        """That of an .npy file, whose length does not depend on the count."""
        head, shape = io.BytesIO(), (count, self.matcher.num_features)
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, about)
        return head.getvalue()


def _fault(path: Path, error: Exception) -> Fault:
    known = error.faults if isinstance(error, DataError) else ()
    return known[0] if known else Fault(str(path), str(error))
