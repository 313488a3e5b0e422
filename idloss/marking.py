"""Landmarks of photos that have none: what a detector finds, as a table that every reader takes."""

from __future__ import annotations

import csv
import os
import posixpath
from pathlib import Path

from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor

from idloss.data.faces import decode_image, is_picture, map_ahead
from idloss.data.files import DataError, Fault, FolderFiles, open_files
from idloss.data.landmarks import POINT_COLUMNS
from idloss.detection import Detections, Detector
from idloss.upscaling import one_core_each
from idloss.weights.files import written_whole


def mark(data: str | os.PathLike[str], out: Path, detector: Detector) -> tuple[int, list[Fault]]:
    """Write the five points of the main face of each photo.

    Names are those below the table's folder where that lies in the data, else below the folder that
    holds all photos (`lfw/` of LFW's tar): so `landmarks=` of all evaluation sets has them.

    Args:
        data: A folder, `.tar`, `.tar.gz` or `.tgz` of photos.
        out: The table, such as `landmarks.csv`.
        detector: What finds the faces.

    Returns:
        How many photos are in the table, and those that are not, and why.

    Raises:
        DataError: The data cannot be read.
    """
    files = open_files(data)
    names = [name for name in files.names() if is_picture(name)]
    top = posixpath.commonpath([posixpath.dirname(name) for name in names]) if names else ""
    if isinstance(files, FolderFiles) and out.resolve().is_relative_to(files.root.resolve()):
        top = out.resolve().parent.relative_to(files.root.resolve()).as_posix().strip(".")
        names = [name for name in names if not top or name.startswith(f"{top}/")]

    if not names:
        raise DataError([Fault(files.location, "holds no pictures that the table could name")])

    def work(name: str) -> Tensor | Fault:
        try:
            photo = decode_image(files.read(name), files.where(name))
        except DataError as error:
            return error.faults[0]
        (found,) = detector(photo)
        if not len(found):
            return Fault(files.where(name), "no face was found")
        return found.landmarks[main_face(found, photo.shape[1:])]

    faults: list[Fault] = []
    with (
        written_whole(out) as unfinished,
        unfinished.open("w", encoding="utf-8", newline="") as file,
        one_core_each() as threads,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image_id", *POINT_COLUMNS])
        bar = tqdm(map_ahead(work, names, threads), total=len(names), unit="photo", delay=2)
        for name, points in zip(names, bar, strict=True):
            if isinstance(points, Fault):
                faults.append(points)
                continue
            below = name.removeprefix(f"{top}/") if top else name
            table.writerow([below, *(f"{value:.3f}" for value in points.flatten().tolist())])
    return len(names) - len(faults), faults


def main_face(found: Detections, size: tuple[int, ...]) -> int:
    """Which of the faces in a photo of some rows and columns is meant: a large one near its middle.

    The rule is that of davidsandberg/facenet, src/align/align_dataset_mtcnn.py.
    """
    near, far = found.boxes[:, :2], found.boxes[:, 2:]
    beside = (near + far) / 2 - near.new_tensor([size[1] - 1, size[0] - 1]) / 2
    return int(((far - near).prod(1) - 2 * beside.square().sum(1)).argmax())
