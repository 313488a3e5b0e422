"""FacePipeline: from a photo to its faces, super-resolved, and their embeddings."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from idloss.create import create_srnet
from idloss.data.faces import decode_image
from idloss.data.files import read_file
from idloss.detection import Detections, Detector, create_detector
from idloss.encoder import FaceEncoder, resolve_device
from idloss.geometry import Template, fit_similarity, get_template, warp
from idloss.resample import resize, to_float, to_uint8

_SCALE = 4  # of pictures over templates, and of most SRNets: 448x384 for sphereface
_MOST_FOLDED = 4  # times that a crop is halved: 7x6 of 112x96, the smallest size of the paper
_BATCH = 16  # faces that the SRNet sees at once
Photo = Tensor | str | os.PathLike[str]


@dataclass(frozen=True)
class RestoredFaces:
    """The faces of one photo, the surest first; everything on the CPU.

    Args:
        found: Boxes, scores and points in the photo.
        crops: The aligned crop of each as the SRNet took it, uint8 `[3, h, w]`: the template's size
            or that halved once to four times, so that a small face is not enlarged before.
        pictures: The SRNet's, uint8 `[N, 3, H, W]`, brought to one size by bicubic interpolation.
        embeddings: Of the SRNet's output, or of the crop where it has the template's full size,
            float32 `[N, D]`.
    """

    found: Detections
    crops: tuple[Tensor, ...]
    pictures: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.crops)


class FacePipeline:
    """Detect, align, super-resolve and embed faces.

    A super-resolved face shows what faces of such pixels often look like. It is no evidence of who
    somebody is.

    Args:
        detector: Name of a detector, or one.
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
        detector: str | Detector = "mtcnn",
        srnet: str | nn.Module = "edsr16_64_id",
        fnet: str | nn.Module | None = "mobilefacenet",
        *,
        crop: str | Template | None = None,
        size: tuple[int, int] | None = None,
        device: str | torch.device = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.detector = create_detector(detector) if isinstance(detector, str) else detector
        if isinstance(self.detector, nn.Module):
            self.detector.to(self.device)
        self.srnet = create_srnet(srnet, pretrained=isinstance(srnet, str)).to(self.device).eval()
        own: str | Template | None = getattr(self.srnet, "crop", None)
        self.template = get_template(crop or own or "sphereface")
        encoder = fnet
        if encoder is not None and not isinstance(encoder, FaceEncoder):
            encoder = FaceEncoder(encoder, crop=self.template, interpolation="bicubic")
        self.encoder = None if encoder is None else encoder.to(self.device).eval()
        rows, columns = self.template.size
        self.size = (rows * _SCALE, columns * _SCALE) if size is None else size

    @torch.no_grad()
    def __call__(self, photos: Photo | Sequence[Photo]) -> list[RestoredFaces]:
        """Find and restore the faces of photos.

        Args:
            photos: One or several: files, or RGB `[3, H, W]`, uint8 or floating point in [0, 1]; a
                tensor `[B, 3, H, W]` is several.

        Returns:
            The faces of each photo. Those that cannot be aligned (their points lie on one line,
            say) are left out, with a warning.

        Raises:
            DataError: If a file cannot be read.
        """
        single = isinstance(photos, (str, os.PathLike)) or (
            isinstance(photos, Tensor) and photos.ndim == 3
        )
        given: Sequence[Photo] = [photos] if single else photos  # type: ignore[list-item, assignment]
        images = [photo if isinstance(photo, Tensor) else read_photo(photo) for photo in given]
        return [
            self._restore(image, found)
            for image, found in zip(images, self.detector(images), strict=True)
        ]

    def _restore(self, photo: Tensor, found: Detections) -> RestoredFaces:
        """The faces found in a photo `[3, H, W]`."""
        photo = photo.expand(3, -1, -1)
        kept, crops = [], []
        for place, points in enumerate(found.landmarks):
            try:
                crops.append(cut_face(photo, points, self.template))
                kept.append(place)
            except ValueError as error:  # noqa: PERF203 -- each face may be none
                warnings.warn(f"a face is left out: {error}", UserWarning, stacklevel=4)
        pictures = torch.zeros(len(kept), 3, *self.size, dtype=torch.uint8)
        width = 0 if self.encoder is None else self.encoder.num_features
        embeddings = torch.zeros(len(kept), width)
        for size in {crop.shape for crop in crops}:
            alike = [place for place, crop in enumerate(crops) if crop.shape == size]
            for part in (alike[at : at + _BATCH] for at in range(0, len(alike), _BATCH)):
                lr = torch.stack([crops[place] for place in part]).to(self.device)
                sr = self.srnet(lr).clamp(0, 1)
                if self.encoder is not None:
                    full = tuple(size[1:]) == self.template.size
                    embeddings[part] = self.encoder(lr if full else sr).float().cpu()
                shrinks = sr.shape[-2] > self.size[0] or sr.shape[-1] > self.size[1]
                shown = resize(sr, self.size, convention="antialias" if shrinks else "cv2")
                pictures[part] = to_uint8(shown).cpu()
        found = Detections(found.boxes[kept], found.scores[kept], found.landmarks[kept])
        return RestoredFaces(found, tuple(to_uint8(crop) for crop in crops), pictures, embeddings)


def read_photo(path: str | os.PathLike[str]) -> Tensor:
    """A picture file as uint8 RGB `[3, H, W]`, upright; a DataError says what is wrong with it."""
    return decode_image(read_file(Path(path)), str(path))


def cut_face(photo: Tensor, points: Tensor, crop: str | Template) -> Tensor:
    """Cut a face `[5, 2]` out of a photo `[3, H, W]` with the pixels that it has there.

    The crop, in [0, 1], has the size of its template, or that halved once to four times where the
    face is smaller. Large faces are antialiased.
    """
    template = get_template(crop)
    height, width = photo.shape[-2:]
    (matrix,) = fit_similarity(points[None].cpu(), template, image_size=(height, width)).double()
    step = 1 / float(torch.linalg.vector_norm(matrix[0, :2]))  # pixels of the photo in a crop's
    folded = 2 ** min(_MOST_FOLDED, max(0, math.floor(-math.log2(step))))
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
