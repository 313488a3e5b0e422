"""Embeddings on disk, found by what they were made of, so that nothing is computed twice.

A folder for each way from a face to an embedding (networks, protocol, size, software) holds any
number of shards, and a shard the digests of some faces and their embeddings. Shards are written
whole and never changed: two processes may fill one folder at once, a run that was killed goes on
where it left off, and a damaged shard is made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray
from torch import nn

from idloss import __version__
from idloss.data import FaceSource, FileFaces
from idloss.weights.files import written_whole

Embeddings = NDArray[np.float32]

# What may change a pixel or the last digits of an embedding: a result never rests on embeddings of
# other software than it names.
SOFTWARE = ("torch", "pillow", "numpy")


class EmbeddingStore:
    """Embeddings by the way they were made (a key) and by face (a digest).

    Args:
        folder: Where they are kept; made when something is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def known(self, key: str) -> set[bytes]:
        """The digests of the faces whose embeddings are there.

        Args:
            key: How they were made.

        Returns:
            Digests, 32 bytes each.
        """
        return {face for faces, _ in self._shards(key) for face in faces}

    def add(self, key: str, faces: Sequence[bytes], rows: Embeddings) -> None:
        """Keep some embeddings.

        Args:
            key: How they were made.
            faces: Digest of each face, 32 bytes.
            rows: Embeddings `[len(faces), D]`.

        Raises:
            OSError: The folder cannot be written to.
        """
        digests = np.frombuffer(b"".join(faces), dtype=np.uint8).reshape(len(faces), -1)
        shard = self.folder / key / f"{uuid.uuid4().hex}.npz"
        with written_whole(shard) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, faces=digests, rows=rows)

    def load(self, key: str, faces: Sequence[bytes | None]) -> Embeddings:
        """Embeddings of some faces.

        Args:
            key: How they were made.
            faces: Digest of each face; None for one that is not wanted.

        Returns:
            Embeddings `[len(faces), D]`, zero for those not wanted.

        Raises:
            OSError: One that is wanted is not there: somebody emptied the folder meanwhile.
        """
        places: dict[bytes, list[int]] = {}
        for place, face in enumerate(faces):
            if face is not None:
                places.setdefault(face, []).append(place)
        found: Embeddings | None = None
        for there, rows in self._shards(key):
            if found is None:
                found = np.zeros((len(faces), rows.shape[1]), dtype=np.float32)
            for row, face in enumerate(there):
                for place in places.pop(face, ()):
                    found[place] = rows[row]
        if places or found is None:
            raise OSError(
                f"{len(places)} embeddings vanished from {self.folder / key} while they were in "
                "use; run again"
            )
        return found

    def _shards(self, key: str) -> Iterator[tuple[list[bytes], Embeddings]]:
        for path in sorted((self.folder / key).glob("*.npz")):
            try:
                # the archive's checksums are compared as its members are read
                with np.load(path, allow_pickle=False) as shard:
                    faces = [face.tobytes() for face in shard["faces"]]
                    rows: Embeddings = shard["rows"]
            except FileNotFoundError:
                continue
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError):
                path.unlink(missing_ok=True)  # damaged: made anew
                continue
            yield faces, rows


@contextmanager
def open_store(*, keep: bool = True) -> Iterator[EmbeddingStore]:
    """The store under `$HF_HOME/idloss/embeddings`, or one that goes when it is closed.

    Args:
        keep: Whether what is computed is to be found again by later runs.

    Yields:
        The store.
    """
    if keep:
        yield EmbeddingStore(Path(HF_HOME) / "idloss" / "embeddings")
    else:
        with tempfile.TemporaryDirectory(prefix="idloss-") as folder:
            yield EmbeddingStore(Path(folder))


def digest(*parts: object) -> str:
    """SHA-256 of the parts' `repr`, kept apart.

    Args:
        *parts: Plain values.

    Returns:
        Hexadecimal digest.
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def digest_software() -> str:
    """The versions of all that takes a part between a file and an embedding."""
    versions = {name: metadata.version(name) for name in SOFTWARE}
    return repr((__version__, versions))


def digest_weights(net: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, those outside its state dict included.

    Args:
        net: Any module.

    Returns:
        Hexadecimal digest; the same under any version of torch.
    """
    total = hashlib.sha256()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()


def digest_network(net: nn.Module) -> str:
    """SHA-256 of what a network computes: its modules, their settings and code, and its weights.

    Plain attributes count, because `repr` leaves out the likes of a residual's factor; so does the
    source of classes that are not torch's own, for a network under development changes without a
    new version. Functions called from there do not: clear the cache or leave it out after such a
    change.

    Args:
        net: Any module.

    Returns:
        Hexadecimal digest.
    """
    cfg = getattr(net, "pretrained_cfg", None) or {}
    shown = [cfg.get(key) for key in ("input_size", "mean", "std")]
    parts: list[object] = [shown, repr(getattr(net, "crop", None))]
    sources: dict[type, str] = {}
    for name, module in net.named_modules():
        kind = type(module)
        if kind not in sources:
            sources[kind] = _source(kind)
            parts.append(sources[kind])
        settings = {k: v for k, v in vars(module).items() if k != "training" and _is_plain(v)}
        parts.append((name, kind.__qualname__, sorted(settings.items()), module.extra_repr()))
    return digest(*parts, digest_weights(net))


def digest_face(faces: FaceSource, index: int) -> bytes:
    """SHA-256 of a face as it is stored: its file or pixels, its points, its template.

    Args:
        faces: The faces.
        index: Which.

    Returns:
        32 bytes.

    Raises:
        DataError: Its file cannot be read.
    """
    total = hashlib.sha256(repr(faces.template).encode())
    points = faces.landmarks
    if points is not None:
        total.update(points[index].contiguous().numpy().tobytes())
    if isinstance(faces, FileFaces):
        total.update(faces.files.read(faces.members[index]))
    else:
        total.update(faces.read(index).numpy().tobytes())
    return total.digest()


def _source(kind: type) -> str:
    if kind.__module__.partition(".")[0] == "torch":
        return ""
    with suppress(OSError, TypeError):  # typed into an interpreter, or compiled
        return inspect.getsource(kind)
    return ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))
