"""The `.bin` verification sets of insightface: lfw, cfp_fp, agedb_30, calfw, cplfw."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm

from idloss.data.faces import FileFaces
from idloss.data.files import DataError, Fault, MemoryFiles, read_file, skip_or_raise
from idloss.data.folds import contiguous_folds
from idloss.data.pairs import EvaluationSet, Pairs


class _Dtype:
    """Stands in for `numpy.dtype` in a pickle; holds the letters of a plain number type."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str | bytes):
            raise pickle.UnpicklingError(f"a number type was expected, got {code!r}")
        letters = code if isinstance(code, str) else code.decode("ascii", "replace")
        if letters not in ("b1", "u1", "i1", "i4", "i8", "u4", "u8"):
            raise pickle.UnpicklingError(f"arrays of {letters!r} are not allowed")
        self.letters = letters

    def __setstate__(self, state: object) -> None:
        # the byte order follows; these files are written on little-endian machines, as it says
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", b"<", b"|"):
            raise pickle.UnpicklingError(f"an odd number type: {state!r}")

    def read(self, data: object) -> np.ndarray[Any, Any]:
        """The numbers in some bytes."""
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError(f"an array's data are {type(data).__name__}, not bytes")
        return np.frombuffer(data, np.dtype(self.letters).newbyteorder("<"))


class _Array:
    """Stands in for `numpy.ndarray`; is filled from the state that follows it."""

    values: np.ndarray[Any, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Dtype):
            raise pickle.UnpicklingError("an array of an unknown make")
        self.values = state[2].read(state[4])


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _from_buffer(data: object, dtype: object, *_: object) -> _Array:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("an array of an unknown make")
    array = _Array()
    array.values = dtype.read(data)
    return array


def _scalar(dtype: object, data: object) -> Any:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError("a number of an unknown make")
    return dtype.read(data)[0].item()


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes of an unknown make")
    return text.encode("latin-1")


def _no_bytes(*content: object) -> bytes:
    if content:
        raise pickle.UnpicklingError("bytes of an unknown make")
    return b""


def _buffer(content: object = b"", *rest: object) -> bytes:
    if isinstance(content, str):
        return _latin1(content, *rest)
    if rest or not isinstance(content, bytes):
        raise pickle.UnpicklingError("bytes of an unknown make")
    return content


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle of lists, tuples, arrays and bytes may name, and what stands in for it."""
    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("_codecs", "encode"): _latin1,  # bytes, as Python 3 writes them for Python 2
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }
    for builtins in ("builtins", "__builtin__"):
        table[builtins, "bytes"] = _no_bytes
        table[builtins, "bytearray"] = _buffer
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _reconstruct
        table[f"{core}.multiarray", "scalar"] = _scalar
        table[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return table


class _Reader(pickle.Unpickler):
    """Builds lists, tuples, arrays and bytes; every name outside a short list is refused.

    Even the names on the list are not looked up: harmless stand-ins of this module are given, so
    that a pickle reaches neither numpy nor anything else. Each is a function made on the spot: a
    pickle may set attributes of what it is given, which must not outlive it.
    """

    allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in the pickle."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only lists, tuples, arrays and bytes are read"
            )
        stand_in = self.allowed[module, name]
        return lambda *arguments: stand_in(*arguments)


def insightface_bin(path: str | os.PathLike[str], *, skip_missing: bool = False) -> EvaluationSet:
    """Read a `.bin` of insightface: a pickle of 2P image files and P labels, 112x112 crops.

    The pickle cannot run code: it is read by a reader that knows no function at all.

    Args:
        path: such as `lfw.bin` or `cfp_fp.bin`.
        skip_missing: leave out pairs with unreadable images, which then are all decoded once.

    Returns:
        The crops, aligned to `arcface`, with the pairs in 10 contiguous folds.

    Raises:
        DataError: the pickle names code, is cut short, or does not hold pairs.
    """
    place = Path(path).expanduser()
    data = read_file(place)
    try:
        content = _Reader(io.BytesIO(data), encoding="bytes").load()
        images, same = _content(content)
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        raise DataError([Fault(str(place), f"not a verification set: {error}")]) from error
    names = tuple(f"{i:05d}" for i in range(len(images)))
    files = MemoryFiles(str(place), dict(zip(names, images, strict=True)))
    faces = FileFaces(files, names, names, crop="arcface")
    first, second = torch.arange(len(images)).view(-1, 2).unbind(1)
    pairs = Pairs(first, second, same, contiguous_folds(len(same)))
    if skip_missing:
        faults = _unreadable(faces)
        faces = replace(faces, skipped=skip_or_raise(faults.values(), skip_missing=True))
        lost = torch.tensor([*faults], dtype=torch.int64)
        pairs = pairs.select(~(torch.isin(first, lost) | torch.isin(second, lost)))
    return EvaluationSet(place.stem, faces, pairs)


def _content(content: object) -> tuple[list[bytes], torch.Tensor]:
    """The image files and labels of an unpickled `.bin`."""
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise ValueError("expected images and labels")
    bins, labels = content
    if isinstance(labels, _Array):
        labels = labels.values.tolist()
    if not isinstance(bins, tuple | list) or not isinstance(labels, tuple | list):
        raise TypeError("expected a list of images and a list of labels")
    images = [item.values.tobytes() if isinstance(item, _Array) else item for item in bins]
    if not all(isinstance(item, bytes | bytearray) for item in images):
        raise ValueError("expected every image to be the bytes of a file")
    if not all(isinstance(label, bool | int) and label in (0, 1) for label in labels):
        raise ValueError("expected every label to be True or False")
    if not labels or len(images) != 2 * len(labels):
        raise ValueError(f"{len(images)} images for {len(labels)} pairs")
    return [bytes(item) for item in images], torch.tensor(labels).bool()


def _unreadable(faces: FileFaces) -> dict[int, Fault]:
    faults = {}
    for index in tqdm(range(len(faces)), desc="decoding", unit="face", delay=2):
        try:
            faces.read(index)
        except DataError as error:  # noqa: PERF203 -- each image may fail
            faults[index] = error.faults[0]
    return faults
