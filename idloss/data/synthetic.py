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
from idloss.data.portrait import IDENTITY, MARKS, PHOTO, Factors, draw_portraits, place_points
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
        least = {"identities": 1, "per_identity": 1, "seed": 0, "height": 1, "width": 1}
        values = (identities, per_identity, seed, *size, first_identity)
        for (name, low), value in zip({**least, "first_identity": 0}.items(), values, strict=True):
            if value < low:
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
        found = []
        for part in torch.arange(len(self)).split(BATCH):
            face, _, normal = self._factors(part.tolist())
            found.append(place_points(face, normal)[1])
        return torch.cat(found) @ self._back[:, :2].T + self._back[:, 2]

    @cached_property
    def content(self) -> str:
        """Hash of what the faces are drawn from."""
        numbers = (self.per_identity, self.seed, self.size, self.crop, self.identities)
        return hashlib.sha256(repr(numbers).encode()).hexdigest()

    def digest(self, index: int) -> bytes:
        """SHA-256 of what a face is drawn from."""
        return hashlib.sha256(f"{self.content}/{index}".encode()).digest()

    def _copies(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        face, marks, normal = self._factors(wanted)
        image = draw_portraits(face, marks, place_points(face, normal)[0], self._grid)
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

    def _person(self, index: int) -> int:
        return int(self.identities[index // self.per_identity])

    def _photo_rng(self, index: int, stream: int) -> np.random.Generator:
        photo = index % self.per_identity
        return np.random.default_rng([self.seed, self._person(index), photo, stream])

    def _factors(self, indices: Sequence[int]) -> tuple[Factors, Tensor, Tensor]:
        """What faces are drawn from, places of their freckles, and errors of the points."""
        persons, marks, photos, normals = [], [], [], []
        for index in indices:
            rng = np.random.default_rng([self.seed, self._person(index)])
            persons.append(rng.random(len(IDENTITY)))
            marks.append(rng.random((MARKS, 2)))
            rng = self._photo_rng(index, 0)
            photos.append(rng.random(len(PHOTO)))
            normals.append(rng.standard_normal((5, 2)))
        uniform = torch.from_numpy(np.hstack([persons, photos])).float()[:, :, None, None]
        ranges = zip((IDENTITY | PHOTO).items(), uniform.unbind(1), strict=True)
        face = Factors({name: low + (high - low) * one for (name, (low, high)), one in ranges})
        return face, torch.from_numpy(np.stack(marks)).float(), torch.from_numpy(np.stack(normals))


def _geometry(size: tuple[int, int], crop: str) -> tuple[Tensor, Tensor]:
    """Pixel centres in 112x96 coordinates `[2, H, W]`, and the map `[2, 3]` back to pixels."""
    template = get_template(crop)
    ratios = (template.size[1] / size[1], template.size[0] / size[0])
    per_pixel = torch.tensor(ratios, dtype=torch.float64)
    points = torch.as_tensor(template.points, dtype=torch.float64)
    to_face = fit_similarity(points[None], "sphereface")[0]
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([x, y], -1).double()
    grid = ((pixels + 0.5) * per_pixel - 0.5) @ to_face[:, :2].T + to_face[:, 2]
    turn = torch.linalg.inv(to_face[:, :2])
    shift = -turn @ to_face[:, 2]
    to_pixels = torch.cat([turn, (shift + 0.5)[:, None]], 1) / per_pixel[:, None]
    to_pixels[:, 2] -= 0.5
    return grid.permute(2, 0, 1).float(), to_pixels
