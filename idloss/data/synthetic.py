"""Faces that the package draws itself: labelled, reproducible, no download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor

from idloss.data.faces import AlignedFaces, convert_crops, map_ahead
from idloss.data.files import Fault
from idloss.data.portrait import IDENTITY, MARKS, PHOTO, Factors, draw_portraits, place_points
from idloss.geometry import Template, fit_similarity, get_template
from idloss.resample import to_uint8

BATCH = 32
"""Faces drawn at once: the work of a batch stays in the processor's caches."""


class SyntheticFaces:
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
        for name, value, least in (
            ("identities", identities, 1),
            ("per_identity", per_identity, 1),
            ("seed", seed, 0),
            ("height", size[0], 1),
            ("width", size[1], 1),
            ("first_identity", first_identity, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.per_identity = per_identity
        self.seed = seed
        self.size = size
        self.crop = get_template(crop).name
        persons = range(first_identity, first_identity + identities)
        self.identities = tuple(str(person) for person in persons)
        self.names = tuple(
            f"{person}/{photo}" for person in persons for photo in range(per_identity)
        )
        self.labels = torch.arange(identities).repeat_interleave(per_identity)
        self.skipped: tuple[Fault, ...] = ()
        self._grid, self._back = _geometry(self.size, self.crop)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def landmarks(self) -> Tensor:
        """Five points of every picture as a detector would report them, float64 `[N, 5, 2]`."""
        found = []
        for part in torch.arange(len(self)).split(BATCH):
            person, photo, _, normal = self._values(part.tolist())
            found.append(place_points(person, photo, normal)[1])
        return torch.cat(found) @ self._back[:, :2].T + self._back[:, 2]

    @cached_property
    def content(self) -> str:
        """Hash of what the faces are drawn from."""
        numbers = (self.per_identity, self.seed, self.size, self.crop, self.identities)
        return hashlib.sha256(repr(numbers).encode()).hexdigest()

    def digest(self, index: int) -> bytes:
        """SHA-256 of what a face is drawn from."""
        return hashlib.sha256(f"{self.content}/{index}".encode()).digest()

    def read(self, index: int) -> Tensor:
        """One picture, uint8 RGB `[3, H, W]`."""
        return self.crops_at([index])[0]

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Draw some of the faces, `[B, 3, H, W]`; without `crop` in the size they have."""
        wanted = torch.as_tensor(indices).tolist()
        person, photo, marks, normal = self._values(wanted)
        matrix, _ = place_points(person, photo, normal)
        image = draw_portraits(person, photo, marks, matrix, self._grid)
        # uniform noise of the deviation asked for: bytes are the cheapest random numbers there are
        shape = image[0].shape
        grain = np.stack([self._photo_rng(i, 1).integers(0, 256, shape, "uint8") for i in wanted])
        scale = photo["noise"][:, None] * 12**0.5
        image += (torch.from_numpy(grain).float() / 255 - 0.5) * scale
        crops = to_uint8(image)
        return crops if crop is None else convert_crops(crops, self.crop, crop)

    def select(self, keep: Tensor) -> AlignedFaces:
        """Some of the faces, drawn into memory."""
        return self.render(progress=False).select(keep)

    def render(self, *, threads: int | None = None, progress: bool = True) -> AlignedFaces:
        """Draw all faces.

        Args:
            threads: Drawing threads; None for one a core, eight at most.
            progress: Show a progress bar when it takes more than two seconds.

        Returns:
            The crops with labels and names.
        """
        crops = torch.empty(len(self), 3, *self.size, dtype=torch.uint8)

        def draw(indices: Tensor) -> int:
            crops[indices] = self.crops_at(indices)
            return len(indices)

        done = map_ahead(draw, torch.arange(len(self)).split(BATCH), threads)
        with tqdm(
            total=len(self), desc="drawing", unit="face", delay=2, disable=not progress
        ) as bar:
            for count in done:
                bar.update(count)
        return AlignedFaces(crops, self.names, self.labels, self.identities, self.crop)

    def _photo_rng(self, index: int, stream: int) -> np.random.Generator:
        person = int(self.identities[index // self.per_identity])
        return np.random.default_rng([self.seed, person, index % self.per_identity, stream])

    def _values(self, indices: Sequence[int]) -> tuple[Factors, Factors, Tensor, Tensor]:
        """Persons, photos, places of freckles, and errors of the points."""
        persons, marks, photos, normals = [], [], [], []
        for index in indices:
            number = int(self.identities[index // self.per_identity])
            rng = np.random.default_rng([self.seed, number])
            persons.append(rng.random(len(IDENTITY)))
            marks.append(rng.random((MARKS, 2)))
            rng = self._photo_rng(index, 0)
            photos.append(rng.random(len(PHOTO)))
            normals.append(rng.standard_normal((5, 2)))
        return (
            _scaled(IDENTITY, np.stack(persons)),
            _scaled(PHOTO, np.stack(photos)),
            torch.from_numpy(np.stack(marks)).float(),
            torch.from_numpy(np.stack(normals)),
        )


def _scaled(ranges: Mapping[str, tuple[float, float]], uniform: NDArray[np.float64]) -> Factors:
    columns = torch.from_numpy(uniform).float()[:, :, None, None].unbind(1)
    return {
        name: low + (high - low) * column
        for (name, (low, high)), column in zip(ranges.items(), columns, strict=True)
    }


def _geometry(size: tuple[int, int], crop: str) -> tuple[Tensor, Tensor]:
    """Pixel centres in 112x96 coordinates `[2, H, W]`, and the map `[2, 3]` back to pixels."""
    template = get_template(crop)
    per_pixel = torch.tensor(
        [template.size[1] / size[1], template.size[0] / size[0]], dtype=torch.float64
    )
    points = torch.as_tensor(template.points, dtype=torch.float64)
    to_face = fit_similarity(points[None], "sphereface")[0]
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    pixels = torch.stack([x, y], -1).double()
    in_crop = (pixels + 0.5) * per_pixel - 0.5
    grid = in_crop @ to_face[:, :2].T + to_face[:, 2]
    turn = torch.linalg.inv(to_face[:, :2])
    shift = -turn @ to_face[:, 2]
    to_pixels = torch.cat([turn, (shift + 0.5)[:, None]], 1) / per_pixel[:, None]
    to_pixels[:, 2] -= 0.5
    return grid.permute(2, 0, 1).float(), to_pixels
