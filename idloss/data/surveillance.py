"""Faces that were small when taken: TinyFace, QMUL-SurvFace and SCface, as distributed."""

from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from idloss.data.faces import FileFaces, is_picture, number_identities
from idloss.data.files import DataError, Fault, Files, open_files, skip_or_raise
from idloss.data.landmarks import check_landmarks, read_points
from idloss.data.pairs import EvaluationSet, PairList, index_of
from idloss.data.tables import read_own_table

TINYFACE = ("Testing_Set/", "tinyface/Testing_Set/", "")
DISTRACTORS = 153_428
"""Gallery faces of nobody in TinyFace's test set (Cheng, Zhu, Gong 2018)."""
SURVFACE = ("Face_{}_Test_Set/", "QMUL-SurvFace/Face_{}_Test_Set/", "")
SCFACE = ("", "SCface_database/", "SCface/")
NO_PART = "Copy it from the published set; TinyFace can do with distractors=False."
MUGSHOTS = ("mugshot_frontal_cropped_all/", "mugshot_frontal_original_all/")
CAMERA = re.compile(r"(?P<subject>\d{3})_cam[1-5]_(?P<distance>[123])\.\w+")
"""A face by daylight; cameras 6, 7 and 8 are infrared (Grgic et al. 2011)."""

StrPath = str | os.PathLike[str]


def tinyface(
    root: StrPath,
    *,
    distractors: bool = True,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """Read the test set of TinyFace (Cheng, Zhu, Gong, ACCV 2018).

    Args:
        root: the folder or tar that holds `Testing_Set/`, or is it, with `Gallery_Match/`,
            `Gallery_Distractor/`, `Probe/` and the two `*_img_ID_pairs.mat`.
        distractors: take in the 153,428 gallery faces of nobody, as the protocol has it: fewer are
            a warning, none is an error.
        landmarks: rows of `Probe/name.jpg` and five points; without, the faces have none.
        crop: the template the faces are aligned to, without landmarks.
        skip_missing: leave out listed images that are missing.

    Returns:
        The faces, the gallery, and the probe set `probe`; distractors have the label -1.

    Raises:
        FileNotFoundError: it is not there.
        DataError: a list or an image has faults; names the file.
        ImportError: scipy, which reads the lists, is missing.
    """
    files = open_files(root)
    base = _base(files, TINYFACE, ["Probe/"], "TinyFace")
    parts = _Parts(files, base)
    parts.take_list("gallery", "Gallery_Match/", "gallery_match_img_ID_pairs.mat", "gallery")
    parts.take_list("probe", "Probe/", "probe_img_ID_pairs.mat", "probe")
    if distractors:
        parts.take_folder("distractors", "Gallery_Distractor/", DISTRACTORS)
    parts.require_mates("gallery", "probe")
    faces = parts.faces(landmarks, crop, skip_missing=skip_missing)
    found = parts.positions(faces)
    probes = {"probe": found.pop("probe")}
    return EvaluationSet("tinyface", faces, gallery=torch.cat([*found.values()]), probes=probes)


def survface_identification(
    root: StrPath,
    *,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """Read the open-set identification test of QMUL-SurvFace (Cheng, Zhu, Gong 2018).

    Args:
        root: the folder or tar that holds `Face_Identification_Test_Set/`, or is it, with
            `gallery/`, `mated_probe/`, `unmated_probe/` and the two `*_img_ID_pairs.mat`.
        landmarks: rows of `gallery/name.jpg` and five points; without, the faces have none.
        crop: the template the faces are aligned to, without landmarks.
        skip_missing: leave out listed images that are missing.

    Returns:
        The faces, the gallery, and the probe sets `mated` and `unmated` (label -1).

    Raises:
        FileNotFoundError: it is not there.
        DataError: a list or an image has faults; names the file.
        ImportError: scipy, which reads the lists, is missing.
    """
    files = open_files(root)
    folders = [folder.format("Identification") for folder in SURVFACE]
    parts = _Parts(files, _base(files, folders, ["mated_probe/"], "QMUL-SurvFace identification"))
    parts.take_list("gallery", "gallery/", "gallery_img_ID_pairs.mat", "gallery")
    parts.take_list("mated", "mated_probe/", "mated_probe_img_ID_pairs.mat", "mated_probe")
    parts.take_folder("unmated", "unmated_probe/")
    parts.require_mates("gallery", "mated")
    faces = parts.faces(landmarks, crop, skip_missing=skip_missing)
    probes = parts.positions(faces)
    gallery = probes.pop("gallery")
    return EvaluationSet("survface-identification", faces, gallery=gallery, probes=probes)


def survface_verification(
    root: StrPath,
    *,
    landmarks: StrPath | None = None,
    crop: str | None = None,
    skip_missing: bool = False,
) -> EvaluationSet:
    """Read the verification test of QMUL-SurvFace, 5,320 pairs of each kind.

    Args:
        root: the folder or tar that holds `Face_Verification_Test_Set/`, or is it, with
            `verification_images/`, `positive_pairs_names.mat` and `negative_pairs_names.mat`.
        landmarks: rows of `verification_images/name.jpg` and five points.
        crop: the template the faces are aligned to, without landmarks.
        skip_missing: leave out pairs whose images are missing.

    Returns:
        The faces and the pairs, positive ones first, each kind cut into 10 folds.

    Raises:
        FileNotFoundError: it is not there.
        DataError: a list or an image has faults; names the file.
        ImportError: scipy, which reads the lists, is missing.
    """
    files = open_files(root)
    images = "verification_images/"
    folders = [folder.format("Verification") for folder in SURVFACE]
    base = _base(files, folders, [images], "QMUL-SurvFace verification")
    parts = _Parts(files, base)
    parts.take_folder("all", images)
    faces = replace(parts.faces(landmarks, crop, skip_missing=skip_missing), labels=None)
    pairs = PairList(files.where(base), index_of(faces.names))
    for kind in ("positive", "negative"):
        listed = _read_mat(files, f"{base}{kind}_pairs_names.mat", f"{kind}_pairs_names")
        where = files.where(f"{base}{kind}_pairs_names.mat")
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
    """Read SCface (Grgic, Delac, Grgic 2011): a mugshot each, five cameras at three distances.

    Args:
        root: the folder or tar with `mugshot_frontal_cropped_all/` (or `..._original_all/`) and
            `surveillance_cameras_distance_1/` to `_3/` (or `surveillance_cameras_all/`).
        subjects: whom to take. Papers that fine-tune on the first 50 report `range(51, 131)`.
        landmarks: rows of the path below the root and five points.
        crop: the template the faces are aligned to, without landmarks.
        skip_missing: leave out subjects that lack their mugshot.

    Returns:
        The faces, the mugshots as gallery, and the probe sets `d1` (4.2 m), `d2` (2.6 m) and `d3`
        (1.0 m).

    Raises:
        FileNotFoundError: it is not there.
        DataError: a subject has no mugshot, or no probes at all; names it.
    """
    files = open_files(root)
    base = _base(files, SCFACE, MUGSHOTS, "SCface")
    mugshots = next(folder for folder in MUGSHOTS if _has_images(files, base + folder))
    parts = _Parts(files, base)
    wanted = [f"{subject:03d}" for subject in subjects]
    gallery = {
        member.removeprefix(base + mugshots)[:3]: member for member in parts.images(mugshots)
    }
    parts.faults += [
        Fault(files.where(base + mugshots), f"subject {subject} has no mugshot")
        for subject in wanted
        if subject not in gallery
    ]
    people = [subject for subject in wanted if subject in gallery]
    parts.add("gallery", [(gallery[subject], subject) for subject in people])
    # the distances' folders and `surveillance_cameras_all` hold the same pictures
    pictures = {
        member.rpartition("/")[2]: member for member in parts.images("surveillance_cameras_")
    }
    for distance in "123":
        found = [
            (member, match["subject"])
            for name, member in sorted(pictures.items())
            if (match := CAMERA.fullmatch(name))
            and match["distance"] == distance
            and match["subject"] in people
        ]
        if not found:
            what = f"there are no faces of cameras 1 to 5 at distance {distance}"
            parts.faults.append(Fault(files.where(base), what))
        parts.add(f"d{distance}", found)
    faces = parts.faces(landmarks, crop, skip_missing=skip_missing)
    probes = parts.positions(faces)
    return EvaluationSet("scface", faces, gallery=probes.pop("gallery"), probes=probes)


@dataclass
class _Parts:
    """The faces of a data set's parts while they are collected.

    Attributes:
        files: where they are.
        base: the folder in it that all names start with.
        faults: what is wrong.
    """

    files: Files
    base: str
    faults: list[Fault] = field(default_factory=list)
    _parts: dict[str, Sequence[tuple[str, str | None]]] = field(default_factory=dict)

    def images(self, prefix: str) -> list[str]:
        """The images below a folder, or below the folders whose names start so."""
        folder = self.base + prefix.rpartition("/")[0]
        inside = self.files.names(f"{folder}/" if "/" in prefix else self.base)
        start = self.base + prefix
        return [name for name in inside if name.startswith(start) and is_picture(name)]

    def add(self, part: str, members: Sequence[tuple[str, str | None]]) -> None:
        """Take files with their identities."""
        self._parts[part] = members

    def take_folder(self, part: str, folder: str, count: int | None = None) -> None:
        """Take all images of a folder, of nobody known; say if they are not `count`."""
        members = self.images(folder)
        where = self.files.where(self.base + folder)
        if not members:
            raise DataError([Fault(where, f"there are no images ({part})")], NO_PART)
        if count is not None and len(members) != count:
            warnings.warn(
                f"{where} holds {len(members):,} images and the published set {count:,}: figures "
                "do not compare with those of others",
                UserWarning,
                stacklevel=3,
            )
        self.add(part, [(member, None) for member in members])

    def require_mates(self, gallery: str, probes: str) -> None:
        """Probes said to be of somebody in the gallery must be."""
        enrolled = {identity for _, identity in self._parts[gallery]}
        for member, identity in self._parts[probes]:
            if identity not in enrolled and not self.faults:  # a lost gallery is told already
                what = f"its identity {identity} has no face in the gallery"
                self.faults.append(Fault(self.files.where(member), what))

    def take_list(self, part: str, folder: str, mat: str, key: str) -> None:
        """Take the images that a `.mat` lists (`KEY_set` and `KEY_ids`) from a folder."""
        names = _texts(_read_mat(self.files, self.base + mat, f"{key}_set"))
        identities = _read_mat(self.files, self.base + mat, f"{key}_ids").ravel().tolist()
        where = self.files.where(self.base + mat)
        if len(names) != len(identities):
            raise DataError([Fault(where, f"{len(names)} images, {len(identities)} identities")])
        there = set(self.images(folder))
        found = []
        for row, (name, identity) in enumerate(zip(names, identities, strict=True), start=1):
            member = self.base + folder + name
            if member in there:
                found.append((member, _identity(identity)))
            else:
                self.faults.append(Fault(f"{where}:row {row}", f"there is no {folder}{name}"))
        listed = {member for member, _ in found}
        if len(listed) != len(found):
            what = f"it lists {len(found) - len(listed)} images a second time"
            raise DataError([Fault(where, what)])
        self.faults += [
            Fault(self.files.where(name), f"{mat} does not list it")
            for name in sorted(there - listed)
        ]
        self.add(part, found)

    def faces(
        self, landmarks: StrPath | None, crop: str | None, *, skip_missing: bool
    ) -> FileFaces:
        """All faces taken, with their points where there are some."""
        taken = [item for part in self._parts.values() for item in part]
        points = None
        if crop is None and landmarks is not None:
            table = read_own_table(landmarks)
            points = read_points(table)
            self.faults += points.faults
            names = [member.removeprefix(self.base) for member, _ in taken]
            lost = {name for name in names if name not in points.by_name}
            self.faults += [Fault(table.where, f"no points of {name}") for name in sorted(lost)]
            taken = [item for item, name in zip(taken, names, strict=True) if name not in lost]
        skipped = skip_or_raise(self.faults, skip_missing=skip_missing)
        labels, identities = number_identities(identity for _, identity in taken)
        names = [member.removeprefix(self.base) for member, _ in taken]
        found = FileFaces(
            files=self.files,
            members=tuple(member for member, _ in taken),
            names=tuple(names),
            labels=labels,
            identities=identities,
            landmarks=points.stack(names) if points else None,
            crop=crop,
            skipped=skipped,
        )
        return check_landmarks(found, str(landmarks))

    def positions(self, faces: FileFaces) -> dict[str, torch.Tensor]:
        """Where the faces of each part are."""
        index = index_of(faces.members)
        return {
            part: torch.tensor([index[m] for m, _ in members if m in index], dtype=torch.int64)
            for part, members in self._parts.items()
        }


def _has_images(files: Files, folder: str) -> bool:
    return any(map(is_picture, files.names(folder)))


def _base(files: Files, bases: Iterable[str], folders: Iterable[str], what: str) -> str:
    """The first of some folders that holds images in one of its sub-folders."""
    places = [(base, base + folder) for base in bases for folder in folders]
    for base, folder in places:
        if _has_images(files, folder):
            return base
    looked = ", ".join(folder for _, folder in places)
    raise FileNotFoundError(f"no {what} in {files.location}; looked for images in {looked}")


def _read_mat(files: Files, name: str, key: str) -> Any:
    """One variable of a Matlab file, an array."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise ImportError("the lists are Matlab files: pip install 'idloss[eval]'") from error
    try:
        content: Mapping[str, Any] = loadmat(io.BytesIO(files.read(name)), variable_names=[key])
    except (MatReadError, ValueError, TypeError, OSError, EOFError, zlib.error) as error:
        raise DataError([Fault(files.where(name), f"no readable Matlab file ({error})")]) from error
    if key not in content:
        raise DataError([Fault(files.where(name), f"there is no variable {key}")])
    return content[key]


def _identity(number: object) -> str:
    """A person's number alike from tables of whole numbers and of floating point."""
    if isinstance(number, float) and number.is_integer():
        return str(int(number))
    return str(number)


def _texts(cells: Any) -> list[str]:
    """The texts of a cell array, or of an array of equally long ones, row by row."""
    return [str(cell.item() if hasattr(cell, "item") else cell).strip() for cell in cells.ravel()]
