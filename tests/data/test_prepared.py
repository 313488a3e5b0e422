"""Prepared faces read back: the crops, views, copies in other processes, damage."""

import copy
import csv
import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from data.test_faces import NUMBERS, folder
from data.test_preparation import edit, pixels, quiet, unfinish
from torch.utils.data import DataLoader

from idloss.data import DataError, align_all, draw_faces, open_faces, open_prepared
from idloss.geometry import get_template

EVERYTHING = torch.arange(24)


@pytest.fixture(scope="module")
def drawn():
    return draw_faces(6, 4)


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
    for one, two in ((view, chosen), (view.select(mask), chosen.select(mask))):
        assert torch.equal(pixels(one), two.crops)
        assert (one.names, one.identities) == (two.names, two.identities)
        assert torch.equal(one.labels, two.labels)
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
    assert open_faces(made).content == open_prepared(made).content
    path = folder(tmp_path / "photos", [f"{name}.jpg,{NUMBERS},{name}" for name in "abc"])
    assert open_faces(path).names == ("a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(FileNotFoundError, match=r"no prepared faces at .*idloss prepare"):
        open_prepared(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no faces known"):
        open_faces(tmp_path / "empty")


def in_file(name, change):
    """A damage: the file's text, changed."""

    def damage(folder):
        (folder / name).write_text(change((folder / name).read_text()))

    return damage


def bytes_of(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def array(name, values):
    return lambda folder: np.save(folder / name, values)


def without(name):
    return lambda folder: (folder / name).unlink()


HEADER = {"descr": "|u1", "fortran_order": False, "shape": (1 << 60, 3, 112, 96)}
HUGE = b"\x93NUMPY\x01\x00v\x00" + repr(HEADER).ljust(117).encode() + b"\n"
CROPS = np.zeros((24, 3, 112, 96), np.uint8)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / "crops.npy", 773_144), r"crops\.npy: not as it was"),
        (bytes_of("crops.npy", b""), r"crops\.npy: not as it was written"),
        (bytes_of("crops.npy", HUGE), r"crops\.npy: not as it was written"),
        (without("crops.npy"), r"crops\.npy: .*No such file"),
        (array("crops.npy", CROPS.astype(np.float32)), r"holds float32 \[24, 3, 112, 96\]"),
        (array("crops.npy", CROPS[..., 1:]), r"crops\.npy: .*holds uint8 \[24, 3, 112, 95\]"),
        (array("crops.npy", np.asfortranarray(CROPS)), "expected uint8"),
        (array("crops.npy", np.array([print], dtype=object)), r"crops\.npy: .*objects"),
        (array("hashes.npy", np.zeros((24, 32), np.uint8)), r"hashes\.npy: not the hashes that"),
        (array("hashes.npy", np.zeros((23, 32), np.uint8)), r"hashes\.npy: .*expected uint8"),
        (in_file("index.csv", lambda text: text.replace("3/1,", "3/9,")), "not the table that"),
        (in_file("index.csv", lambda text: text.replace(",23\n", ",-1\n")), "not the table that"),
        (in_file("index.csv", lambda text: text[:-20]), r"index\.csv: .*not the table that"),
        (in_file("dropped.csv", lambda text: text + "a,b\n"), r"dropped\.csv: .*not the table"),
        (without("dropped.csv"), r"dropped\.csv: .*No such file"),
        (unfinish, r"not finished.*\n.*idloss prepare"),
        (bytes_of("dataset.json", b"[" * 100_000), r"dataset\.json: .*recursion"),
        (bytes_of("dataset.json", b"[]"), r"dataset\.json: .*format None"),
        (in_file("dataset.json", lambda text: text[:-9]), r"dataset\.json: "),
        (lambda folder: edit(folder, format=7), "prepared faces of format 7, .* reads 3"),
        (lambda folder: edit(folder, crop="arcfase"), "unknown template 'arcfase'"),
        (lambda folder: edit(folder, photos=None), r"dataset\.json: not as it was written"),
        (lambda folder: edit(folder, matches=[1]), r"dataset\.json: not as it was written"),
        (lambda folder: edit(folder, unchecked=[[1, 2, 3]]), "not as it was written"),
        (lambda folder: edit(folder, photos=10**30), r"hashes\.npy: "),
    ],
)
def test_damage_is_named(own, damage, said):
    damage(own)
    with pytest.raises(DataError, match=said):
        open_prepared(own)


@pytest.mark.parametrize(
    ("column", "value"), [(12, "ten"), (12, "24"), (12, "-99"), (12, "9" * 40), (0, "a" * 200_000)]
)
def test_a_forged_index_is_refused(own, column, value):
    """The hash that would tell is forged too."""
    rows = list(csv.reader((own / "index.csv").open(newline="")))
    rows[1][column] = value
    text = "\n".join(map(",".join, rows)).encode()
    (own / "index.csv").write_bytes(text)
    tables = json.loads((own / "dataset.json").read_text())["tables"]
    edit(own, tables={**tables, "index.csv": hashlib.sha256(text).hexdigest()})
    with pytest.raises(DataError, match=r"index\.csv: not as it was written"):
        open_prepared(own)
