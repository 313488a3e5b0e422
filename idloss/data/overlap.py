"""Who is in both the training and the evaluation data, found by embeddings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from idloss.data.faces import Faces, map_ahead
from idloss.data.files import DataError, Fault, skip_or_raise
from idloss.data.synthetic import draw_faces
from idloss.geometry import Template, get_template
from idloss.resample import to_float

THRESHOLD = 0.65
"""Cosine above which two faces count as one person, for MobileFaceNet trained on CASIA-WebFace.

Measured on 298 people (5,524 photos) of CelebA against 11,585 photos of LFW, all candidates judged
by eye: the three true finds are at 0.88 and 0.70 (two people) and at 0.77 (one photo under a wrong
label), the highest false ones at 0.658 (two people) and 0.666 (two photos). A half of a person's
photos matches four others of him above it in 98.8 % of cases, a single one in 80 %. Rather one
person too few in training than one too many: hence below 0.666. Another FNet has another threshold.
"""
BLOCK = 1 << 24
"""Similarities held at once: 64 MB."""
BATCH = 64
"""Faces embedded at once."""
ROW_BYTES = 1024
"""Bytes of a face in a prepared folder's tables, rather too many: 300 with CelebA's short names."""


@dataclass(frozen=True)
class Match:
    """A training person, or a single training photo, that is in the evaluation data.

    Attributes:
        identity: The training person; empty for a photo of nobody known.
        photo: The training photo where only that matches (often one with a wrong label), else None.
        other: The evaluation person, or photo where it has no labels.
        similarity: The cosine.
    """

    identity: str
    photo: str | None
    other: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Exclusion:
    """Evaluation faces whose people must not be in the training data.

    Attributes:
        name: The evaluation set's name, for reports.
        faces: Its faces, labelled by person or not.
        encoder: RGB [0, 1] crops `[B, 3, H, W]` of the prepared template to embeddings `[B, D]`,
            such as a `FaceEncoder` with that `crop`.
        fnet: The recogniser's name, for reports.
        threshold: The cosine above which two faces are one person; depends on the FNet.
    """

    name: str
    faces: Faces
    encoder: Callable[[Tensor], Tensor]
    fnet: str
    threshold: float = THRESHOLD

    def describe(self, crop: Template) -> dict[str, object]:
        """What tells this exclusion from others; refuses an encoder that wants another crop."""
        own = getattr(self.encoder, "crop", None) or getattr(self.encoder, "fnet_crop", None)
        if own is not None and (its := get_template(own)) != crop:
            raise ValueError(
                f"the encoder takes {its.name!r} crops and these are to be {crop.name!r}: "
                f"give it crop={crop.name!r}"
            )
        drawn = draw_faces(1, 1, size=crop.size, crop=crop.name)
        probe = embed_faces(drawn, self.encoder, crop, progress=False)[0][0, :8]
        return {
            "overlap": self.name,
            "overlap_content": self.faces.content,
            "overlap_fnet": self.fnet,
            "overlap_threshold": self.threshold,
            "overlap_probe": [round(value, 4) for value in probe.tolist()],
        }

    def find(
        self,
        training: Faces,
        folder: Path,
        *,
        skip_missing: bool,
        threads: int | None,
        progress: bool,
    ) -> tuple[list[Match], tuple[Fault, ...]]:
        """Matches, most similar first, and the evaluation photos that could not be compared."""
        embed = partial(
            embed_faces,
            encoder=self.encoder,
            crop=training.crop or "",
            keep_in=folder,
            threads=threads,
            progress=progress,
        )
        theirs, faults = embed(self.faces)
        unread = skip_or_raise(faults.values(), skip_missing=skip_missing)
        good = torch.ones(len(theirs), dtype=torch.bool)
        good[list(faults)] = False
        matches = find_overlap(
            training,
            embed(training)[0],
            self.faces.select(good) if faults else self.faces,
            theirs[good],
            self.threshold,
            progress=progress,
        )
        return matches, unread


def matched_faces(faces: Faces, matches: Sequence[Match]) -> dict[int, str]:
    """The faces that have to go, by index, with the reason: they match, or their person does."""
    photos = {match.photo: match for match in matches if match.photo is not None}
    people = {match.identity: match for match in matches if match.photo is None}
    found = {}
    for index, (name, person) in enumerate(zip(faces.names, identity_names(faces), strict=True)):
        if match := photos.get(name) or people.get(person):
            found[index] = f"{person} is {match.other} there, cosine {match.similarity:.2f}"
    return found


def embed_faces(
    faces: Faces,
    encoder: Callable[[Tensor], Tensor],
    crop: str | Template,
    *,
    keep_in: Path | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> tuple[Tensor, dict[int, Fault]]:
    """Embeddings of length one, `[N, D]`, zeros for faces that fail, and these by index."""
    module = encoder if isinstance(encoder, nn.Module) else nn.Module()
    tensors = chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    faults: dict[int, Fault] = {}

    def embed(crops: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            return F.normalize(encoder(to_float(crops.to(device))).float()).cpu().numpy()

    def read(part: range) -> tuple[range, Tensor]:
        return part, faces.crops_at(part, crop, faults=faults)

    width = embed(torch.zeros(1, 3, *get_template(crop).size, dtype=torch.uint8)).shape[1]
    found = np.zeros((len(faces), width), dtype=np.float32)
    if keep_in is not None:
        # a search that was stopped goes on from what is here
        path = keep_in / f"embeddings-{faces.content[:16]}.npy"
        found = kept_array(path, found.shape, np.float32)
    batches = [range(i, min(i + BATCH, len(faces))) for i in range(0, len(faces), BATCH)]
    left = [part for part in batches if not found[part].any(axis=1).all()]
    bar = tqdm(desc="embedding", total=len(faces), unit="face", delay=2, disable=not progress)
    with bar:
        bar.update(len(faces) - sum(map(len, left)))
        for part, crops in map_ahead(read, left, threads):
            found[part] = embed(crops)
            found[[index for index in part if index in faults]] = 0
            bar.update(len(part))
    return torch.from_numpy(np.array(found)), dict(sorted(faults.items()))


def find_overlap(
    training: Faces,
    training_embeddings: Tensor,
    evaluation: Faces,
    evaluation_embeddings: Tensor,
    threshold: float = THRESHOLD,
    *,
    progress: bool = True,
) -> list[Match]:
    """Find people of the training data in the evaluation data.

    A person's mean embedding is compared with every evaluation photo and with every evaluation
    person's mean; then every photo of the people who do not match, and of nobody known (label -1),
    with every evaluation photo. Evaluation faces without labels are each a person. The best match
    of each training person and photo is given, most similar first.
    """
    both = {"training": training_embeddings, "evaluation": evaluation_embeddings}
    for name, embeddings in both.items():
        if not embeddings.isfinite().all():
            raise ValueError(f"embeddings of {name} faces are not finite: nothing would match them")
    if not len(training) or not len(evaluation):
        return []
    photos, others = F.normalize(training_embeddings), F.normalize(evaluation_embeddings)
    own, names = _labels(training), training.identities
    # faces of nobody known are each a person of their own
    labels, people = _labels(evaluation).clone(), list(evaluation.identities)
    nobody = (labels < 0).nonzero().flatten()
    labels[nobody] = len(people) + torch.arange(len(nobody))
    people += [evaluation.names[i] for i in nobody.tolist()]
    means = identity_means(photos, own, len(names))
    everyone = torch.cat([others, identity_means(others, labels, len(people))])
    who = torch.cat([labels, torch.arange(len(people))])
    matches = [
        Match(names[row], None, people[int(who[column])], similarity)
        for row, column, similarity in _best(means, everyone, threshold, progress=progress)
    ]
    found = {match.identity for match in matches}
    gone = torch.tensor([*(name in found for name in names), False])  # the last is label -1
    rows = (~gone[own]).nonzero().flatten()
    for row, column, similarity in _best(photos[rows], others, threshold, progress=progress):
        place = int(rows[row])
        identity = names[int(own[place])] if own[place] >= 0 else ""
        other = people[int(labels[column])]
        matches.append(Match(identity, training.names[place], other, similarity))
    return sorted(matches, key=lambda match: -match.similarity)


def identity_means(embeddings: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean of each person's embeddings `[N, D]`, of length one: `[K, D]`; label -1 is nobody."""
    known = labels >= 0
    sums = embeddings.new_zeros(count, embeddings.shape[1])
    return F.normalize(sums.index_add_(0, labels[known], embeddings[known]))


def identity_names(faces: Faces) -> list[str]:
    """The name of each face's identity, empty where it is not known."""
    return [faces.identities[label] if label >= 0 else "" for label in _labels(faces).tolist()]


def kept_array(path: Path, shape: tuple[int, ...], kind: DTypeLike) -> np.memmap[Any, Any]:
    """An array to fill in a file: the one that a stopped run left there, else zeros."""
    kept = None
    with suppress(OSError, ValueError):
        kept = np.lib.format.open_memmap(path, mode="r+")
    if kept is None or kept.dtype != kind or kept.shape != shape:
        needed = int(np.prod(shape)) * np.dtype(kind).itemsize + shape[0] * ROW_BYTES
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            what = f"{needed / 1e9:.1f} GB are needed for {shape[0]:,} faces, {free / 1e9:.1f} GB"
            remedy = "Make room, or name another folder to fill."
            raise DataError([Fault(str(path.parent), f"{what} are free")], remedy)
        kept = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that fills up kills who writes through a map
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return kept


def _labels(faces: Faces) -> Tensor:
    """Labels `[N]`, -1 for faces of nobody known."""
    return torch.full((len(faces),), -1) if faces.labels is None else faces.labels


def _best(
    rows: Tensor, columns: Tensor, threshold: float, *, progress: bool
) -> Iterator[tuple[int, int, float]]:
    """Row, column and cosine of each row's best column, where it exceeds the threshold."""
    step = max(1, BLOCK // len(columns))
    starts = range(0, len(rows), step)
    for start in tqdm(starts, desc="comparing", unit="block", delay=2, disable=not progress):
        best, place = (rows[start : start + step] @ columns.T).max(1)
        for row in (best > threshold).nonzero().flatten().tolist():
            yield start + row, int(place[row]), float(best[row])
