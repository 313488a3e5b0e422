"""The faces of a run: opened as its recipe says, named by a hash, and checked against an FNet."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch

from idloss.data import AlignedFaces, EvaluationSet, PackedFaces, open_evaluation, open_training
from idloss.encoder import FaceEncoder
from idloss.geometry import convert_crop, get_template
from idloss.training.crops import Faces

COVERAGE = 0.75
"""Least share of an FNet's crop that ours must hold: 112x96 crops hold 86 % of ArcFace's."""


def open_all_but(data: Path | None, exclude: Collection[str], *, skip_missing: bool) -> Faces:
    """Open faces to train on.

    Args:
        data: Where they are.
        exclude: Identities and images to leave out.
        skip_missing: Leave out faces that are missing or cannot be aligned.

    Returns:
        The faces.

    Raises:
        ValueError: No data are named, or nothing there has a name that is to be left out.
        FileNotFoundError: There are no faces.
        DataError: They have faults.
    """
    if data is None:
        raise ValueError("there are no faces to train on: set data=FOLDER")
    faces = open_training(data, skip_missing=skip_missing)
    if not exclude:
        return faces
    unwanted = set(exclude)
    unknown = unwanted - set(faces.names) - set(faces.identities)
    if unknown:
        raise ValueError(
            f"exclude names {', '.join(sorted(unknown))}: neither images nor identities of {data}"
        )
    labels = [-1] * len(faces) if faces.labels is None else faces.labels.tolist()
    keep = [
        name not in unwanted and (label < 0 or faces.identities[label] not in unwanted)
        for name, label in zip(faces.names, labels, strict=True)
    ]
    return faces.select(torch.tensor(keep))


def open_pairs(validate_on: Path | None, validate_every: int) -> EvaluationSet | None:
    """Open the pairs that a run is validated on.

    Args:
        validate_on: Where they are; None for none.
        validate_every: Steps between validations.

    Returns:
        The set, or None.

    Raises:
        ValueError: There is nothing to validate on, or it has no pairs.
    """
    if validate_on is None:
        if validate_every:
            raise ValueError("validate_every needs faces to verify: set validate_on=LFW")
        return None
    data = open_evaluation(validate_on)
    if data.pairs is None:
        raise ValueError(f"validate_on={validate_on} has no pairs to verify")
    return data


def content_of(faces: Faces) -> str:
    """A hash of the faces, so that a run does not go on with others.

    Args:
        faces: The faces.

    Returns:
        Hex digits.
    """
    if isinstance(faces, PackedFaces):
        return faces.content
    total = hashlib.sha256(repr((faces.template, faces.names)).encode())
    if isinstance(faces, AlignedFaces):
        total.update(faces.crops.numpy().data)
    elif faces.landmarks is not None:
        total.update(faces.landmarks.contiguous().numpy().data)
    return total.hexdigest()


def check_crop(encoder: FaceEncoder, crop: str) -> None:
    """Find out before training whether crops hold what an FNet wants to see.

    Args:
        encoder: The FNet.
        crop: Template of the crops.

    Raises:
        ValueError: They hold too little of its own crop.
    """
    template, wanted = get_template(crop), encoder.fnet_crop
    if wanted is None:  # it is meant to be stretched
        return
    whole = torch.ones(1, 1, *template.size)
    share = float(convert_crop(whole, template, wanted, fill=0.0).mean())
    if share < COVERAGE:
        raise ValueError(
            f"FNet and crop do not fit: {encoder} takes {wanted!r} crops, of which "
            f"crop={template.name} holds {share:.0%}: prepare the faces with --crop {wanted} "
            f"and set crop={wanted}"
        )
