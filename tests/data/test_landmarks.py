"""Points in another order, or of other pictures, are refused by whatever reads them."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.test_faces import celeba, write
from data.test_files import encoded, jpeg
from PIL import Image

from idloss.data import (
    DataError,
    FileFaces,
    align_all,
    celeba_faces,
    folder_faces,
    lfw,
    open_faces,
    prepare,
)
from idloss.data.files import MemoryFiles
from idloss.data.landmarks import MEAN_FACE, POINT_COLUMNS, check_landmarks
from idloss.data.pairs import lfw_name
from idloss.geometry import get_template

COUNT = 9
HEADER = ",".join(["image_id", *POINT_COLUMNS])


def true_points(count=COUNT, seed=3):
    """Faces in photos of 100x110, as people's detectors give them: turned, and a little off."""
    rng = np.random.default_rng(seed)
    points = np.array(get_template("sphereface").points) - (48, 72)
    cos, sin = np.cos(angles := rng.normal(0, 0.3, count)), np.sin(angles)
    turns = np.array([[cos, sin], [-sin, cos]]).transpose(2, 0, 1)
    return points @ turns + rng.normal(0, 1.5, (count, 5, 2)) + (50, 60)


def rows_of(points):
    return [",".join(f"{value:.3f}" for value in row.ravel()) for row in points]


ORDERS = {
    "lefteye, righteye, nose, leftmouth, rightmouth as x1..x5,y1..y5": lambda p: p.transpose(
        0, 2, 1
    ).reshape(len(p), 5, 2),
    "righteye, lefteye, nose, rightmouth, leftmouth as x,y": lambda p: p[:, [1, 0, 2, 4, 3]],
    "righteye, lefteye, nose, leftmouth, rightmouth as x,y": lambda p: p[:, [1, 0, 2, 3, 4]],
    "nose, lefteye, righteye, leftmouth, rightmouth as x,y": lambda p: p[:, [2, 0, 1, 3, 4]],
    "lefteye, righteye, nose, leftmouth, rightmouth as y,x": lambda p: p[..., ::-1],
}


def as_folder(root, rows):
    table = "\n".join([HEADER, *(f"{i}.jpg,{row}" for i, row in enumerate(rows))])
    images = {f"{i}.jpg": jpeg(seed=i) for i in range(COUNT)}
    return folder_faces(write(root, {"landmarks.csv": table, **images}))


def as_celeba(root, rows):
    path = celeba(root, "flat", count=COUNT)
    lines = [f"{i + 1:06d}.jpg {row.replace(',', ' ')}\n" for i, row in enumerate(rows)]
    head = f"{COUNT}\n{' '.join(POINT_COLUMNS)}\n"
    (path / "list_landmarks_celeba.txt").write_text(head + "".join(lines))
    return celeba_faces(path)


def as_lfw(root, rows):
    names = [lfw_name(f"P_{i}", 1) for i in range(COUNT)]
    table = "\n".join(f"{name},{row}" for name, row in zip(names, rows, strict=True))
    images = {f"lfw/{name}": jpeg(seed=i) for i, name in enumerate(names)}
    return lfw(write(root, {"lfw_landmarks.csv": table, **images})).faces


def as_clean_list(root, rows):
    faces = as_folder(root, rows_of(true_points()))
    listed = root / "clean.csv"
    listed.write_text("\n".join(f"{i}.jpg,{row}" for i, row in enumerate(rows)))
    prepare(faces, root / "out", clean_list=listed, progress=False)
    return faces


READERS = {"folder": as_folder, "celeba": as_celeba, "lfw": as_lfw, "clean list": as_clean_list}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("order", ORDERS)
def test_points_in_another_order_are_refused_and_the_order_told(tmp_path, reader, order):
    with pytest.raises(DataError, match="no landmarks in the expected order") as caught:
        READERS[reader](tmp_path, rows_of(ORDERS[order](true_points())))
    assert f"it is likely {order} (" in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_true_points_are_taken_though_some_are_wrong(tmp_path, reader):
    points = true_points()
    points[:3] = points[:3, [1, 0, 2, 4, 3]]
    with pytest.warns(UserWarning, match=rf"points of 3 of {COUNT} faces form no face"):
        assert len(READERS[reader](tmp_path, rows_of(points))) == COUNT


def test_faces_on_their_heads_and_points_that_are_all_one(tmp_path):
    for points, what in (
        (110 - true_points(), "most faces stand on their heads"),
        (np.full((COUNT, 5, 2), 50.0), "leaves 100% of their spread"),
    ):
        with pytest.raises(DataError, match=what):
            as_folder(tmp_path, rows_of(points))


@pytest.mark.parametrize("reader", ["folder", "celeba", "lfw", "clean list"])
def test_points_outside_the_photos_are_refused(tmp_path, reader):
    with pytest.raises(DataError, match=rf"points lie outside {COUNT} of {COUNT} photos.*100x110"):
        READERS[reader](tmp_path, rows_of(2.5 * true_points()))


def scaled(faces, scale):
    """The same points with photos of another size."""
    contents = {}
    for member in faces.members:
        picture = Image.open(io.BytesIO(faces.files.read(member))).convert("RGB")
        size = round(picture.width * scale), round(picture.height * scale)
        contents[member] = encoded(picture.resize(size), "JPEG", quality=95)
    return replace(faces, files=MemoryFiles("scaled", contents))


def plain_faces(count=40):
    """Pictures of the mean face, each a little different, in photos of 216x232."""
    rng = np.random.default_rng(0)
    contents = {}
    for index in range(count):
        cells = np.array(MEAN_FACE) + rng.normal(0, 3, (8, 6)) + 120
        photo = np.pad(cells.repeat(8, 0).repeat(8, 1), 84, mode="edge").clip(0, 255)
        contents[f"{index}.png"] = encoded(photo.astype(np.uint8))
    names = tuple(contents)
    points = torch.tensor(get_template("sphereface").points).double() + torch.tensor([60, 52])
    files = MemoryFiles("plain", contents)
    return FileFaces(files, names, names, landmarks=points.repeat(count, 1, 1))


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.3, 1.5])
@pytest.mark.parametrize("kind", ["plain", "celeba", "lfw"])
def test_points_of_the_photos_before_they_were_scaled(kind, scale, request, tmp_path):
    if kind == "plain":
        faces = plain_faces()
    else:
        shared = request.getfixturevalue("shared")
        if kind == "lfw":
            faces = lfw(shared("data/lfw.tar")).faces.select(torch.arange(0, 11585, 180))
        else:
            faces = open_faces(shared("data/celeba_wild.tar")).select(torch.arange(0, 5524, 90))
    assert check_landmarks(faces, "points.csv") is faces
    refused = pytest.raises(DataError, match=r"\.csv: .*(is like a face by|lie outside)")
    with refused:
        check_landmarks(scaled(faces, scale), "points.csv")
    if kind == "plain":
        rows = rows_of((faces.landmarks / scale).numpy())
        listed = tmp_path / "clean.csv"
        listed.write_text("\n".join(map(",".join, zip(faces.names, rows, strict=True))))
        with refused:
            prepare(faces, tmp_path / "out", clean_list=listed, progress=False)
        assert not (tmp_path / "out").exists()


def test_points_of_photos_given_with_their_crops():
    faces = plain_faces()
    crops = align_all(faces, progress=False).crops.permute(0, 2, 3, 1).numpy()
    contents = dict(zip(faces.names, map(encoded, crops), strict=True))
    aligned = replace(faces, files=MemoryFiles("crops", contents))
    with pytest.raises(DataError, match=r"^points\.csv: .*(is like a face by|lie outside)"):
        check_landmarks(aligned, "points.csv")


def test_tables_of_tabs_and_semicolons_and_tars(tmp_path):
    rows = rows_of(true_points())
    images = {f"{i}.JPG": jpeg(seed=i) for i in range(COUNT)}
    for mark, separator in (("tab", "\t"), ("semicolon", ";")):
        lines = [HEADER, *(f"{i}.JPG,{row}" for i, row in enumerate(rows))]
        table = "\n".join(lines).replace(",", separator)
        path = write(tmp_path / mark, {"landmarks.csv": table, **images})
        with tarfile.open(tmp_path / f"{mark}.tar", "w") as tar:
            tar.add(path, ".")
        assert len(open_faces(path)) == len(open_faces(tmp_path / f"{mark}.tar")) == COUNT
