"""The one protocol of all face data sets, and the one that reads files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from idloss.data.faults import Fault
from idloss.data.files import Files
from idloss.data.images import decode_image


class FaceSource(Protocol):
    """Faces by index, in memory or on disk.

    Attributes:
        names: one name an image, unique.
        labels: identities as int64 `[N]` in 0 ... K-1, -1 for a face of nobody known (a
            distractor); None where no identity is known.
        identities: the K names of the identities.
        landmarks: five points an image, float64 `[N, 5, 2]`, (x, y) in pixels: left eye (image
            left), right eye, nose, left and right mouth corner; None where they are not known.
        template: the crop template of faces that are aligned already, None for photos.
        skipped: what was left out, and why.
    """

    @property
    def names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def labels(self) -> Tensor | None: ...  # noqa: D102
    @property
    def identities(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def landmarks(self) -> Tensor | None: ...  # noqa: D102
    @property
    def template(self) -> str | None: ...  # noqa: D102
    @property
    def skipped(self) -> tuple[Fault, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """One image, uint8 RGB `[3, H, W]`."""


@dataclass(frozen=True, eq=False)
class FileFaces:
    """Faces in files; see `FaceSource` for what the attributes mean.

    Attributes:
        files: where the images are.
        members: the file of each image in `files`.
        names: the name of each image.
        labels: identities or None.
        identities: names of the identities.
        landmarks: five points an image or None.
        template: the template the faces are aligned to, if they are.
        skipped: what was left out.
    """

    files: Files
    members: tuple[str, ...]
    names: tuple[str, ...]
    labels: Tensor | None = None
    identities: tuple[str, ...] = ()
    landmarks: Tensor | None = None
    template: str | None = None
    skipped: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.members)

    def read(self, index: int) -> Tensor:
        """One image, uint8 RGB `[3, H, W]`.

        Args:
            index: its position.

        Returns:
            The decoded pixels.

        Raises:
            DataError: the file is missing or damaged; names it.
        """
        member = self.members[index]
        return decode_image(self.files.read(member), self.files.where(member))

    def select(self, keep: Tensor) -> FileFaces:
        """The faces at some positions; identities that lose all their faces go.

        Args:
            keep: int64 positions, or a bool mask `[N]`.

        Returns:
            A smaller source over the same files.
        """
        kept = positions(keep)
        labels, identities = select_labels(self.labels, self.identities, kept)
        return replace(
            self,
            members=tuple(self.members[i] for i in kept.tolist()),
            names=tuple(self.names[i] for i in kept.tolist()),
            labels=labels,
            identities=identities,
            landmarks=None if self.landmarks is None else self.landmarks[kept],
        )


def positions(keep: Tensor) -> Tensor:
    """A bool mask or positions, as positions.

    Args:
        keep: bool `[N]`, or integers.

    Returns:
        int64 positions.
    """
    return keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long()


def number_identities(per_image: Iterable[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Number identities by sorted name, numerically where all names are numbers.

    Args:
        per_image: the name of the identity of each image, None where it is not known.

    Returns:
        int64 labels `[N]` in 0 ... K-1 or -1, and the K names.
    """
    identities = list(per_image)
    known = {name for name in identities if name is not None}
    numeric = all(name.isdecimal() for name in known)
    names = sorted(known, key=lambda name: (int(name) if numeric else 0, name))
    number: dict[str | None, int] = {name: label for label, name in enumerate(names)}
    labels = torch.tensor([number.get(name, -1) for name in identities], dtype=torch.int64)
    return labels, tuple(names)


def select_labels(
    labels: Tensor | None, identities: Sequence[str], kept: Tensor
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels of some images, numbered anew without gaps.

    Args:
        labels: int64 `[N]` or None.
        identities: names by label.
        kept: int64 positions.

    Returns:
        Labels `[len(kept)]` or None, and the names that are left.
    """
    if labels is None:
        return None, ()
    labels = labels[kept]
    present, renumbered = labels[labels >= 0].unique(return_inverse=True)
    selected = torch.full_like(labels, -1)
    selected[labels >= 0] = renumbered
    return selected, tuple(identities[i] for i in present.tolist())
