"""Who is in both the training and the evaluation data, found by embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor, nn

from idloss.data.faces import Faces, map_ahead
from idloss.data.files import Fault, skip_or_raise
from idloss.data.synthetic import SyntheticFaces
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
BLOCK = 4096
"""Rows and columns of the similarities held at once: 64 MB."""
BATCH = 64
"""Faces embedded at once."""


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
        if own is not None and get_template(own) != crop:
            raise ValueError(
                f"the encoder takes {get_template(own).name!r} crops and these are to be "
                f"{crop.name!r}: give it crop={crop.name!r}"
            )
        drawn = SyntheticFaces(1, 1, size=crop.size, crop=crop.name)
        probe = embed_faces(drawn, self.encoder, progress=False)[0, :8]
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
        """Matches, most similar first, and the evaluation photos that could not be compared.

        What is embedded is kept in the folder: a search that was stopped goes on.
        """
        faults: dict[int, Fault] = {}
        theirs = embed_faces(
            self.faces,
            self.encoder,
            crop=training.crop,
            keep_in=folder,
            faults=faults,
            threads=threads,
            progress=progress,
        )
        unread = skip_or_raise((faults[i] for i in sorted(faults)), skip_missing=skip_missing)
        others = self.faces
        if faults:
            good = torch.ones(len(others), dtype=torch.bool)
            good[list(faults)] = False
            others, theirs = others.select(good), theirs[good]
        ours = embed_faces(
            training, self.encoder, keep_in=folder, threads=threads, progress=progress
        )
        matches = find_overlap(
            training, ours, others, theirs, threshold=self.threshold, progress=progress
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
    *,
    crop: str | Template | None = None,
    keep_in: Path | None = None,
    faults: dict[int, Fault] | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Embeddings of length one, `[N, D]` on the CPU, by the device that the encoder is on.

    Photos, or crops of another template, are brought to `crop`. What is embedded is kept in a
    folder, for a run that was stopped to go on. Where `faults` are given, faces that cannot be read
    or aligned are put there, and have embeddings of nan.
    """
    device = _device(encoder)
    path = None if keep_in is None else keep_in / f"embeddings-{faces.content[:16]}.npy"
    found = None if path is None else _kept_embeddings(path, len(faces))
    batches = [range(i, min(i + BATCH, len(faces))) for i in range(0, len(faces), BATCH)]
    left = [part for part in batches if found is None or np.isnan(found[part]).any()]

    def read(part: range) -> tuple[range, Tensor, dict[int, Fault]]:
        unread: dict[int, Fault] = {}
        crops = faces.crops_at(part, crop, faults=None if faults is None else unread)
        return part, crops, unread

    total, done = len(faces), len(faces) - sum(map(len, left))
    off = not progress
    bar = tqdm(total=total, initial=done, desc="embedding", unit="face", delay=2, disable=off)
    with bar, torch.inference_mode():
        for part, crops, unread in map_ahead(read, left, threads):
            rows = F.normalize(encoder(to_float(crops.to(device))).float()).cpu().numpy()
            if found is None:
                found = _new_embeddings(path, (total, rows.shape[1]))
            rows[[index - part.start for index in unread]] = np.nan
            found[part] = rows
            if faults is not None:
                faults.update(unread)
            bar.update(len(part))
    return torch.empty(0, 0) if found is None else torch.from_numpy(np.array(found))


def find_overlap(
    training: Faces,
    training_embeddings: Tensor,
    evaluation: Faces,
    evaluation_embeddings: Tensor,
    *,
    threshold: float = THRESHOLD,
    progress: bool = True,
) -> list[Match]:
    """Find people of the training data in the evaluation data.

    A person's mean embedding is compared with every evaluation photo and with every evaluation
    person's mean; then every photo of the people who do not match, and of nobody known (label -1),
    with every evaluation photo. Evaluation faces without labels are each a person. The best match
    of each training person and photo is given, most similar first.
    """
    if training.labels is None:
        raise ValueError("the training faces have no identities to compare")
    for name, faces, embeddings in (
        ("training", training, training_embeddings),
        ("evaluation", evaluation, evaluation_embeddings),
    ):
        if len(faces) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings for {len(faces)} {name} faces")
        if not embeddings.isfinite().all():
            raise ValueError(f"embeddings of {name} faces are not finite: nothing would match them")
    if not len(training) or not len(evaluation):
        return []
    photos, others = F.normalize(training_embeddings), F.normalize(evaluation_embeddings)
    own, names = training.labels, training.identities
    labels, people = _people(evaluation)
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
    if faces.labels is None:
        return [""] * len(faces)
    return ["" if label < 0 else faces.identities[label] for label in faces.labels.tolist()]


def _kept_embeddings(path: Path, count: int) -> NDArray[np.float32] | None:
    """Embeddings that a stopped run kept, nan where it had none yet; None where there are none."""
    with suppress(OSError, ValueError):
        kept = np.lib.format.open_memmap(path, mode="r+")
        if kept.dtype == np.float32 and kept.ndim == 2 and len(kept) == count:
            return kept
    return None


def _new_embeddings(path: Path | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    """An array of nan, in a file if there is a path."""
    if path is None:
        return np.full(shape, np.nan, dtype=np.float32)
    with path.open("wb") as file:  # not through the map, where a full disk kills the process
        np.lib.format.write_array(file, np.full(shape, np.nan, dtype=np.float32))
    return np.lib.format.open_memmap(path, mode="r+")


def _device(encoder: Callable[[Tensor], Tensor]) -> torch.device:
    """Where a module's first tensor is; the CPU for a function."""
    tensors = (
        chain(encoder.parameters(), encoder.buffers()) if isinstance(encoder, nn.Module) else ()
    )
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _people(faces: Faces) -> tuple[Tensor, Sequence[str]]:
    """Labels and names of people; faces without one are each a person of their own."""
    if faces.labels is None:
        return torch.arange(len(faces)), faces.names
    nobody = (faces.labels < 0).nonzero().flatten()
    labels = faces.labels.clone()
    labels[nobody] = len(faces.identities) + torch.arange(len(nobody))
    return labels, [*faces.identities, *(faces.names[i] for i in nobody.tolist())]


def _best(
    rows: Tensor, columns: Tensor, threshold: float, *, progress: bool
) -> Iterator[tuple[int, int, float]]:
    """Row, column and cosine of each row's best column, where it exceeds the threshold."""
    starts = range(0, len(rows), BLOCK)
    for start in tqdm(starts, desc="comparing", unit="block", delay=2, disable=not progress):
        block = rows[start : start + BLOCK]
        best = torch.full((len(block),), -torch.inf)
        place = torch.zeros(len(block), dtype=torch.int64)
        for offset in range(0, len(columns), BLOCK):
            value, index = (block @ columns[offset : offset + BLOCK].T).max(1)
            better = value > best
            best = torch.where(better, value, best)
            place = torch.where(better, index + offset, place)
        for row in (best > threshold).nonzero().flatten().tolist():
            yield start + row, int(place[row]), float(best[row])
