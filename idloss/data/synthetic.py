"""Faces that the package draws itself: labelled, reproducible, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss.data.faces import AlignedCrops, AlignedFaces, map_ahead, positions, select_labels
from idloss.data.files import Fault
from idloss.data.portrait import IDENTITY, PHOTO, Factors, draw_portraits, place_points
from idloss.geometry import fit_similarity, get_template
from idloss.resample import to_uint8

BATCH = 32
"""Faces drawn at once: the work of a batch stays in the processor's caches."""


class SyntheticFaces(AlignedCrops):
    """Procedural faces: persons that differ, photos of one person that vary; a `Faces`.

    Photo number j of person number i depends on (seed, i, j) alone, so sets of any size share their
    beginnings, and any face can be drawn again by itself. Sets with other seeds, or with other
    ranges of persons, have no person in common.

    Args:
        identities: Number of persons K.
        per_identity: Photos of each.
        seed: Not negative.
        size: Rows and columns of the pictures, the whole crop whatever its size.
        crop: Name of the crops' template.
        first_identity: Number of the first person.

    Raises:
        ValueError: A number is out of range, or the template is unknown.
    """

    def __init__(
        self,
        identities: int,
        per_identity: int,
        seed: int = 0,
        size: tuple[int, int] = (112, 96),
        crop: str = "sphereface",
        first_identity: int = 0,
    ) -> None:
        sizes = {"identities": identities, "per_identity": per_identity}
        sizes |= {"height": size[0], "width": size[1]}
        for name, value in (sizes | {"seed": seed, "first_identity": first_identity}).items():
            if value < (low := int(name in sizes)):
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.per_identity = per_identity
        self.seed = seed
        self.size = size
        self.crop = get_template(crop).name
        persons = range(first_identity, first_identity + identities)
        self.identities = tuple(map(str, persons))
        self.names = tuple(f"{who}/{photo}" for who in persons for photo in range(per_identity))
        self.labels = torch.arange(identities).repeat_interleave(per_identity)
        self.skipped: tuple[Fault, ...] = ()
        self._grid, self._back = _geometry(self.size, self.crop)

    @property
    def landmarks(self) -> Tensor:
        """Five points of every picture as a detector would report them, float64 `[N, 5, 2]`."""
        batches = torch.arange(len(self)).split(BATCH)
        found = [place_points(*self._factors(batch.tolist()))[1] for batch in batches]
        return torch.cat(found) @ self._back[:, :2].T + self._back[:, 2]

    @cached_property
    def content(self) -> str:
        """Hash of what the faces are drawn from."""
        numbers = (self.per_identity, self.seed, self.size, self.crop, self.identities)
        return hashlib.sha256(repr((IDENTITY, PHOTO, numbers)).encode()).hexdigest()

    def digest(self, index: int) -> bytes:
        """SHA-256 of what a face is drawn from."""
        return hashlib.sha256(f"{self.content}/{index}".encode()).digest()

    def _copies(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        face, jitter = self._factors(wanted)
        image = draw_portraits(face, place_points(face, jitter)[0], self._grid)
        # uniform noise of the deviation asked for: bytes are the cheapest random numbers there are
        shape = image[0].shape
        grain = np.stack([self._photo_rng(i, 1).integers(0, 256, shape, "uint8") for i in wanted])
        image += (torch.from_numpy(grain).float() / 255 - 0.5) * (face.noise[:, None] * 12**0.5)
        return to_uint8(image)

    def select(self, keep: Tensor) -> AlignedFaces:
        """Some of the faces, drawn into memory."""
        return self.render(keep, progress=False)

    def render(
        self, keep: Tensor | None = None, *, threads: int | None = None, progress: bool = True
    ) -> AlignedFaces:
        """Draw faces into memory.

        Args:
            keep: Positions or mask of those wanted; None for all.
            threads: Drawing threads; None for one a core, eight at most.
            progress: Show a progress bar when it takes more than two seconds.

        Returns:
            The crops with labels and names.
        """
        kept = torch.arange(len(self)) if keep is None else positions(keep)
        crops = torch.empty(len(kept), 3, *self.size, dtype=torch.uint8)
        starts = range(0, len(kept), BATCH)
        drawn = map_ahead(lambda at: self.crops_at(kept[at : at + BATCH]), starts, threads)
        for at in tqdm(starts, "drawing", unit="batch", delay=2, disable=not progress):
            crops[at : at + BATCH] = next(drawn)
        names = tuple(self.names[i] for i in kept.tolist())
        labels, identities = select_labels(self.labels, self.identities, kept)
        return AlignedFaces(crops, names, labels, identities, self.crop)

    def _photo_rng(self, index: int, stream: int) -> np.random.Generator:
        person, photo = self.identities[index // self.per_identity], index % self.per_identity
        return np.random.default_rng([self.seed, int(person), photo, stream])

    def _factors(self, indices: Sequence[int]) -> tuple[Factors, Tensor]:
        """What faces are drawn from, and errors of their points."""
        uniform, jitter = [], []
        for index in indices:
            person = int(self.identities[index // self.per_identity])
            kept = np.random.default_rng([self.seed, person]).random(len(IDENTITY))
            rng = self._photo_rng(index, 0)
            uniform.append(np.concatenate([kept, rng.random(len(PHOTO))]))
            jitter.append(rng.standard_normal((5, 2)))
        values = torch.from_numpy(np.stack(uniform)).float()[:, :, None, None].unbind(1)
        ranges = zip((IDENTITY | PHOTO).items(), values, strict=True)
        face = Factors({name: low + (high - low) * one for (name, (low, high)), one in ranges})
        return face, torch.from_numpy(np.stack(jitter))


def _geometry(size: tuple[int, int], crop: str) -> tuple[Tensor, Tensor]:
    """Pixel centres in 112x96 coordinates `[2, H, W]`, and the map `[2, 3]` back to pixels."""
    template = get_template(crop)
    y, x = template.size[0] / size[0], template.size[1] / size[1]
    to_crop = torch.tensor([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]]).double()
    points = torch.as_tensor(template.points, dtype=torch.float64)
    matrix = fit_similarity(points[None], "sphereface")[0] @ to_crop
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)]).double()
    turn = torch.linalg.inv(matrix[:, :2])
    back = torch.cat([turn, -turn @ matrix[:, 2:]], 1)
    return torch.einsum("ij,jhw->ihw", matrix, pixels).float(), back
