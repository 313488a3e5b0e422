"""The `.bin` verification sets of insightface: lfw, cfp_fp, agedb_30, calfw, cplfw."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm

from idloss.data.faces import FileFaces
from idloss.data.files import DataError, Fault, MemoryFiles, read_file, skip_or_raise
from idloss.data.pairs import EvaluationSet, Pairs, contiguous_folds

_ALLOWED = {
    "_codecs": ("encode",),  # bytes, as Python 3 writes them for Python 2
    "numpy": ("ndarray", "dtype"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.numeric": ("_frombuffer",),
}
"""The names that a pickle of lists, tuples, arrays and bytes may ask for, by module."""


class _Reader(pickle.Unpickler):
    """Builds lists, tuples, arrays and bytes; every name outside a short list is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 called it
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only lists, tuples, arrays and bytes are read"
            )
        return super().find_class(module, name)


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
    if not all(isinstance(item, bytes) for item in images):
        raise ValueError("expected every image to be the bytes of a file")
    if not all(isinstance(one, int | np.bool_ | np.integer) and one in (0, 1) for one in labels):
        raise ValueError("expected every label to be True or False")
    if not labels or len(images) != 2 * len(labels):
        raise ValueError(f"{len(images)} images for {len(labels)} pairs")
    return images, torch.tensor(labels).bool()
