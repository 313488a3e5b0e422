"""Faces to crops and digests, until the face classes give them themselves."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from idloss.data import DataError, FaceSource, Fault, FileFaces
from idloss.data.aligned import align_some
from idloss.geometry import get_template
from idloss.resample import resize


def crops_at(faces: FaceSource, places: Tensor, crop: str, *, faults: dict[int, Fault]) -> Tensor:
    """Faces as crops of a template, uint8 `[B, 3, H, W]`; zero for those in `faults`."""
    wanted = get_template(crop)
    try:
        if faces.template is None:
            return align_some(faces, places.tolist(), wanted)
        return torch.stack([resize(faces.read(place), wanted.size) for place in places.tolist()])
    except ValueError as error:
        if len(places) == 1:
            found = error.faults[0] if isinstance(error, DataError) else None
            faults[int(places)] = found or Fault(faces.names[int(places)], str(error))
            return torch.zeros(1, 3, *wanted.size, dtype=torch.uint8)
    return torch.cat([crops_at(faces, place[None], crop, faults=faults) for place in places])


def digest_face(faces: FaceSource, index: int) -> bytes:
    """SHA-256 of a face as it is stored: its file or pixels, its points, its template."""
    total = hashlib.sha256(repr(faces.template).encode())
    points = faces.landmarks
    if points is not None:
        total.update(points[index].contiguous().numpy().tobytes())
    if isinstance(faces, FileFaces):
        total.update(faces.files.read(faces.members[index]))
    else:
        total.update(faces.read(index).numpy().tobytes())
    return total.digest()
