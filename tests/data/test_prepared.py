"""Prepared faces read back: the crops, views, copies in other processes, damage."""

import copy
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from data.test_faces import NUMBERS, folder
from data.test_preparation import edit, pixels, quiet, unfinish
from torch.utils.data import DataLoader

from idloss.data import DataError, SyntheticFaces, align_all, open_prepared, open_training
from idloss.geometry import get_template

EVERYTHING = torch.arange(24)


@pytest.fixture(scope="module")
def drawn():
    return SyntheticFaces(6, 4).render(progress=False)


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    """The drawn faces, prepared."""
    return quiet(drawn, tmp_path_factory.mktemp("prepared") / "faces").faces.folder


@pytest.fixture
def own(made, tmp_path):
    """A prepared folder to damage."""
    return shutil.copytree(made, tmp_path / "own")


def test_everything_comes_back(made, drawn, seeded):
    faces = open_prepared(made)
    assert faces.names == drawn.names
    assert faces.crop == "sphereface"
    assert faces.landmarks.shape == (24, 5, 2)
    assert faces.landmarks[3].tolist() == [list(p) for p in get_template("sphereface").points]
    crop, label = faces[23]
    assert torch.equal(crop, drawn.crops[23])
    assert label == 5
    wide = faces.crops_at([3, 4], "arcface")
    assert torch.equal(wide, drawn.crops_at([3, 4], "arcface"))
    for index in (
        torch.randint(24, (64,), generator=seeded),
        EVERYTHING.flip(0),
        torch.tensor([6, 7, 6, 13, 14, 0, 23]),
        torch.tensor([], dtype=torch.int64),
    ):
        assert torch.equal(faces.crops_at(index), drawn.crops[index])
        assert torch.equal(drawn.crops_at(index), drawn.crops[index])
    for places in (faces, drawn):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            places.crops_at(torch.tensor([24]))
    faces.crops_at(torch.tensor([0])).zero_()
    assert torch.equal(faces.read(0), drawn.crops[0])


def test_a_view_is_what_selecting_crops_gives(made, drawn):
    faces = open_prepared(made)
    keep = torch.tensor([21, 8, 9, 1])
    view, chosen = faces.select(keep), drawn.select(keep)
    mask = torch.tensor([True, False, True, True])
    for one, two in (
        (view, chosen),
        (view.select(mask), chosen.select(torch.tensor([0, 2, 3]))),
    ):
        assert torch.equal(pixels(one), two.crops)
        assert one.names == two.names
        assert one.identities == two.identities
        assert torch.equal(one.labels, two.labels)
    assert torch.equal(view.photo_landmarks, faces.photo_landmarks[keep])
    assert torch.equal(align_all(view, progress=False).crops, chosen.crops)


def test_content_is_that_of_the_crops(made, drawn, tmp_path):
    faces = open_prepared(made)
    assert faces.select(EVERYTHING).content == faces.content
    everything = [faces.content, faces.select(torch.arange(23)).content]
    everything.append(faces.select(EVERYTHING.flip(0)).content)
    changed = copy.deepcopy(drawn)
    changed.crops[5, 0, 0, 0] ^= 1
    everything.append(quiet(changed, tmp_path / "changed").faces.content)
    assert len(set(everything)) == 4


def test_copies_hold_no_pixels(made, drawn):
    faces = open_prepared(made)
    packed = pickle.dumps(faces)
    assert len(packed) < 8000
    for twin in (pickle.loads(packed), copy.deepcopy(faces)):
        assert torch.equal(pixels(twin), drawn.crops)
    loader = DataLoader(faces, batch_size=10, num_workers=1)
    crops, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(crops), drawn.crops)
    assert torch.equal(torch.cat(labels), drawn.labels)


def test_training_opens_prepared_faces_and_photos(made, tmp_path):
    assert open_training(made).content == open_prepared(made).content
    path = folder(tmp_path / "photos", [f"{name}.jpg,{NUMBERS},{name}" for name in "abc"])
    assert open_training(path).names == ("a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(FileNotFoundError, match=r"no prepared faces at .*idloss prepare"):
        open_prepared(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no faces known"):
        open_training(tmp_path / "empty")


def in_file(name, change):
    """A damage: the file's text, changed."""

    def damage(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


def crops(array):
    return lambda folder: np.save(folder / "crops.npy", array)


def cut(count):
    return lambda folder: os.truncate(folder / "crops.npy", count)


def cell(column, value):
    """A damage: another value in the first row of the index."""

    def change(text):
        header, row, *rows = text.splitlines()
        cells = row.split(",")
        cells[column] = value
        return "\n".join([header, ",".join(cells), *rows])

    return in_file("index.csv", change)


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + repr({"descr": "|u1", "fortran_order": False, "shape": (1 << 60, 3, 112, 96)})
    .ljust(117)
    .encode()
    + b"\n"
)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut(-1000 + 24 * 32256), r"crops\.npy: 773,144 bytes, where 24 crops belong"),
        (cut(0), r"crops\.npy: 0 bytes"),
        (lambda folder: (folder / "crops.npy").unlink(), r"crops\.npy: no bytes"),
        (lambda folder: (folder / "crops.npy").write_bytes(HUGE), r"crops\.npy: 128 bytes"),
        (crops(np.zeros((24, 3, 112, 96), np.float32)), r"holds float32 \[24, 3, 112, 96\]"),
        (crops(np.zeros((24, 3, 112, 112), np.uint8)), r"holds uint8 \[24, 3, 112, 112\]"),
        (crops(np.zeros((24, 3, 112, 96), np.uint8, order="F")), "expected uint8"),
        (crops(np.array([print], dtype=object)), r"crops\.npy: .*objects"),
        (in_file("index.csv", lambda text: text[: text.rindex("5/3")]), "not the index that"),
        (in_file("index.csv", lambda text: text.replace("3/1,", "3/9,")), "not the index that"),
        (in_file("index.csv", lambda text: text[:-20]), r"not the index that|row 24"),
        (in_file("index.csv", lambda text: '"' + "a" * 200_000), r"index\.csv: field larger"),
        (in_file("index.csv", lambda _: ""), r"index\.csv: expected the header image_id"),
        (cell(4, "ten"), r"index\.csv: unreadable numbers .*'ten'"),
        (cell(12, "24"), r"index\.csv: rows beyond the 24 crops"),
        (cell(12, "-1"), r"index\.csv: rows beyond the 24 crops"),
        (cell(12, "9" * 40), r"index\.csv: unreadable numbers"),
        (in_file("dropped.csv", lambda text: text + "a,b\n"), r"dropped\.csv: row 1 has 2 fields"),
        (lambda folder: (folder / "dropped.csv").unlink(), r"dropped\.csv: .*No such file"),
        (unfinish, r"not finished.*\n.*idloss prepare"),
        (in_file("dataset.json", lambda _: "[" * 100_000), r"dataset\.json: .*recursion"),
        (in_file("dataset.json", lambda _: "[]"), r"dataset\.json: .*format None"),
        (in_file("dataset.json", lambda text: text[:-9]), r"dataset\.json: "),
        (lambda folder: edit(folder, format=7), "prepared faces of format 7, .* reads 2"),
        (lambda folder: edit(folder, crop="arcfase"), "unknown template 'arcfase'"),
        (lambda folder: edit(folder, photos=None), r"dataset\.json: not as it was written"),
        (lambda folder: edit(folder, matches=[1]), r"dataset\.json: not as it was written"),
        (lambda folder: edit(folder, unchecked=[[1, 2, 3]]), "not as it was written"),
        (lambda folder: edit(folder, photos=10**30), r"crops\.npy: "),
    ],
)
def test_damage_is_named(own, damage, said):
    damage(own)
    with pytest.raises(DataError, match=said):
        open_prepared(own)


def test_damaged_pixels_are_found_on_demand(own):
    open_prepared(own).verify(progress=False)
    stored = np.lib.format.open_memmap(own / "crops.npy", mode="r+")
    stored[7, 0, 0, 0] ^= 1
    stored[13, 2, 111, 95] ^= 128
    stored.flush()
    with pytest.raises(DataError, match=r"2 faults:\n  1/3: damaged: .*\n  3/1: damaged: "):
        open_prepared(own).verify(progress=False)
