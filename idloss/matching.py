"""FaceMatcher: faces of photos or crops, embedded as the bench does, and how alike they are."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idloss.create import create_fnet, create_srnet
from idloss.data.files import DataError, Fault
from idloss.data.pictures import read_photo
from idloss.detection import Detections, Detector, create_detector
from idloss.encoder import resolve_device
from idloss.evaluation.cache import as_tested, digest, digest_network, is_plain
from idloss.evaluation.calibration import Calibration, Odds, identity, zoo_tables
from idloss.evaluation.embedding import Networks
from idloss.evaluation.protocols import get_protocol
from idloss.evaluation.results import HR
from idloss.geometry import Template, convert_crop, fit_similarity, get_template
from idloss.pipeline import cut_face
from idloss.resample import resize, to_float, to_uint8

_BATCH = 16  # faces that go through the networks at once
_NAME = "own"  # of either network


@dataclass(frozen=True)
class Face:
    """A face that was found.

    Attributes:
        box: Left, top, right and bottom in its photo; of a crop its corners.
        rows: Rows of pixels that it has in the SRNet's crop: 112 and more are full size.
        embedding: Float32 `[D]` of length 1.
    """

    box: tuple[float, ...]
    rows: float
    embedding: Tensor


class _Cut(NamedTuple):
    """A face on its way to the networks; `own` is the template of one at full size."""

    box: tuple[float, ...]
    rows: float
    pixels: Tensor  # uint8 [3, H, W]
    own: Template | None


class FaceMatcher:
    """Find and embed faces, the small ones super-resolved, and say what a similarity means.

    Faces are treated as the bench treats them (protocol `paper`: the embeddings of both mirror
    images, side by side), so that its tables of false matches hold.

    Args:
        srnet: Name of the SRNet that faces with fewer pixels than its crop go through, or one.
        fnet: Name of an FNet, or one.
        detector: Name of a detector, or one.
        crop: Pictures are not photos but crops of this template, of its size or smaller.
        tables: Files `calibration.csv` to look in before those of the zoo.
        device: `"auto"`, `"cpu"`, `"cuda"`, ...

    Raises:
        ValueError: If a name is unknown, the device cannot be used, or a file is no table.
        WeightsError: If weights cannot be had.
    """

    def __init__(
        self,
        srnet: str | nn.Module = "edsr16_64_id",
        fnet: str | nn.Module = "mobilefacenet",
        detector: str | Detector = "mtcnn",
        *,
        crop: str | Template | None = None,
        tables: Iterable[str | os.PathLike[str]] = (),
        device: str | torch.device = "auto",
    ) -> None:
        self.calibration = Calibration([*map(Path, tables), *zoo_tables()])
        self.crop = None if crop is None else get_template(crop)
        place = resolve_device(device)
        self.srnet = create_srnet(srnet, pretrained=isinstance(srnet, str)).to(place).eval()
        self.fnet = create_fnet(fnet, pretrained=isinstance(fnet, str)).to(place).eval()
        protocol = get_protocol("paper")
        self._networks = Networks({_NAME: self.fnet}, {_NAME: self.srnet}, protocol, place)
        self.template = self._networks.crops[_NAME]
        self.num_features = 2 * int(self.fnet.num_features)  # type: ignore[arg-type]
        self._identities = identity(self.fnet), identity(self.srnet)
        self.detector = None
        if self.crop is None:
            self.detector = create_detector(detector, device=place)
        self._networks.warn_of_borders(self.crop)
        plain = {
            key: one for key, one in getattr(detector, "__dict__", {}).items() if is_plain(one)
        }
        finder = detector if isinstance(detector, str) else (repr(detector), sorted(plain.items()))
        about = digest_network(self.fnet), digest_network(self.srnet, (3, 14, 12))
        # networks that cannot be told from others have embeddings of their own
        once = uuid.uuid4().hex if None in about else ""
        self.settings = digest(about, once, finder if self.crop is None else self.crop)
        """Digest of all that embeddings depend on beside the picture."""

    def read(self, path: str | os.PathLike[str]) -> list[Face]:
        """The faces of a file, the surest first; a DataError where it cannot be read."""
        return self.find([read_photo(path)], [os.fspath(path)])[0]

    def find(self, pictures: Sequence[Tensor], names: Sequence[str] = ()) -> list[list[Face]]:
        """The faces of pictures, the surest first.

        Args:
            pictures: Photos, or crops where `crop` was given, uint8 RGB `[3, H, W]`.
            names: What errors call them.

        Returns:
            The faces of each; those that cannot be aligned are left out.

        Raises:
            DataError: If a picture is no crop of the template.
        """
        with as_tested(self.fnet, self.srnet):
            if self.detector is None:
                called = names or [f"picture {place}" for place in range(len(pictures))]
                cuts = [[self._of_crop(*one)] for one in zip(pictures, called, strict=True)]
            else:
                found = self.detector(pictures)
                cuts = [self._of_photo(*one) for one in zip(pictures, found, strict=True)]
            embeddings = self._embed([one for own in cuts for one in own])
        rest = iter(embeddings)
        return [[Face(one.box, one.rows, next(rest)) for one in own] for own in cuts]

    def compare(self, one: Face, other: Face) -> tuple[float, Odds | None]:
        """The cosine of two faces, and how often it is reached; None where nobody measured that."""
        cosine = float(one.embedding @ other.embedding)
        rows = (one.rows, other.rows)
        return cosine, self.calibration.odds(*self._identities, rows, cosine)

    def _of_photo(self, photo: Tensor, found: Detections) -> list[_Cut]:
        cuts = []
        height, width = photo.shape[-2:]
        for box, points in zip(found.boxes.tolist(), found.landmarks, strict=True):
            try:
                rows = face_rows(points, self.template, (height, width))
                crop, own = cut_face(photo, points, self.template), None
                if crop.shape[1:] == self.template.size:
                    own = self._networks.crop_of(_NAME, HR)
                    crop = cut_face(photo, points, own)
            except ValueError as error:
                warnings.warn(f"a face is left out: {error}", UserWarning, stacklevel=5)
                continue
            cuts.append(_Cut(tuple(box), rows, to_uint8(crop), own))
        return cuts

    def _of_crop(self, picture: Tensor, name: str) -> _Cut:
        given, (rows, columns) = self.crop or self.template, picture.shape[-2:]
        height, width = given.size
        if abs(columns - width * rows / height) > 1:
            told = f"{rows}x{columns} is no {given.name} crop, whose shape is {height}x{width}"
            raise DataError([Fault(name, f"{told}; give no crop for photos")])
        box = (0.0, 0.0, float(columns), float(rows))
        if rows >= height:
            full = resize(to_float(picture[None]), given.size, convention="antialias")[0]
            return _Cut(box, rows * self.template.size[0] / height, to_uint8(full), given)
        lr = convert_crop(to_float(picture[None]), given, self.template)[0]
        return _Cut(box, float(lr.shape[-2]), to_uint8(lr), None)

    def _embed(self, cuts: Sequence[_Cut]) -> Tensor:
        """Embeddings of length 1, `[len(cuts), D]`."""
        embeddings = torch.zeros(len(cuts), self.num_features)
        groups: dict[object, list[int]] = {}
        for place, one in enumerate(cuts):
            groups.setdefault((one.pixels.shape, one.own), []).append(place)
        for places in groups.values():
            for part in (places[at : at + _BATCH] for at in range(0, len(places), _BATCH)):
                pixels = torch.stack([cuts[place].pixels for place in part])
                pixels, own = pixels.to(self._networks.device), cuts[part[0]].own
                if own is None:
                    shown = self._networks.show(_NAME, pixels)
                    rows = self._networks.embed_sr(_NAME, _NAME, shown)
                else:
                    rows = self._networks.embed_hr(_NAME, pixels, own)
                embeddings[part] = F.normalize(rows.float()).cpu()
        return embeddings


def face_rows(points: Tensor, template: Template, photo: tuple[int, int]) -> float:
    """Rows of pixels that a face `[5, 2]` of a photo of some size has in a crop of the template."""
    (matrix,) = fit_similarity(points[None].cpu(), template, image_size=photo)
    return template.size[0] / float(torch.linalg.vector_norm(matrix[0, :2]))
