"""Keeping the people of an evaluation set out of prepared training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from idloss.data.faces import Faces, align_all
from idloss.data.overlap import THRESHOLD, Match, embed_faces, find_overlap
from idloss.data.packed import PackedFaces
from idloss.data.packing import Dropped, read_rows, write_rows
from idloss.data.photos import Photos

COLUMNS = ("identity", "photo", "other", "cosine")


@dataclass(frozen=True, eq=False)
class Exclusion:
    """Evaluation faces whose people must not be in the training data.

    Attributes:
        name: the evaluation set's name, for reports.
        faces: its faces, labelled by person or not.
        encoder: RGB [0, 1] crops `[B, 3, H, W]` of the prepared template to embeddings `[B, D]`,
            such as a `FaceEncoder` with that `crop`.
        fnet: the recogniser's name, for reports.
        threshold: the cosine above which two faces are one person; depends on the FNet.
    """

    name: str
    faces: Faces
    encoder: Callable[[Tensor], Tensor]
    fnet: str
    threshold: float = THRESHOLD

    def describe(self) -> dict[str, object]:
        """What tells this exclusion from others."""
        of_faces = Photos.of(self.faces).describe()
        return {
            "overlap": self.name,
            "overlap_names": of_faces["names"],
            "overlap_landmarks": of_faces["landmarks"],
            "overlap_fnet": self.fnet,
            "overlap_threshold": self.threshold,
        }

    def find(
        self, faces: PackedFaces, *, skip_missing: bool, threads: int | None, progress: bool
    ) -> list[Match]:
        """Find the people and photos of the training data that are in the evaluation set.

        Args:
            faces: the training data, labelled.
            skip_missing: leave out evaluation photos that cannot be read or aligned.
            threads: decoding threads; None for one a core, eight at most.
            progress: show progress bars.

        Returns:
            The matches, most similar first.

        Raises:
            DataError: evaluation photos cannot be read or aligned; names each.
        """
        others = align_all(
            self.faces,
            faces.crop,
            skip_missing=skip_missing,
            threads=threads,
            progress=progress,
        )
        ours = embed_faces(faces, self.encoder, progress=progress)
        theirs = embed_faces(others, self.encoder, progress=progress)
        return find_overlap(
            faces, ours, others, theirs, threshold=self.threshold, progress=progress
        )

    def drop(self, faces: PackedFaces, matches: Sequence[Match]) -> list[Dropped]:
        """The photos that have to go, and why.

        Args:
            faces: the training data.
            matches: what `find` found in it.

        Returns:
            Every photo that matches or whose person does.
        """
        photos = {match.photo: match for match in matches if match.photo is not None}
        people = {match.identity: match for match in matches if match.photo is None}
        dropped = []
        for name, person in zip(faces.names, faces.index.people, strict=True):
            match = photos.get(name) or people.get(person)
            if match:
                detail = f"{person} is {match.other} there, cosine {match.similarity:.2f}"
                dropped.append(Dropped(name, f"also in {self.name}", detail))
        return dropped


def write_matches(path: Path, matches: Sequence[Match]) -> None:
    """Write matches as CSV, whole or not at all; no photo means the whole person."""
    rows = ((m.identity, m.photo or "", m.other, m.similarity) for m in matches)
    write_rows(path, COLUMNS, rows)


def read_matches(path: Path) -> tuple[Match, ...]:
    """Read what `write_matches` wrote."""
    rows = read_rows(path, COLUMNS)
    return tuple(
        Match(person, photo or None, other, float(cosine)) for person, photo, other, cosine in rows
    )
