"""One file at a time: downloaded, hashed, read without running code, written whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import logging
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from idloss.errors import some_of

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts that brought no new byte; one more failure is the last."""

LONGEST_WAIT = 120.0
"""The longest Retry-After that is waited for, in seconds."""

TIMEOUT = 20.0
"""Seconds without a byte before a connection counts as dead."""

ENTRIES = (
    *("params_ema", "g_ema", "state_dict_ema", "model_ema"),
    *("params", "state_dict", "state_dict_backbone", "model_state_dict", "model", "net"),
)
"""Where checkpoints keep weights: BasicSR, StyleGAN, timm, Lightning, insightface and their kin.

The first one found is taken: averaged weights are what these projects test with.
"""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, `torch.compile` and training frameworks put before every key."""

_STALE = 3600.0  # seconds after which a temporary file was left by a killed process
_LARGE = 1 << 16  # numbers of a tensor that is worth a read of its own
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = _FLOATS if sys.byteorder == "little" else {}  # as they lie in the file
_RESERVE = 64 << 20  # bytes of a disk that a download leaves free
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_DENIED = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
# What a network may have beyond its checkpoint: one of half precision or of 8 bits, tables that are
# computed; and what one without a checkpoint may have, whose numbers are a stranger's, too.
_SLACK = (8, 64 << 20)
_MOST_DRAWN = 1 << 30
_A_TENSOR = 64  # bytes that a file spends on the name of one

_Result = TypeVar("_Result")


class WeightsError(RuntimeError):
    """Weights could not be had, or are not what they should be."""


class UnreachableError(WeightsError):
    """There is no network (or `HF_HUB_OFFLINE` forbids it), or the host fails again and again."""


class NotAllowedError(WeightsError):
    """The host answered 401 or 403: gated, private, or the token is wrong."""


class NotFoundError(WeightsError):
    """There are no such weights, their file is gone, or only a person can bring it."""


class NotAsPromisedError(WeightsError):
    """A file is not the pinned one, cannot be read, holds code, or does not fit its model."""


class TryAgain(Exception):  # noqa: N818
    """An attempt failed with `error`, and another one may not; the host asks to `wait` seconds."""

    def __init__(
        self, error: WeightsError, *, wait: float = 0.0, pauses: int = len(PAUSES)
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait = wait
        self.pauses = pauses


# --- pinned files --------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return _digest(path, hashlib.sha256())


def file_git_sha1(path: Path) -> str:
    """Git's name for a file's content, in hex."""
    header = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False))


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


@dataclass(frozen=True)
class Piece:
    """One file as it lies at its origin: name, address, hashes where known, most bytes it has."""

    filename: str
    url: str
    sha256: str | None = None
    git_sha1: str | None = None
    limit: int = 1 << 30

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
        """Raise `NotAsPromisedError` unless the file at `path` is the pinned one."""
        if wrong := self.mismatch(path):
            raise NotAsPromisedError(
                f"{name}: {self.filename} from {self.url} is not the pinned file: {wrong}. The "
                "origin changed it, or something between here and there did. It was not used."
            )


# --- downloads -----------------------------------------------------------------------------------


def download(piece: Piece, target: Path, name: str) -> None:
    """Download a file for `name`, verify it, and only then let it appear at `target`.

    What an interrupted download left is gone on with, and if that gives the wrong hash, begun
    again once. The caller holds a lock on `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")

    def reached() -> int:
        return partial.stat().st_size if partial.exists() else 0

    def bring() -> bool:
        return with_retries(lambda: _attempt(piece, partial, reached(), name), reached)

    try:
        if bring() and (wrong := piece.mismatch(partial)):
            logger.warning("%s: resumed %s is wrong (%s): once more", name, piece.filename, wrong)
            partial.unlink()
            bring()
        piece.verify(partial, name)
        settle(partial, target)
    except NotAsPromisedError:
        partial.unlink(missing_ok=True)
        raise


def with_retries(attempt: Callable[[], _Result], reached: Callable[[], int] = lambda: 0) -> _Result:
    """Call `attempt` again after each `TryAgain`; only those count that `reached` no new byte."""
    furthest, failures = reached(), 0
    while True:
        try:
            return attempt()
        except TryAgain as failure:
            failures = 0 if reached() > furthest else failures + 1
            furthest = max(furthest, reached())
            if failures > failure.pauses or failure.wait > LONGEST_WAIT:
                raise failure.error from failure.__cause__
            pause = max(failure.wait, PAUSES[max(failures - 1, 0)])
            logger.warning("%s; trying again in %.1f s", failure, pause)
        time.sleep(pause)


def _attempt(piece: Piece, partial: Path, offset: int, name: str) -> bool:
    """One request, from where `partial` ends; whether what was there before is part of it."""
    what = f"{name}: {piece.filename} from {piece.url}"
    headers = {"User-Agent": "idloss", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        request = urllib.request.Request(piece.url, headers=headers)
        # an opener of its own: the shared one keeps the proxies of the first call
        with urllib.request.build_opener().open(request, timeout=TIMEOUT) as response:
            begin = response.headers.get("Content-Range", "").partition("-")[0]
            if response.status != 206 or begin != f"bytes {offset}":
                offset = 0
            total = None if response.length is None else offset + response.length
            got = _receive(response, partial, offset, total, piece)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and offset:
                return True  # nothing is left to send; the hash decides
            raise _refusal(what, error) from error
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and is_of_the_disk(error):
            raise
        refused = isinstance(error, urllib.error.URLError) and not isinstance(
            reason, ConnectionResetError
        )
        unreachable = UnreachableError(f"{what}: no connection ({reason})")
        raise TryAgain(unreachable, pauses=1 if refused else len(PAUSES)) from error
    if total is not None and got < total:
        raise TryAgain(
            UnreachableError(f"{what}: the host announced {total:,} bytes and sent {got:,}")
        )
    return offset > 0


def is_of_the_disk(error: OSError) -> bool:
    """Whether a file could not be written, which is not the network's fault."""
    return error.errno in _DISK or (error.filename is not None and error.errno in _DENIED)


@contextmanager
def disk_advice() -> Iterator[None]:
    """Say where else to, when the cache cannot be written."""
    try:
        yield
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        told = f"{error.strerror}. HF_HOME, or cache_dir=, names another folder"
        raise OSError(error.errno, told, error.filename) from error


def _receive(
    response: http.client.HTTPResponse, partial: Path, offset: int, total: int | None, piece: Piece
) -> int:
    """Write the body behind `offset`, with progress on a terminal; how long `partial` is now."""
    room = offset + shutil.disk_usage(partial.parent).free - _RESERVE

    def check(size: int) -> None:
        if size > piece.limit:
            raise NotAsPromisedError(f"{piece.url} has more than the {piece.limit:,} bytes it may")
        if size > room:
            raise OSError(errno.ENOSPC, f"{piece.url} does not fit into {partial.parent}")

    check(total or 0)
    # disabled where there is no terminal
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None}
    bar = tqdm(total=total, initial=offset, desc=piece.filename, **options)
    with partial.open("ab" if offset else "wb") as file, bar:
        # read1 hands on what has arrived; read would lose it when the connection breaks
        while file.tell() <= min(piece.limit, room) and (block := response.read1(1 << 16)):
            file.write(block)
            bar.update(len(block))
        check(file.tell())
        return file.tell()


def _refusal(what: str, error: urllib.error.HTTPError) -> Exception:
    """Our error for an HTTP status."""
    answer = f"{what}: the host answered {error.code} {some_of([str(error.reason)])}"
    if error.code in (401, 403):
        return NotAllowedError(answer)
    if error.code in (404, 410):
        return NotFoundError(answer)
    if error.code not in _RETRIED:
        return UnreachableError(answer)
    seconds = error.headers.get("Retry-After", "")
    if not seconds.isdecimal():
        return TryAgain(UnreachableError(answer))
    asking = UnreachableError(f"{answer}, and asks for a pause of {seconds} s")
    return TryAgain(asking, wait=float(seconds))


# --- written whole -------------------------------------------------------------------------------


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place, synced to disk, if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    for left in target.parent.iterdir():
        if left.name.startswith(prefix) and left.suffix == ".tmp" and is_stale(left):
            left.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        settle(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def is_stale(path: Path) -> bool:
    """Whether a temporary file is so old that a killed process must have left it."""
    try:
        return time.time() - path.stat().st_mtime > _STALE
    except FileNotFoundError:  # another process was quicker
        return False


def settle(temporary: Path, target: Path) -> None:
    """Sync a finished file to disk and move it over `target`, on the same disk, in one step."""
    sync(temporary)
    # mkstemp makes files for their owner only; a cache is often shared by a group
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(target)
    sync(target.parent)  # the rename itself must reach the disk too


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":  # where folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- state dicts ---------------------------------------------------------------------------------


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does: eight bytes of length, then JSON."""
    return _head(path)[8:9] == b"{"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def load_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    """Read a state dict, of safetensors or of torch, without running any code in the file."""
    try:
        if is_safetensors(path):
            return dict(_tensors_in(path))
        _refuse_compressed(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    # a damaged or hostile file may raise whatever it likes
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        pickled = _head(path)[:1] == b"\x80" or zipfile.is_zipfile(path)
        if not (isinstance(error, pickle.UnpicklingError) and pickled):
            raise _unreadable(name, path, error) from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" ({found[1]})" if found else ""
        raise NotAsPromisedError(
            f"{name}: {some_of([str(path)])} was refused: to read it, code{reason} would run. "
            "Ask its authors for a state dict of plain tensors, or for safetensors."
        ) from error
    tensors = _unwrapped(loaded, name, path)
    held, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if held > 16 * size:
        raise NotAsPromisedError(
            f"{name}: {some_of([str(path)])} has {size:,} bytes, and its tensors {held:,}"
        )
    return tensors


def _tensors_in(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Key and tensor of a safetensors file in the order of keys, each read when it is asked for.

    They are in memory of their own: a mapped file may change, or be cut short, under a model. Large
    ones are read straight into it, which safetensors would fill with zeros before.
    """
    with (
        safetensors.safe_open(path, framework="pt", backend="pread") as held,
        path.open("rb") as file,
    ):
        end = 8 + int.from_bytes(file.read(8), "little")  # of the header, and then of each tensor
        places: dict[str, tuple[Tensor, int | None]] = {}
        for key in held.offset_keys():
            part = held.get_slice(key)
            dtype, shape = _FLOATS.get(part.get_dtype()), part.get_shape()
            is_large = dtype is not None and math.prod(shape) >= _LARGE
            tensor = torch.empty(shape, dtype=dtype) if is_large else held.get_tensor(key)
            places[key] = tensor, end if is_large else None
            end += tensor.nbytes
        for key, (tensor, start) in sorted(places.items()):
            if start is not None:
                file.seek(start)
                if file.readinto(_content(tensor)) < tensor.nbytes:
                    raise EOFError(f"it ends within {key}")
            yield key, tensor


def _content(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, where they are."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _refuse_compressed(path: Path) -> None:
    """State dicts are stored as they are; what is packed smaller may fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("a TorchScript is a program: torch.save its state_dict() instead")
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"it would unpack to {unpacked:,} bytes")


def _unreadable(name: str, path: Path, error: Exception) -> NotAsPromisedError:
    reason = str(error).partition("\n")[0][:200]
    return NotAsPromisedError(
        f"{name}: {some_of([str(path)])} ({path.stat().st_size:,} bytes, beginning "
        f"{_head(path)!r}) cannot be read as a PyTorch or safetensors checkpoint "
        f"({type(error).__name__}: {reason!r}). A page of HTML in its place, or half of a file?"
    )


def _unwrapped(loaded: Any, name: str, path: Path) -> dict[str, Tensor]:
    """The tensors in what was read, out of the entry of a training checkpoint that holds them."""
    for _ in range(4):  # a mapping may hold itself
        if not isinstance(loaded, Mapping):
            break
        entries = [entry for entry in ENTRIES if isinstance(loaded.get(entry), Mapping)]
        if not entries:
            break
        beside = f", not {some_of(entries[1:])}" if entries[1:] else ""
        logger.warning("%s: took %r of %s%s", name, entries[0], path.name, beside)
        loaded = loaded[entries[0]]
    if not isinstance(loaded, Mapping):
        kind = type(loaded).__name__
        raise NotAsPromisedError(f"{name}: {path} holds a {kind}, where a state dict was expected")
    strange = [str(key) for key, value in loaded.items() if not _is_plain(value)]
    if strange or not loaded:
        raise NotAsPromisedError(
            f"{name}: {path} is not a state dict of plain tensors; "
            f"none under: {some_of(strange) if strange else '(it is empty)'}"
        )
    tensors = {str(key): value for key, value in loaded.items()}
    if len(tensors) < len(loaded):  # 1 and "1"
        twice = [repr(key) for key in loaded if not isinstance(key, str) and str(key) in loaded]
        raise NotAsPromisedError(
            f"{name}: {path} has two tensors each for keys that read alike, {some_of(twice)} as a "
            "number and as text: leave one of them out"
        )
    return tensors


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
    )


def checkpoint_in(folder: Path) -> Path:
    """The file of a folder that holds its weights: safetensors first, a `model` first."""
    for ending in ("safetensors", "bin", "pth", "pt", "ckpt"):
        found = sorted(
            folder.glob(f"*.{ending}"), key=lambda path: ("model" not in path.stem, path)
        )
        if found:
            return found[0]
    raise NotFoundError(f"{folder} holds no weights: no .safetensors, .bin, .pth, .pt or .ckpt")


def without_prefixes(
    state_dict: Mapping[str, Tensor], name: str, own: Collection[str] = ()
) -> dict[str, Tensor]:
    """Take off each of `PREFIXES` that all keys have, unless keys of the model's `own` have it."""
    tensors = dict(state_dict)
    while tensors:
        shared = [prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)]
        if not shared or any(key.startswith(shared[0]) for key in own):
            break
        logger.warning("%s: took the prefix %r off all keys", name, shared[0])
        tensors = {key.removeprefix(shared[0]): value for key, value in tensors.items()}
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], target: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors, shared and strided ones too, as safetensors that know their own digest."""
    own = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    about = {"format": "pt", "idloss.digest": _digested(sorted(own.items()))[0], **metadata}
    with written_whole(target) as temporary:
        try:
            safetensors.torch.save_file(own, temporary, about)
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, f"not written: {error}", str(target)) from error


def load_verified(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file that `save_tensors` wrote with the `idloss.key` `key`.

    None where it is absent or has another key, or its tensors changed.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
        if about.get("idloss.key") != key:
            return None
        digest, tensors = _digested(_tensors_in(path))
    except (OSError, EOFError, safetensors.SafetensorError):
        return None
    return tensors if about.get("idloss.digest") == digest else None


def _digested(pairs: Iterable[tuple[str, Tensor]]) -> tuple[str, dict[str, Tensor]]:
    """The digest of tensors in the order of their keys, made while the next is read, and they."""
    digest, tensors = hashlib.sha256(), {}
    with ThreadPoolExecutor(1) as beside:
        for key, tensor in pairs:
            tensors[key] = tensor
            beside.submit(digest.update, f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            beside.submit(digest.update, _content(tensor))
    return digest.hexdigest(), tensors


# --- networks of strangers ------------------------------------------------------------------------


@contextmanager
def no_larger_than(checkpoint: int | None) -> Iterator[None]:
    """Refuse a network, while it is built, that has far more bytes than its checkpoint."""
    times, more = _SLACK
    limit = _MOST_DRAWN if checkpoint is None else times * checkpoint + more
    builder, counted = get_ident(), 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal counted
        if tensor is None or is_lazy(tensor) or get_ident() != builder:
            return
        counted += tensor.nbytes + _A_TENSOR
        if counted > limit:
            holds = "there is no checkpoint"
            if checkpoint is not None:
                holds = f"its checkpoint has {checkpoint:,}"
            raise NotAsPromisedError(
                f"it asks for more than {limit:,} bytes of weights, and {holds}: "
                f"{name} of a {type(module).__name__} is {list(tensor.shape)}"
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
