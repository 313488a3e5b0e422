"""Faces that were small when taken: TinyFace, QMUL-SurvFace and SCface, as distributed."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import torch

from idloss.data.faces import FileFaces, is_picture
from idloss.data.files import DataError, Fault, Files, open_files, skip_or_raise
from idloss.data.landmarks import labelled_faces, read_points
from idloss.data.pairs import EvaluationSet, PairList, index_of
from idloss.data.tables import read_own_table
from idloss.errors import import_extra

TINYFACE = ("Testing_Set/", "tinyface/Testing_Set/", "")
DISTRACTORS = 153_428
"""Gallery faces of nobody in TinyFace's test set (Cheng, Zhu, Gong 2018)."""
SURVFACE = ("Face_{}_Test_Set/", "QMUL-SurvFace/Face_{}_Test_Set/", "")
SCFACE = ("", "SCface_database/", "SCface/")
NO_PART = "Copy it from the published set; TinyFace can do with distractors=False."
MUGSHOTS = ("mugshot_frontal_cropped_all/", "mugshot_frontal_original_all/")
CAMERAS = range(1, 6)
"""Those by daylight; 6, 7 and 8 are infrared (Grgic et al. 2011)."""

MOST_CELLS = 10_000_000
"""Of a Matlab list: far more than any published one has."""

StrPath = str | os.PathLike[str]


def tinyface(
    root: StrPath,
    *,
    distractors: bool = True,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """TinyFace's test set (Cheng, Zhu, Gong, ACCV 2018): `Testing_Set/`, or what holds it.

    `distractors` takes in the gallery faces of nobody (label -1), as the protocol has it: fewer
    than published are a warning, none is an error. `landmarks` has rows of `Probe/name.jpg` and
    five points.
    """
    parts = _Parts.find(root, TINYFACE, ["Probe/"], "TinyFace", landmarks, crop, skip_missing)
    parts.take_list("gallery", "Gallery_Match/", "gallery_match_img_ID_pairs.mat")
    parts.take_list("probe", "Probe/", "probe_img_ID_pairs.mat")
    parts.require_mates("probe")
    if distractors:
        parts.take_folder("distractors", "Gallery_Distractor/", DISTRACTORS)
    return parts.finish("tinyface")


def survface_identification(
    root: StrPath,
    *,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """The open-set identification test of QMUL-SurvFace (Cheng, Zhu, Gong 2018).

    Read from `Face_Identification_Test_Set/` or what holds it; the probe sets are `mated` and
    `unmated` (label -1). `landmarks` has rows of `gallery/name.jpg` and five points.
    """
    folders = [folder.format("Identification") for folder in SURVFACE]
    what = "QMUL-SurvFace identification"
    parts = _Parts.find(root, folders, ["mated_probe/"], what, landmarks, crop, skip_missing)
    parts.take_list("gallery", "gallery/", "gallery_img_ID_pairs.mat")
    parts.take_list("mated", "mated_probe/", "mated_probe_img_ID_pairs.mat", "mated_probe")
    parts.require_mates("mated")
    parts.take_folder("unmated", "unmated_probe/")
    return parts.finish("survface-identification")


def survface_verification(
    root: StrPath,
    *,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """The verification test of QMUL-SurvFace, 5,320 pairs of each kind, positive ones first.

    Read from `Face_Verification_Test_Set/` or what holds it; each kind is cut into 10 folds.
    `landmarks` has rows of `verification_images/name.jpg` and five points.
    """
    images = "verification_images/"
    folders = [folder.format("Verification") for folder in SURVFACE]
    what = "QMUL-SurvFace verification"
    parts = _Parts.find(root, folders, [images], what, landmarks, crop, skip_missing)
    parts.take_folder("all", images)
    faces = replace(parts.faces(), labels=None)
    pairs = PairList(parts.where(), index_of(faces.names))
    for kind in ("positive", "negative"):
        listed = parts.read_mat(f"{kind}_pairs_names.mat", f"{kind}_pairs_names")
        where = parts.where(f"{kind}_pairs_names.mat")
        names = [images + name for name in _texts(listed)]
        for row, (first, second) in enumerate(zip(names[::2], names[1::2], strict=True), start=1):
            pairs.add(f"{where}:row {row}", first, second, same=kind == "positive")
    skipped = skip_or_raise(pairs.faults, skip_missing=skip_missing)
    faces = replace(faces, skipped=faces.skipped + skipped)
    return EvaluationSet("survface-verification", faces, pairs.finish(refold=True))


def scface(
    root: StrPath,
    *,
    subjects: Iterable[int] = range(1, 131),
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """SCface (Grgic, Delac, Grgic 2011): a mugshot each, five cameras at three distances.

    Read from the folder with `mugshot_frontal_cropped_all/` (or `..._original_all/`) and
    `surveillance_cameras_distance_1/` to `_3/` (or `surveillance_cameras_all/`); the probe sets are
    `d1` (4.2 m), `d2` (2.6 m) and `d3` (1.0 m). Papers that fine-tune on the first 50 subjects
    report `range(51, 131)`. `landmarks` has rows of the path below that folder and five points.
    """
    parts = _Parts.find(root, SCFACE, MUGSHOTS, "SCface", landmarks, crop, skip_missing)
    mugshots = next(folder for folder in MUGSHOTS if parts.images(folder))
    gallery = {PurePosixPath(member).name[:3]: member for member in parts.images(mugshots)}
    wanted = [f"{subject:03d}" for subject in subjects]
    people = [subject for subject in wanted if subject in gallery]
    for subject in wanted:
        if subject not in gallery:
            parts.fault(f"subject {subject} has no mugshot", mugshots)
    parts.parts["gallery"] = [(gallery[subject], subject) for subject in people]
    # the distances' folders and `surveillance_cameras_all` hold the same pictures
    pictures = {
        PurePosixPath(member).stem: member for member in parts.images("surveillance_cameras_")
    }
    for distance in "123":
        shots = {f"{s}_cam{camera}_{distance}": s for s in people for camera in CAMERAS}
        for shot in shots.keys() - pictures.keys():
            parts.fault(f"there is no {shot}.jpg")
        found = sorted(shots.keys() & pictures.keys())
        parts.parts[f"d{distance}"] = [(pictures[shot], shots[shot]) for shot in found]
    return parts.finish("scface")


@dataclass
class _Parts:
    """The faces of a data set's parts while they are collected below the folder `base`."""

    files: Files
    base: str
    landmarks: StrPath | None
    crop: str | None
    skip_missing: bool
    faults: list[Fault] = field(default_factory=list)
    parts: dict[str, Sequence[tuple[str, str | None]]] = field(default_factory=dict)

    @classmethod
    def find(
        cls, root: StrPath, bases: Iterable[str], folders: Iterable[str], what: str, *options: Any
    ) -> _Parts:
        """The first of some folders that holds images in one of its sub-folders."""
        files = open_files(root)
        places = [(base, folder) for base in bases for folder in folders]
        for base, folder in places:
            if (found := cls(files, base, *options)).images(folder):
                return found
        looked = ", ".join(base + folder for base, folder in places)
        raise FileNotFoundError(f"no {what} in {files.location}; looked for images in {looked}")

    def where(self, name: str = "") -> str:
        """A file or folder of the set, for messages."""
        return self.files.where(self.base + name)

    def fault(self, what: str, name: str = "") -> None:
        """Note what is wrong."""
        self.faults.append(Fault(self.where(name), what))

    def images(self, prefix: str) -> list[str]:
        """The images below a folder, or below the folders whose names start so."""
        start = self.base + prefix
        inside = self.files.names(start if prefix.endswith("/") else self.base)
        return [name for name in inside if name.startswith(start) and is_picture(name)]

    def take_folder(self, part: str, folder: str, count: int | None = None) -> None:
        """Take all images of a folder, of nobody known; say if they are not `count`."""
        members = self.images(folder)
        if not members:
            raise DataError([Fault(self.where(folder), f"there are no images ({part})")], NO_PART)
        if count not in (None, len(members)):
            warnings.warn(
                f"{self.where(folder)} holds {len(members):,} images and the published set "
                f"{count:,}: figures do not compare with those of others",
                stacklevel=3,
            )
        self.parts[part] = [(member, None) for member in members]

    def take_list(self, part: str, folder: str, mat: str, key: str = "") -> None:
        """Take the images that a `.mat` lists (`KEY_set` and `KEY_ids`) from a folder."""
        names = _texts(self.read_mat(mat, f"{key or part}_set"))
        identities = self.read_mat(mat, f"{key or part}_ids").ravel().tolist()
        if len(names) != len(identities):
            what = f"{len(names)} images, {len(identities)} identities"
            raise DataError([Fault(self.where(mat), what)])
        if len(set(names)) != len(names):
            what = f"it lists {len(names) - len(set(names))} images a second time"
            raise DataError([Fault(self.where(mat), what)])
        there = {member.removeprefix(self.base + folder) for member in self.images(folder)}
        for row, name in enumerate(names, start=1):
            if name not in there:
                self.fault(f"there is no {folder}{name}", f"{mat}:row {row}")
        for name in sorted(there - set(names)):
            self.fault(f"{mat} does not list it", folder + name)
        listed = zip(names, identities, strict=True)
        self.parts[part] = [
            (self.base + folder + n, _identity(number)) for n, number in listed if n in there
        ]

    def require_mates(self, probes: str) -> None:
        """Probes said to be of somebody in the gallery must be."""
        enrolled = {identity for _, identity in self.parts["gallery"]}
        for member, identity in self.parts[probes]:
            if identity not in enrolled and not self.faults:  # a lost gallery is told already
                what = f"its identity {identity} has no face in the gallery"
                self.fault(what, member.removeprefix(self.base))

    def faces(self) -> FileFaces:
        """All faces taken, with their points where there are some."""
        taken = {
            member.removeprefix(self.base): (member, identity)
            for part in self.parts.values()
            for member, identity in part
        }
        points = None
        if self.crop is None and self.landmarks is not None:
            points = read_points(table := read_own_table(self.landmarks))
            lost = taken.keys() - points.by_name.keys()
            self.faults += points.faults
            self.faults += [Fault(table.where, f"no points of {name}") for name in sorted(lost)]
            taken = {name: face for name, face in taken.items() if name not in lost}
        skipped = skip_or_raise(self.faults, skip_missing=self.skip_missing)
        members = {name: member for name, (member, _) in taken.items()}
        people = (identity for _, identity in taken.values())
        about: dict[str, Any] = {"where": str(self.landmarks), "crop": self.crop}
        return labelled_faces(self.files, members, people, points, skipped=skipped, **about)

    def finish(self, name: str) -> EvaluationSet:
        """The set: its gallery with the distractors, and the other parts as probes."""
        faces = self.faces()
        index = index_of(faces.members)
        found = {
            part: torch.tensor([index[m] for m, _ in members if m in index], dtype=torch.int64)
            for part, members in self.parts.items()
        }
        gallery = [found.pop(part) for part in ("gallery", "distractors") if part in found]
        return EvaluationSet(name, faces, gallery=torch.cat(gallery), probes=found)

    def read_mat(self, name: str, key: str) -> Any:
        """One variable of a Matlab file, an array."""
        matlab = import_extra("scipy.io", "eval", "the lists are Matlab files, which need")
        data = io.BytesIO(self.files.read(self.base + name))
        try:
            if any(math.prod(shape) > MOST_CELLS for _, shape, _ in matlab.whosmat(data)):
                raise ValueError(f"over {MOST_CELLS:,} cells")  # noqa: TRY301
            content: Mapping[str, Any] = matlab.loadmat(data, variable_names=[key])
        except Exception as error:  # what a damaged file makes scipy raise is not told
            what = f"no readable Matlab file ({error})"
            raise DataError([Fault(self.where(name), what)]) from error
        if key not in content:
            raise DataError([Fault(self.where(name), f"there is no variable {key}")])
        return content[key]


def _identity(number: object) -> str:
    """A person's number alike from tables of whole numbers and of floating point."""
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


def _texts(cells: Any) -> list[str]:
    """The texts of a cell array, or of an array of equally long ones, row by row."""
    return [str(cell.item() if hasattr(cell, "item") else cell).strip() for cell in cells.ravel()]
