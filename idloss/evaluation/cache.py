"""Embeddings on disk, found by what they were made of, so that nothing is computed twice.

A folder for each way from a face to an embedding (networks, protocol, size, software) holds any
number of shards, and a shard the digests of some faces and their embeddings. A shard is named after
the hash of its content, written whole and never changed: two processes may fill one folder at once,
a run that was killed goes on where it left off, and a damaged shard is seen and made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from idloss.geometry import TEMPLATES, Template
from idloss.weights.files import written_whole

Embeddings = NDArray[np.float32]

ONCE = "once-"
"""Keys that begin with it hold for one run: nothing else could be told from what they stand for."""
SHARD_BYTES = 256 * 2**20
"""No shard of ours comes near this size; a larger file is not read into memory."""


class EmbeddingCache:
    """Embeddings by how they were made (a key) and by face (a digest), in a folder or one run."""

    def __init__(self, folder: Path | None) -> None:
        self._lasting = folder
        self._temporary: Path | None = None
        self._folders = [] if folder is None else [folder]

    def __enter__(self) -> EmbeddingCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def known(self, key: str) -> set[bytes]:
        """Digests of the faces whose embeddings, made in this way, are there."""
        return {face for faces, _ in self._shards(key) for face in faces}

    def add(self, key: str, faces: Sequence[bytes], rows: Embeddings) -> None:
        """Write embeddings `[len(faces), D]` of faces, given by their digests of 32 bytes."""
        digests = np.frombuffer(b"".join(faces), np.uint8).reshape(len(rows), 32)
        shard = safetensors.numpy.save({"faces": digests, "rows": rows})
        if self._lasting is not None and not key.startswith(ONCE):
            try:  # a cache that is full or read-only costs nobody a run
                return _write(self._lasting / key, shard)
            except OSError as error:
                warnings.warn(
                    f"embeddings cannot be kept in {self._lasting}: {error.strerror}; the run "
                    "goes on without. To keep them, name another folder with cache= or "
                    "--cache-folder",
                    stacklevel=2,
                )
                self._lasting = None
        try:
            if self._temporary is None:
                self._temporary = Path(tempfile.mkdtemp(prefix="idloss-"))
                self._folders.append(self._temporary)
            return _write(self._temporary / key, shard)
        except OSError as error:
            raise OSError(
                f"no room for embeddings in {tempfile.gettempdir()}: {error.strerror}; set TMPDIR "
                "to a folder with more, or name one with cache= or --cache-folder"
            ) from error

    def load(self, key: str, faces: Sequence[bytes | None]) -> Embeddings:
        """Embeddings `[len(faces), D]` of faces by digest, zero where that is None."""
        places: dict[bytes, list[int]] = {}
        for place, face in enumerate(faces):
            if face is not None:
                places.setdefault(face, []).append(place)
        found: Embeddings | None = None
        for there, rows in self._shards(key):
            if found is None:
                found = np.zeros((len(faces), rows.shape[1]), dtype=np.float32)
            for row, face in zip(rows, there, strict=True):
                for place in places.pop(face, ()):
                    found[place] = row
        if places or found is None:
            raise OSError(  # somebody emptied the folder meanwhile
                f"{len(places)} embeddings vanished from {self._folders[0] / key} while they were "
                "in use; run again"
            )
        return found

    def _shards(self, key: str) -> Iterator[tuple[list[bytes], Embeddings]]:
        width = None
        for folder in self._folders:
            for path in sorted((folder / key).glob("*.safetensors")):
                try:
                    faces, rows = _read(path, width)
                except FileNotFoundError:
                    continue
                except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                    closed = isinstance(error, OSError)  # somebody else's: it stays
                    state = "cannot be read" if closed else "is damaged"
                    told = f"{path} {state} ({error}); what it held is computed anew"
                    warnings.warn(told, stacklevel=2)
                    if not closed:
                        with suppress(OSError):
                            path.unlink()
                    continue
                width = rows.shape[1]
                yield faces, rows


def _write(folder: Path, content: bytes) -> None:
    name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
    with written_whole(folder / name) as temporary:
        temporary.write_bytes(content)


def _read(path: Path, width: int | None) -> tuple[list[bytes], Embeddings]:
    """The faces and embeddings of a shard; it is looked at in full before it is believed."""
    if (size := path.stat().st_size) > SHARD_BYTES:
        raise ValueError(f"a shard of {size:,} bytes, more than the {SHARD_BYTES:,} expected")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise ValueError("its content is not what its name says")
    held = safetensors.numpy.load(content)
    faces, rows = held["faces"], held["rows"]
    whole = rows.dtype == np.float32 and rows.ndim == 2 and faces.shape == (len(rows), 32)
    if not whole or rows.shape[1] != (width or rows.shape[1]) or not np.isfinite(rows).all():
        raise ValueError(f"faces {faces.shape} and rows {rows.shape} do not belong together")
    return [face.tobytes() for face in faces], rows


def digest(*parts: object) -> str:
    """SHA-256 of the parts' `repr`, kept apart."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def digest_weights(net: nn.Module) -> str:
    """SHA-256 of parameters and buffers, those outside the state dict included."""
    total = hashlib.sha256()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(raw.numpy().data)
    return total.hexdigest()


def digest_network(net: nn.Module, shape: tuple[int, int, int] | None = None) -> str | None:
    """SHA-256 of what a network computes; None where it cannot be told from another network."""
    # the answer stands for weights that torch does not see: quantised ones, a session of another
    # runtime, an attribute that is a function
    answer = _answer(net, shape)
    if answer is None:
        return None
    cfg = getattr(net, "pretrained_cfg", None) or {}
    parts: list[object] = [cfg.get(key) for key in ("input_size", "mean", "std")]
    crop = getattr(net, "crop", None)
    if isinstance(crop, (str, Template)):  # an SRNet's may be a number of pixels
        parts.append(TEMPLATES.get(crop, crop) if isinstance(crop, str) else crop)
    for name, module in net.named_modules():
        # repr leaves out the likes of a residual's factor
        settings = {k: v for k, v in vars(module).items() if k != "training" and is_plain(v)}
        kind = type(module)
        parts += [name, kind.__qualname__, sorted(settings.items()), module.extra_repr()]
        if kind.__module__.partition(".")[0] != "torch":
            with suppress(OSError, TypeError):  # typed into an interpreter, or compiled
                parts.append(inspect.getsource(kind))
    return digest(*parts, digest_weights(net), answer)


@contextmanager
def as_tested(*nets: nn.Module) -> Iterator[None]:
    """Networks in eval mode, without gradients and TF32 (of 10 bits); afterwards as before."""
    cudnn = torch.backends.cudnn  # whose flags() turns it off if not told otherwise
    # a frozen ScriptModule's parts have no mode
    modules = (module for net in nets for module in net.modules() if hasattr(module, "training"))
    modes = {module: module.training for module in modules}
    try:
        for net in nets:
            with suppress(NotImplementedError):  # exported programs are in eval mode for ever
                net.eval()
        # not inference mode: what a network keeps is to serve training again
        with torch.no_grad(), cudnn.flags(cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _answer(net: nn.Module, shape: tuple[int, int, int] | None) -> str | None:
    """What a network gives for noise, hashed; None where that tells it from no other."""
    cfg = getattr(net, "pretrained_cfg", None) or {}
    reference = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
    size = shape or cfg.get("input_size", (3, 16, 16))
    noise = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(reference)
    devices = [reference.get_device()] if reference.is_cuda else []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would add up in another order, and differ in the last digits
    try:
        with as_tested(net), torch.random.fork_rng(devices):
            given: Tensor = net(noise)
            values, again = (one.float().cpu().numpy() for one in (given, net(noise)))
    except Exception:  # whatever a network of somebody else's raises
        return None
    finally:
        torch.set_num_threads(threads)
    telling = np.isfinite(values).all() and not np.array_equal(*values)
    if not telling or not np.array_equal(values, again):
        return None
    return digest(given.shape, given.dtype, values.tobytes())


def is_plain(value: Any) -> bool:
    """Whether a setting can be written down: a number, text, or a list of these."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))
