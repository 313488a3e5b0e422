"""The `.bin` verification sets of insightface: lfw, cfp_fp, agedb_30, calfw, cplfw."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm

from idloss.data.faces import FileFaces
from idloss.data.files import DataError, Fault, MemoryFiles, read_file, skip_or_raise
from idloss.data.pairs import EvaluationSet, Pairs, contiguous_folds


def _array(*_: object) -> np.ndarray[Any, Any]:
    """An empty array, to be filled from the state that follows: no size asked for is made."""
    return np.ndarray((0,), np.uint8)


def _dtype(code: object, *_: object) -> np.dtype[Any]:
    letters = code.decode("ascii", "replace") if isinstance(code, bytes) else code
    if letters not in ("b1", "u1", "i1", "i4", "i8", "u4", "u8"):
        raise pickle.UnpicklingError(f"arrays of {letters!r} are not allowed")
    return np.dtype(letters)


def _scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, dtype, 1)[0].item()


def _frombuffer(data: bytes, dtype: np.dtype[Any], *_: object) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype)


def _bytes(content: object = b"", encoding: object = "latin1") -> bytes:
    if isinstance(content, str) and encoding in ("latin1", "latin-1"):
        return content.encode("latin-1")
    if not isinstance(content, bytes):  # a number asks for as many zeros
        raise pickle.UnpicklingError("bytes of an unknown make")
    return content


def _allowed() -> dict[tuple[str, str], Callable[..., Any]]:
    """The names that a pickle of lists, tuples, arrays and bytes may ask for."""
    table: dict[tuple[str, str], Callable[..., Any]] = {
        ("_codecs", "encode"): _bytes,  # bytes, as Python 3 writes them for Python 2
        ("numpy", "ndarray"): _array,
        ("numpy", "dtype"): _dtype,
    }
    for builtins in ("builtins", "__builtin__"):
        table[builtins, "bytes"] = table[builtins, "bytearray"] = _bytes
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _array
        table[f"{core}.multiarray", "scalar"] = _scalar
        table[f"{core}.numeric", "_frombuffer"] = _frombuffer
    return table


class _Reader(pickle.Unpickler):
    """Builds lists, tuples, arrays and bytes; every name outside a short list is refused.

    A function made on the spot stands for a name: a pickle may set attributes of what it is given,
    which must not outlive it.
    """

    allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name in the pickle."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only lists, tuples, arrays and bytes are read"
            )
        stand_in = self.allowed[module, name]
        return lambda *arguments: stand_in(*arguments)


def _refuse_greedy(data: bytes) -> None:
    """Refuse a pickle that asks for more room than it fills: its reader would make it first."""
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name and argument is not None and int(argument) > len(data):
            raise pickle.UnpicklingError(f"it asks for room for {argument} objects")


def insightface_bin(
    path: str | os.PathLike[str], *, crop: str = "arcface", skip_missing: bool = False
) -> EvaluationSet:
    """Read a `.bin` of insightface: a pickle of 2P image files and P labels, 112x112 crops.

    The pickle cannot run code: its reader knows a short list of names. Crops are of `crop` in
    whatever size, pairs in 10 contiguous folds; `skip_missing` leaves out those with unreadable
    images, which then are all decoded once.
    """
    place = Path(path).expanduser()
    data = read_file(place)
    try:
        _refuse_greedy(data)
        content = _Reader(io.BytesIO(data), encoding="bytes").load()
        images, same = _content(content)
    except Exception as error:  # what a damaged pickle raises is not told
        raise DataError([Fault(str(place), f"not a verification set: {error}")]) from error
    contents = {f"{i:05d}": image for i, image in enumerate(images)}
    files, names = MemoryFiles(str(place), contents), tuple(contents)
    faces = FileFaces(files, names, names, crop=crop)
    first, second = torch.arange(len(images)).view(-1, 2).unbind(1)
    pairs = Pairs(first, second, same, contiguous_folds(len(same)))
    if skip_missing:
        faults: dict[int, Fault] = {}
        for index in tqdm(range(len(faces)), desc="decoding", unit="face", delay=2):
            faces.crops_at([index], faults=faults)
        faces = replace(faces, skipped=skip_or_raise(faults.values(), skip_missing=True))
        lost = torch.tensor([*faults], dtype=torch.int64)
        pairs = pairs.select(~(torch.isin(first, lost) | torch.isin(second, lost)))
    return EvaluationSet(place.stem, faces, pairs)


def _content(content: object) -> tuple[list[bytes], torch.Tensor]:
    """The image files and labels of an unpickled `.bin`."""
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise ValueError("expected images and labels")
    bins, labels = content
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(bins, tuple | list) or not isinstance(labels, tuple | list):
        raise TypeError("expected a list of images and a list of labels")
    images = [item.tobytes() if isinstance(item, np.ndarray) else item for item in bins]
    if not all(isinstance(item, bytes | bytearray) for item in images):
        raise ValueError("expected every image to be the bytes of a file")
    if not all(isinstance(label, bool | int) and label in (0, 1) for label in labels):
        raise ValueError("expected every label to be True or False")
    if not labels or len(images) != 2 * len(labels):
        raise ValueError(f"{len(images)} images for {len(labels)} pairs")
    return [bytes(item) for item in images], torch.tensor(labels).bool()
