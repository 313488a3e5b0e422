"""Labeled Faces in the Wild: a folder, torchvision's folder, or the archive read in place."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from pathlib import Path

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from idloss.data.faces import is_picture
from idloss.data.files import DataError, Fault, Files, FolderFiles, open_files, skip_or_raise
from idloss.data.landmarks import labelled_faces, read_points
from idloss.data.pairs import EvaluationSet, index_of, lfw_name, read_lfw_pairs
from idloss.data.tables import Table, read_number, read_own_table
from idloss.weights.files import Piece, download

ARCHIVE = "lfw.tgz"
PAIRS = "pairs.txt"
LANDMARKS = "lfw_landmarks.csv"
FOLDERS = ("lfw/", "lfw-py/lfw/", "")
ARCHIVES = (ARCHIVE, "lfw.tar", f"lfw-py/{ARCHIVE}")
IMAGE = re.compile(r"(?P<name>(?P<person>[^/]+)/(?P=person)_\d{4})\.\w+")

# Images and pairs: copies kept by scikit-learn on figshare, the university's own host is gone.
# Landmarks: MTCNN's, of the paper's authors (github.com/johnnysclai/SR_LRFR).
HOSTED = (
    Piece(
        ARCHIVE,
        "https://ndownloader.figshare.com/files/5976018",
        sha256="055f7d9c632d7370e6fb4afc7468d40f970c34a80d4c6f50ffec63f5a8d536c0",
    ),
    Piece(
        PAIRS,
        "https://ndownloader.figshare.com/files/5976006",
        sha256="ea42330c62c92989f9d7c03237ed5d591365e89b3e649747777b70e692dc1592",
    ),
    Piece(
        LANDMARKS,
        "https://raw.githubusercontent.com/johnnysclai/SR_LRFR/"
        "4cf3b4bc79bcf145df1b579ba2010f709e5470b4/data/LFW.csv",
        sha256="b615592ae189a1b70b49a48b6f32ff3e0cf6d973d2d8e124a553162c7f93d818",
        git_sha1="989bbeefafca299e2a7ad5d0bc22ff84a7da9fea",
    ),
)


def lfw(
    root: str | os.PathLike[str],
    *,
    pairs: str | os.PathLike[str] | None = None,
    landmarks: str | os.PathLike[str] | None = None,
    people: str | os.PathLike[str] | None = None,
    crop: str | None = None,
    download: bool = False,
    skip_missing: bool = False,
) -> EvaluationSet:
    """Read LFW, labelled by person, with its pairs.

    Args:
        root: A folder with `lfw/Name/Name_0001.jpg`, `lfw-py/lfw/` or `lfw.tgz`; that inner folder;
            or the archive, `.tgz` or `.tar`, which is read in place.
        pairs: Such as `pairs.txt`; None looks for it in `root` and beside it, and does without.
        landmarks: Rows of `Name/Name_0001.jpg` and five points, no header; None looks for
            `lfw_landmarks.csv` likewise.
        people: `lfw-names.txt` or `people.txt`, whose counts of images are then checked.
        crop: The template the images are aligned to; None for photos. Names end in `.jpg`
            whatever the files' ending, so that lists fit aligned copies in PNG too.
        download: Fetch `lfw.tgz`, `pairs.txt` and the landmarks into `root` where they are
            missing, verified.
        skip_missing: Leave out pairs whose images are missing, and images without landmarks.

    Returns:
        The faces found and the pairs.

    Raises:
        FileNotFoundError: There is no LFW at `root`; lists what was looked for.
        DataError: Images or lists have faults; names file and line.
    """
    place = Path(root).expanduser()
    if download:
        fetch(place)
    files, prefix = find(place)
    members, faults = _members(files, prefix)
    points, where = None, ""
    if crop is None and (table := _table(landmarks, place, LANDMARKS, ",")):
        points, where = read_points(table), table.where
        absent = points.by_name.keys() - members.keys()
        if absent:
            _warn(f"{where} has points of {len(absent)} images that are not there", min(absent))
        lost = [name for name in members if name not in points.by_name]
        faults += points.faults + [Fault(where, f"no points of {name}") for name in lost]
        for name in lost:
            del members[name]
    if people is not None:
        faults += _miscounted(read_own_table(people, None), members)
    pair_list = None
    if table := _table(pairs, place, PAIRS, None):
        pair_list = read_lfw_pairs(table, index_of(tuple(members)))
        faults += pair_list.faults
    people_of = (name.partition("/")[0] for name in members)
    skipped = skip_or_raise(faults, skip_missing=skip_missing)
    faces = labelled_faces(
        files, members, people_of, points, where=where, crop=crop, skipped=skipped
    )
    return EvaluationSet("lfw", faces, pair_list.finish() if pair_list else None)


def _members(files: Files, prefix: str) -> tuple[dict[str, str], list[Fault]]:
    """The image files by LFW's name, and those had twice; says which pictures are no LFW's."""
    members: dict[str, str] = {}
    faults, others = [], []
    for member in files.names(prefix):
        match = IMAGE.fullmatch(unicodedata.normalize("NFC", member.removeprefix(prefix)))
        if not is_picture(member) or not match:
            others += [member] if is_picture(member) else []
            continue
        name = f"{match['name']}.jpg"
        if name in members:
            faults.append(Fault(files.where(member), f"the image {members[name]} once more"))
        members.setdefault(name, member)
    if others:
        what = f"{len(others)} pictures of {files.location} are not called as in LFW and not taken"
        _warn(what, others[0])
    return members, faults


def _warn(what: str, example: str) -> None:
    warnings.warn(f"{what}, such as {example!a}", UserWarning, stacklevel=4)


def fetch(root: Path) -> None:
    """Download into a folder what of LFW is missing, 184 MB in all, verified."""
    if root.is_file():
        raise NotADirectoryError(f"{root} is a file; LFW is downloaded into a folder, name that")
    files = FolderFiles(root)
    there = any(archive in files for archive in ARCHIVES) or _prefix(files) is not None
    for piece in HOSTED:
        target = root / piece.filename
        if target.exists() or (piece.filename == ARCHIVE and there):
            continue
        root.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(root / f".{piece.filename}.lock"):
            if not target.exists():  # another process may have fetched it while this one waited
                download(piece, target, "LFW")


def find(place: Path) -> tuple[Files, str]:
    """LFW's files, and the folder in them that holds the people."""
    files = open_files(place)
    prefix = _prefix(files)
    if prefix is not None:
        return files, prefix
    if isinstance(files, FolderFiles):
        for archive in ARCHIVES:
            if archive in files:
                return find(place / archive)
    looked = [folder + "Name/Name_0001.jpg" for folder in FOLDERS] + list(ARCHIVES)
    raise FileNotFoundError(f"no LFW in {place}; looked for {', '.join(looked)}")


def _prefix(files: Files) -> str | None:
    """The folder that holds the people, where there is one."""
    for prefix in FOLDERS:
        names = filter(is_picture, files.names(prefix))
        if any(IMAGE.fullmatch(name.removeprefix(prefix)) for name in names):
            return prefix
    return None


def _table(
    given: str | os.PathLike[str] | None, place: Path, default: str, separator: str | None
) -> Table | None:
    """The table given, else the one of the usual name in or beside LFW, else None."""
    if given is not None:
        return read_own_table(given, separator)
    found = [path for path in (place / default, place.parent / default) if path.is_file()]
    return read_own_table(found[0], separator) if found else None


def _miscounted(table: Table, members: dict[str, str]) -> list[Fault]:
    """People whose number of images is not the one listed; lines of a single count are folds'."""
    faults = []
    for line, cells in table.rows:
        if len(cells) == 1:
            continue
        if len(cells) != 2:
            raise DataError([table.fault(line, f"expected a name and a number, got {cells}")])
        person = cells[0]
        count = read_number(table, line, cells[1], least=1)
        missing = [n for n in range(1, count + 1) if lfw_name(person, n) not in members]
        if missing:
            first = lfw_name(person, missing[0])
            what = f"{person} has {count - len(missing)} of {count} images, {first} is missing"
            faults.append(table.fault(line, what))
    return faults
