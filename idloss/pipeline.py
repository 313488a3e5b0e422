"""FacePipeline: from a photo to its faces, super-resolved, and their embeddings."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from idloss.create import create_srnet
from idloss.data.pictures import read_photo
from idloss.detection import Detections, Detector, create_detector
from idloss.detection.base import as_photos
from idloss.encoder import COVERAGE, FaceEncoder, resolve_device
from idloss.geometry import (
    Template,
    convert_crop,
    coverage,
    fit_similarity,
    get_template,
    warp,
)
from idloss.resample import Size, resize, to_float, to_uint8

_SCALE = 4  # of pictures over templates, and of most SRNets: 448x384 for sphereface
_MOST_FOLDED = 4  # times that a crop is halved: 7x6 of 112x96, the smallest size of the paper
_BATCH = 16  # faces that the SRNet sees at once
_MOST_PASTED = 12_000_000  # pixels of a photo with faces pasted in: 350 MB while it is made
_SOFT = 0.12  # of a side of a pasted face, over which it fades into the photo
_NEAR_EDGE = 5  # pixels of a photo, likewise
Photo = Tensor | str | os.PathLike[str]


@dataclass(frozen=True)
class RestoredFaces:
    """The faces of one photo, the surest first; everything on the CPU.

    Args:
        found: Boxes, scores and points in the photo.
        crops: The aligned crop of each as the SRNet takes it, uint8 `[3, h, w]`: the template's
            size or that halved once to four times, so that a small face is not enlarged before.
        pictures: Of one size, uint8 `[N, 3, H, W]`: the SRNet's, resized by bicubic interpolation,
            or, of a face that is not `restored`, what the photo itself has.
        embeddings: Of the SRNet's output, or of the crop where it has the template's full size,
            float32 `[N, D]`.
        restored: Whether each is super-resolved. A network that enlarges, as its `scale` says, sees
            faces of at most half the template's rows, as when it was trained.
        left_out: Why others could not be aligned: their points lie on one line, say.
    """

    found: Detections
    crops: tuple[Tensor, ...]
    pictures: Tensor
    embeddings: Tensor
    restored: tuple[bool, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.crops)


class FacePipeline:
    """Detect, align, super-resolve and embed faces.

    A super-resolved face shows what faces of such pixels often look like. It is no evidence of who
    somebody is.

    Args:
        detector: Name of a detector, or one; None for crops alone.
        srnet: Name of an SRNet, or a module from RGB [0, 1] to enlarged RGB.
        fnet: Name of an FNet, a module, or a `FaceEncoder`, which is used as it is; None for
            pictures alone, and embeddings `[N, 0]`.
        crop: Template that faces are aligned to; None for the SRNet's own, or sphereface.
        size: Rows and columns of the pictures; None for four times the template's.
        device: `"auto"`, `"cpu"`, `"cuda"`, ...

    Raises:
        ValueError: If a name is unknown or the device cannot be used.
        WeightsError: If weights cannot be had.
    """

    def __init__(
        self,
        detector: str | Detector | None = "mtcnn",
        srnet: str | nn.Module = "edsr16_64_id",
        fnet: str | nn.Module | None = "mobilefacenet",
        *,
        crop: str | Template | None = None,
        size: Size | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.detector = None
        if detector is not None:
            self.detector = create_detector(detector, device=self.device)
        self.srnet = create_srnet(srnet, pretrained=isinstance(srnet, str)).to(self.device).eval()
        own: str | Template | None = getattr(self.srnet, "crop", None)
        self.template = get_template(crop or own or "sphereface")
        encoder = fnet
        if encoder is not None and not isinstance(encoder, FaceEncoder):
            encoder = FaceEncoder(encoder, crop=self.template, interpolation="bicubic")
        if encoder is not None:
            takes = encoder.crop or encoder.fnet_crop, encoder.value_range, encoder.channel_order
            if takes[0] not in (None, self.template) or takes[1:] != ((0, 1), "rgb"):
                name = takes[0] and takes[0].name
                raise ValueError(
                    f"{encoder} takes crop={name}, value_range={takes[1]}, {takes[2]}, and is "
                    f"shown crop={self.template.name} in (0, 1), rgb: make it with these"
                )
        self.encoder = None if encoder is None else encoder.to(self.device).eval()
        rows, columns = self.template.size
        self.size = (rows * _SCALE, columns * _SCALE) if size is None else size
        # restorers of one size are for faces of that size too
        own_size = getattr(self.srnet, "size", None)
        self._enlarges = own_size is None and getattr(self.srnet, "scale", 1) > 1

    @torch.no_grad()
    def __call__(
        self, photos: Photo | Sequence[Photo], *, crop: str | Template | None = None
    ) -> list[RestoredFaces]:
        """Find and restore the faces of photos.

        Args:
            photos: One or several: files, or RGB `[3, H, W]`, uint8 or floating point in [0, 1]; a
                tensor `[B, 3, H, W]` is several.
            crop: They are crops of this template, of any size, in which no face is looked for.

        Returns:
            The faces of each photo.

        Raises:
            DataError: If a file cannot be read.
            ValueError: If what is said to be a crop has another aspect, or there is no detector.
        """
        single = isinstance(photos, (str, os.PathLike)) or (
            isinstance(photos, Tensor) and photos.ndim == 3
        )
        given: Sequence[Photo] = [photos] if single else photos  # type: ignore[list-item, assignment]
        images = [photo if isinstance(photo, Tensor) else read_photo(photo) for photo in given]
        if crop is not None:
            return [self._restore_crop(image, get_template(crop)) for image in as_photos(images)]
        if self.detector is None:
            raise ValueError("without a detector, say which template the pictures are crops of")
        return [
            self._restore(image, found)
            for image, found in zip(images, self.detector(images), strict=True)
        ]

    def _restore(self, photo: Tensor, found: Detections) -> RestoredFaces:
        """The faces found in a photo `[3, H, W]`."""
        photo = photo.expand(3, -1, -1)
        most = max(ours / its for ours, its in zip(self.size, self.template.size, strict=True))
        kept: list[int] = []
        left_out: list[str] = []
        crops: list[Tensor] = []
        seen: list[Tensor | None] = []
        for place, points in enumerate(found.landmarks):
            try:
                crop = cut_face(photo, points, self.template)
            except ValueError as error:
                left_out.append(str(error))
                continue
            kept.append(place)
            crops.append(crop)
            seen.append(None)
            if self._is_large(crop):
                large = cut_face(photo, points, _enlarged(self.template, most), fold=False)
                seen[-1] = self._shown(large[None])[0]
        found = Detections(found.boxes[kept], found.scores[kept], found.landmarks[kept])
        return replace(self._finish(found, crops, seen), left_out=tuple(left_out))

    def _restore_crop(self, image: Tensor, template: Template) -> RestoredFaces:
        """The face of a crop `[3, H, W]`."""
        height, width = image.shape[1:]
        if (share := coverage(template, self.template)) < COVERAGE:
            warnings.warn(
                f"crops of {template.name} hold {share:.0%} of {self.template.name}, which the "
                "SRNet takes: the rest is their border, repeated",
                stacklevel=3,
            )
        scales = torch.tensor([width / template.size[1], height / template.size[0]])
        points = (torch.tensor(template.points) + 0.5) * scales - 0.5
        box = torch.tensor([[0.0, 0.0, width - 1, height - 1]])
        found = Detections(box, torch.ones(1), points[None])
        face = convert_crop(to_float(image)[None], template, self.template)
        least = min(face.shape[-2] / self.template.size[0], 1)
        crop = face if least < 1 else resize(face, self.template.size, convention="antialias")
        large = self._shown(face)[0] if self._is_large(crop[0]) else None
        return self._finish(found, [crop[0].clamp(0, 1)], [large])

    def _is_large(self, crop: Tensor) -> bool:
        """Whether a face has no need of an SRNet that enlarges."""
        return self._enlarges and tuple(crop.shape[1:]) == self.template.size

    def _shown(self, images: Tensor) -> Tensor:
        """Images `[B, 3, h, w]` as pictures of the size that is wanted."""
        shrinks = images.shape[-2] > self.size[0] or images.shape[-1] > self.size[1]
        return to_uint8(resize(images, self.size, convention="antialias" if shrinks else "cv2"))

    def _finish(
        self, found: Detections, crops: list[Tensor], seen: list[Tensor | None]
    ) -> RestoredFaces:
        """Super-resolve and embed crops, but for those whose picture was seen in the photo."""
        pictures = torch.zeros(len(crops), 3, *self.size, dtype=torch.uint8)
        width = 0 if self.encoder is None else self.encoder.num_features
        embeddings = torch.zeros(len(crops), width)
        restored = tuple(picture is None for picture in seen)
        for size, needed in dict.fromkeys(
            (tuple(crop.shape[1:]), none) for crop, none in zip(crops, restored, strict=True)
        ):
            alike = [
                place
                for place, crop in enumerate(crops)
                if tuple(crop.shape[1:]) == size and restored[place] == needed
            ]
            for part in (alike[at : at + _BATCH] for at in range(0, len(alike), _BATCH)):
                lr = torch.stack([crops[place] for place in part]).to(self.device)
                sr = self.srnet(lr).clamp(0, 1) if needed else lr
                if self.encoder is not None:
                    full = size == self.template.size
                    embeddings[part] = self.encoder(lr if full else sr).float().cpu()
                if needed:
                    pictures[part] = self._shown(sr).cpu()
        for place, picture in enumerate(seen):
            if picture is not None:
                pictures[place] = picture
        levels = tuple(to_uint8(crop) for crop in crops)
        return RestoredFaces(found, levels, pictures, embeddings, restored)

    def paste(self, photo: Tensor, faces: RestoredFaces) -> Tensor:
        """Lay the super-resolved faces over their photo, with soft borders.

        Args:
            photo: The photo, uint8 RGB `[3, H, W]`.
            faces: What was found in it.

        Returns:
            The photo, uint8, enlarged up to four times, to 12 megapixels at most. Faces that are
            not `restored` are as the photo has them.
        """
        height, width = photo.shape[1:]
        scale = max(1, min(_SCALE, math.isqrt(_MOST_PASTED // (height * width))))
        pasted = resize(to_float(photo)[None], (height * scale, width * scale))
        # where a crop reaches out of its photo, it is black, and what is near is darkened
        edge = _soft_mask((height * scale, width * scale), [_NEAR_EDGE * scale] * 2)
        rows, columns = self.template.size
        for points, picture, needed in zip(
            faces.found.landmarks, faces.pictures, faces.restored, strict=True
        ):
            if not needed:
                continue
            mask = _soft_mask(self.size, [_SOFT * side for side in self.size])
            face = torch.cat((to_float(picture), mask[None]))[None]
            (matrix,) = fit_similarity(points[None], self.template).double()
            step = float(torch.linalg.vector_norm(matrix[0, :2])) / scale  # template's, of a pixel
            small = (max(1, round(rows / step)), max(1, round(columns / step)))
            if small[0] < face.shape[-2]:
                face = resize(face, small, convention="antialias").clamp(0, 1)
            back = torch.linalg.inv(torch.cat((matrix, torch.tensor([[0.0, 0.0, 1.0]]).double())))
            into = _scaling(columns / face.shape[-1], rows / face.shape[-2])
            there = _scaling(scale, scale) @ back @ into
            corners = (
                there
                @ torch.tensor(
                    [[x, y, 1.0] for x in (0, face.shape[-1]) for y in (0, face.shape[-2])],
                    dtype=torch.float64,
                ).T
            )
            left, top = (max(0, math.floor(value)) for value in corners[:2].amin(1).tolist())
            right, bottom = (math.ceil(value) + 1 for value in corners[:2].amax(1).tolist())
            window = pasted[:, :, top : max(bottom, 0), left : max(right, 0)]
            if 0 in window.shape:
                continue
            moved = _scaling(1, 1, -left, -top) @ there
            laid = warp(face, moved[None, :2], (window.shape[-2], window.shape[-1]))
            window.lerp_(laid[:, :3], laid[:, 3:].clamp(0, 1) * edge[top:bottom, left:right])
        return to_uint8(pasted[0])


def cut_face(photo: Tensor, points: Tensor, crop: str | Template, *, fold: bool = True) -> Tensor:
    """Cut a face `[5, 2]` out of a photo `[3, H, W]` with the pixels that it has there.

    The crop, in [0, 1], has the size of its template, or that halved once to four times where the
    face is smaller (`fold`). Large faces are antialiased.
    """
    template = get_template(crop)
    height, width = photo.shape[-2:]
    (matrix,) = fit_similarity(points[None].cpu(), template, image_size=(height, width)).double()
    step = 1 / float(torch.linalg.vector_norm(matrix[0, :2]))  # pixels of the photo in a crop's
    folded = 2 ** min(_MOST_FOLDED, max(0, math.floor(-math.log2(step)))) if fold else 1
    rows, columns = (max(1, round(side / folded)) for side in template.size)
    corners = torch.tensor([[x, y] for x in (0, template.size[1]) for y in (0, template.size[0])])
    seen = torch.linalg.solve(matrix[:, :2], (corners - matrix[:, 2]).T).T
    margin = 2 + 2 * math.ceil(step)
    left, top = (max(0, math.floor(value) - margin) for value in seen.amin(0).tolist())
    right, bottom = (math.ceil(value) + margin for value in seen.amax(0).tolist())
    window = photo[None, :, top : max(bottom, 0), left : max(right, 0)]
    if 0 in window.shape:
        raise ValueError(f"its crop lies outside the {height}x{width} photo")
    window = window if window.is_floating_point() else to_float(window)
    high, wide = window.shape[-2:]
    if step > 1:
        small = (max(1, round(high / step)), max(1, round(wide / step)))
        window = resize(window, small, convention="antialias")
    # sizes are scaled about the corner of an image, which lies at (-0.5, -0.5)
    there = _scaling(wide / window.shape[-1], high / window.shape[-2], left, top)
    back = _scaling(columns / template.size[1], rows / template.size[0])
    whole = back @ torch.cat((matrix, torch.tensor([[0.0, 0.0, 1.0]]).double())) @ there
    return warp(window, whole[None, :2], (rows, columns))[0].clamp(0, 1)


def _scaling(across: float, down: float, left: float = 0, top: float = 0) -> Tensor:
    """Pixels of a resized window to those of what it was cut from, `[3, 3]`."""
    lines = [[across, 0, (across - 1) / 2 + left], [0, down, (down - 1) / 2 + top], [0, 0, 1]]
    return torch.tensor(lines, dtype=torch.float64)


def _enlarged(template: Template, scale: float) -> Template:
    """A template of more pixels."""
    rows, columns = (round(side * scale) for side in template.size)
    points = tuple((scale * (x + 0.5) - 0.5, scale * (y + 0.5) - 0.5) for x, y in template.points)
    return Template(template.name, (rows, columns), points)


def _soft_mask(size: Size, widths: Sequence[float]) -> Tensor:
    """1 within rows and columns, and falling to 0 at borders that are so wide."""
    ramps = []
    for length, width in zip(size, widths, strict=True):
        places = torch.arange(length) + 0.5
        near = (places.minimum(length - places) / width).clamp(max=1)
        ramps.append(near * near * (3 - 2 * near))
    return ramps[0][:, None] * ramps[1]
