"""One file at a time: hashed, read without running code, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from idloss.weights.errors import HashMismatchError, UnreadableFileError, UnsafePickleError

_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _digest(path, hashlib.sha256())


def file_git_sha1(path: Path) -> str:
    r"""Git's name for a file's content, in hex: SHA-1 over `b"blob <size>\\0"` and the bytes."""
    header = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False))


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


@dataclass(frozen=True)
class Piece:
    """One file as it lies at its origin.

    Args:
        filename: Its base name there.
        url: Its address, for a machine and for a person.
        sha256: SHA-256 of its bytes in hex, where known.
        git_sha1: Its git blob name in hex, where known.
    """

    filename: str
    url: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """`"sha256:..."`, else `"git-sha1:..."`, else `"unpinned"`."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        return f"git-sha1:{self.git_sha1}" if self.git_sha1 else "unpinned"

    def mismatch(self, path: Path) -> str | None:
        """What is wrong with the file at `path`, in words; None when it is the pinned one."""
        for kind, expected, measure in (
            ("sha256", self.sha256, file_sha256),
            ("git-sha1", self.git_sha1, file_git_sha1),
        ):
            if expected and (got := measure(path)) != expected:
                size = path.stat().st_size
                return f"expected {kind} {expected}, got {got} ({size:,} bytes)"
        return None

    def verify(self, path: Path, name: str) -> None:
        """Raise `HashMismatchError` unless the file at `path` is the pinned one."""
        if wrong := self.mismatch(path):
            raise HashMismatchError(
                f"{name}: {self.filename} from {self.url} is not the pinned file: {wrong}. The "
                "origin changed it, or something between here and there did. It was not used."
            )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place, synced to disk, if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        settle(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def settle(temporary: Path, target: Path) -> None:
    """Sync a finished file to disk and move it over `target` in one step.

    Args:
        temporary: The finished file, on the file system of `target`.
        target: Where it is to be, existing or not.
    """
    sync(temporary)
    # mkstemp makes files for their owner only; a cache is often shared by a group
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(target)
    sync(target.parent)  # the rename itself must reach the disk too


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Args:
        path: The file or folder.
    """
    if path.is_dir() and os.name != "posix":  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, as long as its header says."""
    return path.is_file() and is_safetensors(path) and read_metadata(path) is not None


def load_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    """Read a state dict without running any code that may be in the file.

    Args:
        path: A safetensors file, or one written by `torch.save` in either of its formats.
        name: Whose weights they are, for the errors.

    Returns:
        The tensors by key, on the CPU; a `state_dict` or `model` entry of a training
        checkpoint is taken out of its wrapping.

    Raises:
        UnsafePickleError: The file asks for code to be run.
        UnreadableFileError: The file is no checkpoint, or holds other things than tensors.
    """
    if is_safetensors(path):
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UnreadableFileError(
                f"{name}: {path} is a broken safetensors file: {error}"
            ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise _unreadable(name, path) from error
        reason = str(error).partition("\n")[0]
        raise UnsafePickleError(
            f"{name}: {path} was refused: to read it, code in it would have to run ({reason}). "
            "Ask its authors for a state dict of plain tensors, or for safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise _unreadable(name, path) from error
    return _tensors(loaded, name, path)


def _unreadable(name: str, path: Path) -> UnreadableFileError:
    with path.open("rb") as file:
        head = file.read(16)
    return UnreadableFileError(
        f"{name}: {path} ({path.stat().st_size:,} bytes, beginning {head!r}) cannot be read as a "
        "PyTorch or safetensors checkpoint. A page of HTML in its place, or half of a file?"
    )


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _tensors(loaded: Any, name: str, path: Path) -> dict[str, Tensor]:
    for wrapping in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapping), Mapping):
            loaded = loaded[wrapping]
    if not isinstance(loaded, Mapping):
        raise UnreadableFileError(
            f"{name}: {path} holds a {type(loaded).__name__}, where a state dict was expected"
        )
    strange = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strange or not loaded:
        raise UnreadableFileError(
            f"{name}: {path} is not a state dict of tensors; "
            f"no tensors under: {', '.join(strange) or '(it is empty)'}"
        )
    return {str(key): value for key, value in loaded.items()}


def save_tensors(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        tensors: By key; views and shared storage are allowed, the file gets copies.
        target: The file to be.
        metadata: What the header is to tell about them.
    """
    own = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    with written_whole(target) as temporary:
        safetensors.torch.save_file(own, temporary, {"format": "pt", **metadata})


def read_metadata(path: Path) -> dict[str, str] | None:
    """The header's metadata of a safetensors file; None where it is absent or broken."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return None
