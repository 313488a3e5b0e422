"""Faces from their source to crops of one size, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss.data import DataError, FaceSource, Fault
from idloss.data.aligned import align_some
from idloss.evaluation.store import digest_face
from idloss.geometry import get_template
from idloss.resample import resize


class Batch(NamedTuple):
    """Faces that were read and aligned, `[B, 3, H, W]` uint8, and those that could not be."""

    places: Tensor
    crops: Tensor
    faults: dict[int, Fault]


def read_batch(faces: FaceSource, places: Sequence[int], template: str) -> Batch:
    """Some faces as crops of a template, and what is wrong with the others.

    Args:
        faces: Photos with landmarks, or crops of any size.
        places: Which.
        template: The template; that of the faces, where they have one.

    Returns:
        The crops that could be made, and the faults.
    """
    try:
        return Batch(torch.tensor(places), read_crops(faces, places, template), {})
    except ValueError as error:
        if len(places) == 1:
            found = error.faults[0] if isinstance(error, DataError) else None
            fault = found or Fault(faces.names[places[0]], str(error))
            return Batch(torch.empty(0).long(), torch.empty(0), {places[0]: fault})
    # one by one, to tell which
    parts = [read_batch(faces, [place], template) for place in places]
    good = [part for part in parts if not part.faults]
    faults = {place: fault for part in parts for place, fault in part.faults.items()}
    if not good:
        return Batch(torch.empty(0).long(), torch.empty(0), faults)
    return Batch(
        torch.cat([part.places for part in good]), torch.cat([part.crops for part in good]), faults
    )


def read_crops(faces: FaceSource, places: Sequence[int], template: str) -> Tensor:
    """Some faces as crops of a template.

    Args:
        faces: Photos with landmarks, or crops of any size, which are brought to their template's.
        places: Which, `B` of them.
        template: The template; that of the faces, where they have one.

    Returns:
        uint8 RGB `[B, 3, H, W]`.

    Raises:
        DataError: A photo cannot be read or aligned.
    """
    wanted = get_template(template)
    if faces.template is None:
        return align_some(faces, places, wanted)
    return torch.stack([resize(faces.read(place), wanted.size) for place in places])


def digest_faces(
    faces: FaceSource, places: Tensor, *, progress: bool = True
) -> tuple[dict[int, bytes], dict[int, Fault]]:
    """Digests of some faces, and what is wrong with those whose files cannot be read.

    Args:
        faces: The faces.
        places: Which, int64.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        Digests and faults by position.
    """
    digests: dict[int, bytes] = {}
    faults: dict[int, Fault] = {}
    for place in tqdm(places.tolist(), desc="hashing", unit="face", delay=2, disable=not progress):
        try:
            digests[place] = digest_face(faces, place)
        except DataError as error:  # noqa: PERF203 -- each file may be missing
            faults[place] = error.faults[0]
    return digests, faults
