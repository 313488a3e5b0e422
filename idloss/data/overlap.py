"""Who is in both the training and the evaluation data, found by embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor, nn

from idloss.data.faces import AlignedFaces, Faces, FileFaces
from idloss.data.packed import PackedFaces
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

Kept = TypeVar("Kept", AlignedFaces, FileFaces, PackedFaces)


@dataclass(frozen=True)
class Match:
    """A training person, or a single training photo, that is in the evaluation data.

    Attributes:
        identity: the training person.
        photo: the training photo where only that matches (often one with a wrong label), else None.
        other: the evaluation person, or photo where it has no labels.
        similarity: the cosine.
    """

    identity: str
    photo: str | None
    other: str
    similarity: float


def embed_faces(
    faces: AlignedFaces | PackedFaces,
    encoder: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Embed aligned crops, on the device that the encoder is on.

    Args:
        faces: the crops, in memory or prepared.
        encoder: RGB [0, 1] `[B, 3, H, W]` to embeddings `[B, D]`, such as a `FaceEncoder`.
        batch_size: crops a call.
        progress: show a progress bar when it takes more than two seconds.

    Returns:
        Embeddings of length one, `[N, D]`, on the CPU.
    """
    device = _device(encoder)
    bar = tqdm(total=len(faces), desc="embedding", unit="face", delay=2, disable=not progress)
    found = []
    with bar, torch.inference_mode():
        for places in torch.arange(len(faces)).split(batch_size):
            crops = to_float(faces.crops_at(places).to(device))
            found.append(F.normalize(encoder(crops).float()).cpu())
            bar.update(len(places))
    return torch.cat(found).clone()


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
    person's mean; then every photo of the people who do not match, with every evaluation photo.

    Args:
        training: the training faces, labelled.
        training_embeddings: theirs, `[N, D]`.
        evaluation: the evaluation faces; without labels every photo is a person.
        evaluation_embeddings: theirs, `[M, D]`.
        threshold: the cosine above which it is one person; depends on the FNet.
        progress: show a progress bar when it takes more than two seconds.

    Returns:
        The best match of each training person and photo, most similar first.

    Raises:
        ValueError: training faces without labels, or embeddings that are not theirs.
    """
    if training.labels is None:
        raise ValueError("the training faces have no identities to compare")
    for name, faces, embeddings in (
        ("training", training, training_embeddings),
        ("evaluation", evaluation, evaluation_embeddings),
    ):
        if len(faces) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings for {len(faces)} {name} faces")
    photos, others = F.normalize(training_embeddings), F.normalize(evaluation_embeddings)
    labels, people = _people(evaluation)
    means = identity_means(photos, training.labels, len(training.identities))
    everyone = torch.cat([others, identity_means(others, labels, len(people))])
    who = torch.cat([labels, torch.arange(len(people))])
    matches = [
        Match(training.identities[row], None, people[int(who[column])], similarity)
        for row, column, similarity in _best(means, everyone, threshold, progress=progress)
    ]
    found = {match.identity for match in matches}
    rest = torch.tensor([name not in found for name in training.identities])[training.labels]
    rows = rest.nonzero().flatten().tolist()
    for row, column, similarity in _best(photos[rest], others, threshold, progress=progress):
        identity = training.identities[int(training.labels[rows[row]])]
        other = people[int(labels[column])]
        matches.append(Match(identity, training.names[rows[row]], other, similarity))
    return sorted(matches, key=lambda match: -match.similarity)


def without_overlap(training: Kept, matches: Sequence[Match]) -> Kept:
    """Training data without the people and photos that are in the evaluation data.

    Args:
        training: the faces that were compared.
        matches: what `find_overlap` found.

    Returns:
        The others.

    Raises:
        ValueError: the faces have no identities.
    """
    if training.labels is None:
        raise ValueError("the training faces have no identities")
    people = {match.identity for match in matches if match.photo is None}
    photos = {match.photo for match in matches}
    keep = [
        training.identities[label] not in people and name not in photos
        for name, label in zip(training.names, training.labels.tolist(), strict=True)
    ]
    return training.select(torch.tensor(keep, dtype=torch.bool))


def identity_means(embeddings: Tensor, labels: Tensor, count: int) -> Tensor:
    """Mean embedding of each person, of length one.

    Args:
        embeddings: of length one, `[N, D]`.
        labels: int64 `[N]` in 0 ... count-1; -1 for faces of nobody.
        count: number of people K.

    Returns:
        `[K, D]`.
    """
    known = labels >= 0
    sums = embeddings.new_zeros(count, embeddings.shape[1])
    return F.normalize(sums.index_add_(0, labels[known], embeddings[known]))


def _device(encoder: Callable[[Tensor], Tensor]) -> torch.device:
    """Where a module's first tensor is; the CPU for a function."""
    tensors = (
        chain(encoder.parameters(), encoder.buffers()) if isinstance(encoder, nn.Module) else ()
    )
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _people(faces: Faces) -> tuple[Tensor, Sequence[str]]:
    if faces.labels is None:
        return torch.arange(len(faces)), faces.names
    # faces of nobody known (label -1) are each a person of their own
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
