"""IDS of two folders of pictures, matched by their names."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm

from idloss.data import DataError, Fault, FileFaces
from idloss.data.faces import is_picture
from idloss.data.files import Files, open_files, skip_or_raise
from idloss.encoder import resolve_device
from idloss.geometry import TEMPLATES, get_template
from idloss.metrics import BATCH, FNET, IdentitySimilarity
from idloss.resample import to_float


def measure_folders(
    restored: str | os.PathLike[str] | Files,
    references: str | os.PathLike[str] | Files,
    *,
    crop: str | None = None,
    fnet: Any = FNET,
    device: str | torch.device = "auto",
    skip_missing: bool = False,
    **options: Any,
) -> tuple[IdentitySimilarity, dict[str, float]]:
    """`IdentitySimilarity` of the pictures in two folders (or tars), which are matched by name.

    Pictures match that have the same path in their folder but for its ending (`.png`, `.jpg`).

    Args:
        restored: Restored faces.
        references: Faces of the same people.
        crop: Template that all of them are aligned to; None for the one template of the size that
            the first reference has, 112x96, 112x112 or 512x512.
        fnet: The face recogniser.
        device: Where it runs.
        skip_missing: Leave out pictures that have no counterpart or cannot be read, with a warning.
        **options: What else `IdentitySimilarity` takes.

    Returns:
        The metric, and the similarity of each picture by the name of the restored one.

    Raises:
        DataError: Pictures have no counterpart or cannot be read; names each.
        ValueError: There are no pictures, or their size tells no template.
    """
    crop = None if crop is None else get_template(crop).name
    stores = [open_files(restored), open_files(references)]
    pairs = _matched(*stores, skip_missing=skip_missing)
    if crop is None:
        name = pairs[0][1]
        size = tuple(FileFaces(stores[1], (name,), (name,)).read(0).shape[1:])
        fitting = [one for one, template in TEMPLATES.items() if template.size == size]
        if len(fitting) != 1:
            raise ValueError(
                f"{name} is {size[0]}x{size[1]}, which tells no template: name the one that the "
                "pictures are aligned to with crop=, such as crop=ffhq"
            )
        crop = fitting[0]
    sides = [
        FileFaces(files, names, names, crop=crop)
        for files, names in zip(stores, zip(*pairs, strict=True), strict=True)
    ]
    place = resolve_device(device)
    metric = IdentitySimilarity(fnet, crop=crop, **options).to(place)
    names: list[str] = []
    faults: list[Fault] = []
    every = torch.arange(len(pairs)).split(BATCH)
    for places in tqdm(every, desc="IDS", unit=f"x{BATCH} pictures", delay=2):
        bad: dict[int, Fault] = {}
        crops = [side.crops_at(places, faults=bad) for side in sides]
        faults += bad.values()
        good = torch.tensor([at not in bad for at in places.tolist()])
        if good.any() and (skip_missing or not faults):
            metric.update(*(to_float(one[good].to(place)) for one in crops))
            names += [pairs[at][0] for at in places[good].tolist()]
    skip_or_raise(faults, skip_missing=skip_missing)
    return metric, dict(zip(names, metric.values.tolist(), strict=True))


def _matched(restored: Files, references: Files, *, skip_missing: bool) -> list[tuple[str, str]]:
    """Names of pictures that go together."""
    sides: list[dict[str, str]] = []
    for files in (restored, references):
        found: dict[str, str] = {}
        for name in filter(is_picture, files.names()):
            other = found.setdefault(str(PurePosixPath(name).with_suffix("")), name)
            if other != name:
                what = f"differs from {other} by its ending alone: which one is meant?"
                raise DataError([Fault(files.where(name), what)])
        sides.append(found)
    ours, theirs = sides
    alone = [Fault(restored.where(ours[key]), "has no reference") for key in ours.keys() - theirs]
    alone += [Fault(references.where(theirs[key]), "not restored") for key in theirs.keys() - ours]
    pairs = [(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs)]
    if not pairs:
        where = f"{restored.location} and {references.location}"
        raise ValueError(f"no pictures of one name are in {where}")
    skip_or_raise(sorted(alone), skip_missing=skip_missing)
    return pairs
