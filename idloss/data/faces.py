"""Faces by index: the protocol of all that holds them, faces in files, and crops in memory."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from idloss.data.files import DataError, Fault, Files, skip_or_raise
from idloss.geometry import Template, convert_crop, fit_similarity, get_template, warp
from idloss.resample import resize, to_float, to_uint8

BICUBIC_REACH = 2
"""Pixels beyond a sampling point that a bicubic kernel reads."""
BATCH_PIXELS = 1 << 20
"""Source pixels warped at once: 12 MB of float RGB, so that a batch stays near the caches."""
BATCH_IMAGES = 64
"""Faces warped at once: enough to hide the overhead of a call, few enough to share out."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""What pictures may be; Pillow knows more, some of which start other programs (EPS)."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp"),
    *(".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"),
)
MOST_PIXELS = 50_000_000
"""Of one picture: 20 bytes each are held while it is decoded, 25 of a WebP."""
MANY_PIXELS = 8_000_000
"""Pictures with more are decoded one at a time."""
ORIENTATION = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation."""
_one_large_picture = threading.Lock()
Item = TypeVar("Item")
Value = TypeVar("Value")


class Faces(Protocol):
    """Faces by index, in memory or on disk.

    Attributes:
        names: One name a face, unique.
        labels: Identities as int64 `[N]` in 0 ... K-1, -1 for a face of nobody known (a
            distractor); None where no identity is known.
        identities: The K names of the identities.
        landmarks: Five points a face, float64 `[N, 5, 2]`, (x, y) in pixels: left eye (image
            left), right eye, nose, left and right mouth corner; None where they are not known.
        crop: Name of the template of faces that are aligned already, None for photos.
        skipped: What was left out, and why.
        content: Hash of what they hold, hex digits.
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
    def crop(self) -> str | None: ...  # noqa: D102
    @property
    def skipped(self) -> tuple[Fault, ...]: ...  # noqa: D102
    @property
    def content(self) -> str: ...  # noqa: D102

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """One picture as it is kept, uint8 RGB `[3, H, W]`."""

    def digest(self, index: int) -> bytes:
        """SHA-256 of a face as it is kept: its file or pixels, its landmarks, its crop."""

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Some faces as aligned crops.

        Args:
            indices: Which, `B` of them.
            crop: Template wanted; None for the faces' own.
            faults: Where to put, by index, faces that cannot be read or aligned; their crops are
                zero then. None raises for them.

        Returns:
            uint8 RGB `[B, 3, H, W]`.

        Raises:
            DataError: Faces cannot be read or aligned, and there is no `faults`; names them.
        """

    def select(self, keep: Tensor) -> Faces:
        """The faces at int64 positions or under a bool mask; empty identities go."""


@dataclass(frozen=True, eq=False)
class FileFaces:
    """Faces in files; a `Faces`, whose other attributes are told there.

    Attributes:
        files: Where the pictures are.
        members: The file of each face in `files`.
    """

    files: Files
    members: tuple[str, ...]
    names: tuple[str, ...]
    labels: Tensor | None = None
    identities: tuple[str, ...] = ()
    landmarks: Tensor | None = None
    crop: str | None = None
    skipped: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def content(self) -> str:
        """Hash of all files with their names and landmarks; reads every file once."""
        total = hashlib.sha256(repr((self.crop, self.names)).encode())
        for index in tqdm(range(len(self)), desc="hashing", unit="face", delay=2):
            try:
                total.update(self.digest(index))
            except DataError:  # noqa: PERF203 -- each file may be missing
                total.update(b"unreadable")
        return total.hexdigest()

    def read(self, index: int) -> Tensor:
        """One picture, uint8 RGB `[3, H, W]`."""
        member = self.members[index]
        return decode_image(self.files.read(member), self.files.where(member))

    def digest(self, index: int) -> bytes:
        """SHA-256 of a face's file, landmarks and crop."""
        return _digest(self, index, self.files.read(self.members[index]))

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Some faces as crops `[B, 3, H, W]`; see `Faces.crops_at`."""
        wanted = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        template = crop or self.crop
        if template is None:
            raise ValueError("photos have no crop of their own: name the template, sphereface, say")
        found: dict[int, Fault] = {}
        crops = _read_crops(self, wanted, get_template(template), found)
        if found and faults is None:
            raise DataError(found.values())
        if faults is not None:
            faults.update(found)
        return crops

    def select(self, keep: Tensor) -> FileFaces:
        """A smaller set over the same files."""
        kept = positions(keep)
        members = tuple(self.members[i] for i in kept.tolist())
        points = None if self.landmarks is None else self.landmarks[kept]
        return replace(self, members=members, landmarks=points, **selected(self, kept))


class AlignedCrops:
    """What sets of crops of one template have in common; map-style sets of (crop, label) pairs."""

    crop: str
    names: tuple[str, ...]
    labels: Tensor | None

    @property
    def landmarks(self) -> Tensor:
        """The template's points for each crop, float64 `[N, 5, 2]`."""
        points = torch.as_tensor(get_template(self.crop).points, dtype=torch.float64)
        return points.expand(len(self), 5, 2)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(index), -1 if self.labels is None else int(self.labels[index])

    def read(self, index: int) -> Tensor:
        """One crop, uint8 RGB `[3, H, W]`."""
        return self.crops_at([index])[0]

    def crops_at(
        self,
        indices: Sequence[int] | Tensor,
        crop: str | Template | None = None,
        *,
        faults: dict[int, Fault] | None = None,
    ) -> Tensor:
        """Copies of some crops `[B, 3, H, W]`; without `crop` in the size they have."""
        crops = self._copies(positions(torch.as_tensor(indices)))
        return crops if crop is None else convert_crops(crops, self.crop, crop)

    def _copies(self, indices: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AlignedFaces(AlignedCrops):
    """Aligned crops in memory; a `Faces`, whose other attributes are told there.

    Attributes:
        crops: uint8 RGB `[N, 3, H, W]`.
    """

    crops: Tensor
    names: tuple[str, ...]
    labels: Tensor | None
    identities: tuple[str, ...]
    crop: str
    skipped: tuple[Fault, ...] = ()

    @cached_property
    def content(self) -> str:
        """Hash of the crops, their names and their template."""
        total = hashlib.sha256(repr((self.crop, self.names)).encode())
        total.update(self.crops.contiguous().numpy().data)
        return total.hexdigest()

    def digest(self, index: int) -> bytes:
        """SHA-256 of a face's pixels, landmarks and crop."""
        return _digest(self, index, self.crops[index].numpy().tobytes())

    def _copies(self, indices: Tensor) -> Tensor:
        # whole crops at a time: ten times as fast as self.crops[indices] on bytes
        return self.crops.index_select(0, indices)

    def select(self, keep: Tensor) -> AlignedFaces:
        """A copy of some of the crops."""
        kept = positions(keep)
        return replace(self, crops=self.crops[kept], **selected(self, kept))


def align_all(
    faces: Faces,
    crop: str | Template = "sphereface",
    *,
    skip_missing: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> AlignedFaces:
    """Align all faces in memory, 32 kB a face at 112x96.

    Args:
        faces: Photos with landmarks, or crops of another template.
        crop: Template wanted.
        skip_missing: Leave out photos that cannot be read or aligned.
        threads: Decoding threads; None for one a core, eight at most.
        progress: Show a progress bar when it takes more than two seconds.

    Returns:
        The crops, in the order of the faces.

    Raises:
        DataError: Photos cannot be read or aligned; names each.
    """
    target = get_template(crop)
    crops = torch.empty(len(faces), 3, *target.size, dtype=torch.uint8)
    faults: dict[int, Fault] = {}

    def work(indices: list[int]) -> int:
        crops[indices] = faces.crops_at(indices, target, faults=faults)
        return len(indices)

    batches = like_sized_batches(faces, 0, len(faces))
    with tqdm(desc="aligning", total=len(faces), unit="face", delay=2, disable=not progress) as bar:
        for done in map_ahead(work, batches, threads):
            bar.update(done)
    skipped = skip_or_raise((faults[i] for i in sorted(faults)), skip_missing=skip_missing)
    names, people = tuple(faces.names), tuple(faces.identities)
    every = (*faces.skipped, *skipped)
    aligned = AlignedFaces(crops, names, faces.labels, people, target.name, every)
    good = torch.ones(len(faces), dtype=torch.bool)
    good[list(faults)] = False
    return aligned.select(good) if skipped else aligned


def map_ahead(
    work: Callable[[Item], Value], items: Iterable[Item], threads: int | None
) -> Iterator[Value]:
    """What `work` gives for each item, in order, computed by threads a few items ahead."""
    workers = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        begun = deque[Any]()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > 2 * workers:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def convert_crops(crops: Tensor, own: str | Template, wanted: str | Template) -> Tensor:
    """Crops of any size `[B, 3, H, W]`, uint8, in the size of another template, or of their own."""
    old, new = get_template(own), get_template(wanted)
    size = (crops.shape[-2], crops.shape[-1])
    # rounding may change an aspect by a pixel; more is a picture of something else
    if abs(size[0] * old.size[1] / old.size[0] - size[1]) > 1.5:
        raise ValueError(
            f"a {old.name} crop is {old.size[0]}x{old.size[1]} or of the same aspect, "
            f"got {size[0]}x{size[1]}"
        )
    shrinks = size[0] > old.size[0] or size[1] > old.size[1]
    crops = resize(crops, old.size, convention="antialias" if shrinks else "cv2")
    if old == new:
        return crops
    crops = to_uint8(convert_crop(to_float(crops), old, new))
    return resize(crops, new.size)


def _read_crops(
    faces: Faces, indices: list[int], template: Template, faults: dict[int, Fault]
) -> Tensor:
    """Crops, with those that fail by themselves as zeros."""
    try:
        if faces.crop is None:
            return _align(faces, indices, template)
        return torch.cat(
            [convert_crops(faces.read(i)[None], faces.crop, template) for i in indices]
        )
    except ValueError as error:
        if len(indices) > 1:
            return torch.cat([_read_crops(faces, [i], template, faults) for i in indices])
        name = faces.names[indices[0]]
        found = error.faults[0] if isinstance(error, DataError) else Fault(name, str(error))
        faults[indices[0]] = found
        return torch.zeros(1, 3, *template.size, dtype=torch.uint8)


def _align(faces: Faces, indices: Sequence[int], template: Template) -> Tensor:
    """Align a few photos in one warp.

    Only the part of a photo that the crop sees is kept; what lies outside the photo is black, as
    in the released code.
    """
    if faces.landmarks is None:
        raise DataError([Fault(faces.names[indices[0]], "there are no landmarks to align it by")])
    names = [faces.names[i] for i in indices]
    matrices = fit_similarity(faces.landmarks[list(indices)], template, names=names).double()
    windows = []
    for index, box, name in zip(indices, _boxes(matrices, template), names, strict=True):
        image = faces.read(index)
        height, width = image.shape[1:]
        left, top, right, bottom = box
        if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
            raise DataError([Fault(name, f"the landmarks lie outside the {width}x{height} photo")])
        left, top = max(left, 0), max(top, 0)
        # a copy, so that no more than one whole photo is held
        windows.append((image[:, top:bottom, left:right].clone(), left, top))
    tallest = max(window.shape[1] for window, _, _ in windows)
    widest = max(window.shape[2] for window, _, _ in windows)
    batch = torch.zeros(len(windows), 3, tallest, widest)
    for slot, (window, _, _) in zip(batch, windows, strict=True):
        slot[:, : window.shape[1], : window.shape[2]] = to_float(window)
    # moving a photo's origin to (left, top) adds A @ (left, top) to the shift
    origin = torch.tensor([[left, top] for _, left, top in windows], dtype=torch.float64)
    shift = matrices[:, :, 2:] + matrices[:, :, :2] @ origin[:, :, None]
    moved = torch.cat([matrices[:, :, :2], shift], dim=2)
    return to_uint8(warp(batch, moved, template.size))


def _boxes(matrices: Tensor, template: Template) -> list[list[int]]:
    """What a crop sees of its photo, in whole pixels: left, top, right, bottom (exclusive)."""
    height, width = template.size
    corners = torch.tensor([(x, y) for x in (0, width - 1) for y in (0, height - 1)]).to(matrices)
    linear, shift = matrices[:, :, :2], matrices[:, :, 2]
    seen = torch.linalg.solve(linear[:, None], (corners[None] - shift[:, None])[..., None])[..., 0]
    low = seen.amin(1).floor() - BICUBIC_REACH
    high = seen.amax(1).ceil() + BICUBIC_REACH + 1
    # far outside any photo is all the same, and fits an int
    boxes: list[list[int]] = torch.cat([low, high], 1).clamp(-1e9, 1e9).long().tolist()
    return boxes


def like_sized_batches(faces: Faces, start: int, stop: int) -> Iterator[list[int]]:
    """Faces `start` to `stop` in batches of a like size, so that little of one is padding."""
    landmarks = faces.landmarks
    if faces.crop is not None or landmarks is None:
        yield from (part.tolist() for part in torch.arange(start, stop).split(BATCH_IMAGES))
        return
    points = landmarks[start:stop]
    spread = points.amax(1) - points.amin(1)
    # a crop is about 3.2 times as wide and high as the spread of its five points
    sides = (3.2 * spread.amax(1)).nan_to_num(0.0).clamp(1, 1e4)
    batch: list[int] = []
    for place in sides.argsort().tolist():
        pixels = (len(batch) + 1) * float(sides[place]) ** 2
        if batch and (len(batch) == BATCH_IMAGES or pixels > BATCH_PIXELS):
            yield batch
            batch = []
        batch.append(start + place)
    if batch:
        yield batch


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode a picture to RGB, uint8 `[3, H, W]`, upright after its EXIF as `cv2.imread` does."""
    # Pillow, OpenCV and torchvision carry the same libjpeg-turbo and agree to the last bit; Pillow
    # refuses a file cut short, where OpenCV paints the rest grey
    opened = _open_image(data, name)
    many = opened.width * opened.height > MANY_PIXELS
    # I, I;16 and F hold more than 8 bits, which Pillow clips rather than scales
    if opened.mode[0] in "IF":
        raise DataError([Fault(name, f"expected 8 bits a channel, got mode {opened.mode!r}")])
    try:
        with opened, _one_large_picture if many else nullcontext():
            transpose = TRANSPOSES.get(_orientation(opened))
            image = opened if transpose is None else opened.transpose(transpose)
            array = np.array(image if image.mode == "RGB" else image.convert("RGB"))
            return torch.from_numpy(array).permute(2, 0, 1).contiguous()
    # what a damaged file makes Pillow's plug-ins raise is not told: struct.error, KeyError, ...
    except Exception as error:
        raise _unreadable(name, f"{type(error).__name__}: {error}") from error


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Rows and columns of a picture once it is upright, from its header."""
    with _open_image(data, name) as opened:
        size = (opened.height, opened.width)
        return size[::-1] if _orientation(opened) >= 5 else size


def _open_image(data: bytes, name: str) -> Image.Image:
    """A picture of which no more than the header is read."""
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # whose message holds an address
        raise _unreadable(name, f"none of {', '.join(FORMATS)}") from error
    except Exception as error:
        raise _unreadable(name, f"{type(error).__name__}: {error}") from error
    if opened.width * opened.height > MOST_PIXELS:
        what = f"{opened.width}x{opened.height} pixels, more than {MOST_PIXELS:,}: make it smaller"
        raise DataError([Fault(name, what)])
    return opened


def _unreadable(name: str, why: str) -> DataError:
    return DataError([Fault(name, f"unreadable image ({why})")])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where it or the EXIF cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def is_picture(name: str) -> bool:
    """Whether a file is called as pictures are, in letters of any case."""
    return name.lower().endswith(SUFFIXES)


def positions(keep: Tensor) -> Tensor:
    """A bool mask or positions, as int64 positions."""
    return keep.nonzero().flatten() if keep.dtype == torch.bool else keep.long()


def number_identities(per_face: Iterable[str | None]) -> tuple[Tensor, tuple[str, ...]]:
    """Number identities by sorted name, numerically where all are numbers; None is -1."""
    identities = list(per_face)
    known = {name for name in identities if name is not None}
    numeric = all(name.isdecimal() for name in known)
    told: dict[object, str] = {}
    for name in sorted(known):
        is_number = name.replace(".", "", 1).isdecimal()
        key = Decimal(name) if is_number else unicodedata.normalize("NFC", name)
        other = told.setdefault(key, name)
        if other != name:
            raise DataError([Fault(name, f"is the identity {other} in another spelling")])
    names = sorted(known, key=lambda name: (int(name) if numeric else 0, name))
    number: dict[str | None, int] = {name: label for label, name in enumerate(names)}
    labels = torch.tensor([number.get(name, -1) for name in identities], dtype=torch.int64)
    return labels, tuple(names)


def selected(faces: Faces, kept: Tensor) -> dict[str, Any]:
    """Names, labels (numbered anew without gaps) and identities of the faces at some positions."""
    names = tuple(faces.names[i] for i in kept.tolist())
    if faces.labels is None:
        return {"names": names, "labels": None, "identities": ()}
    labels = faces.labels[kept]
    present, renumbered = labels[labels >= 0].unique(return_inverse=True)
    labels[labels >= 0] = renumbered
    people = tuple(faces.identities[i] for i in present.tolist())
    return {"names": names, "labels": labels, "identities": people}


def _digest(faces: Faces, index: int, data: bytes) -> bytes:
    total = hashlib.sha256(repr(faces.crop).encode())
    points = faces.landmarks
    if points is not None:
        total.update(points[index].contiguous().numpy().tobytes())
    total.update(data)
    return total.digest()
