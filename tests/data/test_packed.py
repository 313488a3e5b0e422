"""Prepared faces read back: the crops, views, copies in other processes, damage."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from data.test_faces import NUMBERS, folder
from torch.utils.data import DataLoader

from idloss.data import (
    AlignedFaces,
    DataError,
    SyntheticFaces,
    embed_faces,
    open_packed,
    open_training,
    prepare,
)
from idloss.geometry import get_template


@pytest.fixture(scope="module")
def drawn():
    return SyntheticFaces(6, 4).render(progress=False)


@pytest.fixture(scope="module")
def prepared(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "faces"
    prepare(drawn, folder, shard_faces=7, progress=False)
    return folder


@pytest.fixture
def own(prepared, tmp_path):
    """A prepared folder to damage."""
    return shutil.copytree(prepared, tmp_path / "own")


def test_everything_comes_back(prepared, drawn):
    faces = open_packed(prepared)
    assert len(faces) == 24
    assert faces.names == drawn.names
    assert faces.identities == drawn.identities
    assert torch.equal(faces.labels, drawn.labels)
    assert faces.crop == "sphereface"
    assert faces.landmarks.shape == (24, 5, 2)
    assert faces.landmarks[3].tolist() == [list(p) for p in get_template("sphereface").points]
    assert torch.equal(faces.photo_landmarks, drawn.landmarks)
    assert torch.equal(faces.read(9), drawn.crops[9])
    crop, label = faces[23]
    assert torch.equal(crop, drawn.crops[23])
    assert label == 5
    files = sorted(path.name for path in prepared.iterdir() if not path.name.startswith("."))
    shards = [f"crops-{number:05d}.npy" for number in range(4)]
    assert files == [*shards, "dataset.json", "dropped.csv", "index.csv", "plan.json"]


def test_gathering_over_shards_equals_plain_indexing(prepared, drawn, seeded):
    faces = open_packed(prepared)
    assert len(faces.shards.counts) == 4
    for index in (
        torch.randint(24, (64,), generator=seeded),
        torch.arange(24).flip(0),
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


def test_a_view_is_what_selecting_crops_gives(prepared, drawn):
    faces = open_packed(prepared)
    keep = torch.tensor([21, 8, 9, 1])
    view, chosen = faces.select(keep), drawn.select(keep)
    for one, two in ((view, chosen), (view.select(torch.tensor([True, False, True, True])), None)):
        two = two or chosen.select(torch.tensor([0, 2, 3]))
        assert torch.equal(one.crops_at(torch.arange(len(one))), two.crops)
        assert one.names == two.names
        assert one.identities == two.identities
        assert torch.equal(one.labels, two.labels)
    assert torch.equal(view.photo_landmarks, faces.photo_landmarks[keep])
    assert view.hashes == tuple(faces.hashes[i] for i in keep.tolist())
    loaded = view.load(progress=False)
    assert isinstance(loaded, AlignedFaces)
    assert torch.equal(loaded.crops, chosen.crops)
    assert loaded.names == chosen.names


def test_content_is_that_of_the_crops(prepared, drawn, tmp_path):
    faces = open_packed(prepared)
    assert faces.content == json.loads((prepared / "dataset.json").read_text())["content"]
    assert faces.select(torch.arange(24)).content == faces.content
    everything = [faces.content, faces.select(torch.arange(23)).content]
    everything.append(faces.select(torch.arange(24).flip(0)).content)
    changed = copy.deepcopy(drawn)
    changed.crops[5, 0, 0, 0] ^= 1
    everything.append(prepare(changed, tmp_path / "changed", progress=False).faces.content)
    assert len(set(everything)) == 4
    # how they are cut into files is no part of it
    assert prepare(drawn, tmp_path / "whole", progress=False).faces.content == faces.content


def test_copies_hold_no_pixels(prepared, drawn):
    faces = open_packed(prepared)
    packed = pickle.dumps(faces)
    assert len(packed) < 8000
    for twin in (pickle.loads(packed), copy.deepcopy(faces)):
        assert torch.equal(twin.crops_at(torch.arange(24)), drawn.crops)
    loader = DataLoader(faces, batch_size=10, num_workers=1)
    crops, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(crops), drawn.crops)
    assert torch.equal(torch.cat(labels), drawn.labels)


def test_embeddings_are_those_of_crops_in_memory(prepared, drawn):
    def encoder(images):
        return images[:, :, ::16, ::16].flatten(1)

    here = embed_faces(drawn, encoder, progress=False)
    there = embed_faces(open_packed(prepared), encoder, batch_size=5, progress=False)
    torch.testing.assert_close(there, here)


def test_crops_go_to_the_encoder(prepared):
    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(1, device="meta"))

        def forward(self, images):
            assert images.device.type == "meta"
            return torch.ones(len(images), 4)

    assert embed_faces(open_packed(prepared), Elsewhere(), progress=False).shape == (24, 4)


def test_faces_without_identities(drawn, tmp_path):
    nobody = AlignedFaces(drawn.crops, drawn.names, None, (), "sphereface")
    faces = prepare(nobody, tmp_path / "faces", progress=False).faces
    assert faces.labels is None
    assert faces.identities == ()
    assert faces[3][1] == -1
    labels = torch.tensor([1, -1, 0])
    some = AlignedFaces(drawn.crops[:3], drawn.names[:3], labels, ("b", "a"), "sphereface")
    faces = prepare(some, tmp_path / "some", progress=False).faces
    assert faces.identities == ("a", "b")
    assert faces.labels.tolist() == [0, -1, 1]


def test_training_opens_prepared_faces_and_photos(prepared, tmp_path):
    assert open_training(prepared).content == open_packed(prepared).content
    path = folder(tmp_path / "photos", [f"{name}.jpg,{NUMBERS},{name}" for name in "abc"])
    assert open_training(path).names == ("a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(FileNotFoundError, match=r"no prepared faces at .*idloss prepare"):
        open_packed(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no faces known"):
        open_training(tmp_path / "empty")


def truncate(folder):
    path = folder / "crops-00002.npy"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder):
    (folder / "crops-00002.npy").write_bytes(b"")


def remove(folder):
    (folder / "crops-00002.npy").unlink()


def retype(folder):
    np.save(folder / "crops-00002.npy", np.zeros((7, 3, 112, 96), np.float32))


def reshape(folder):
    np.save(folder / "crops-00002.npy", np.zeros((7, 3, 112, 112), np.uint8))


def shorten(folder):
    path = folder / "index.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def rename(folder):
    path = folder / "index.csv"
    path.write_text(path.read_text().replace("3/1,", "3/9,"))


def halve(folder):
    path = folder / "index.csv"
    path.write_text(path.read_text()[:-20])


def mistype(folder):
    path = folder / "index.csv"
    header, row, *rows = path.read_text().splitlines()
    cells = row.split(",")
    cells[4] = "ten"
    path.write_text("\n".join([header, ",".join(cells), *rows]))


def unfinish(folder):
    (folder / "dataset.json").unlink()


def outdate(folder):
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"crops-00002\.npy: .*225,792 of crops and a header"),
        (empty, r"crops-00002\.npy: 0 bytes"),
        (remove, r"crops-00002\.npy: the shard is missing"),
        (retype, r"crops-00002\.npy: holds float32 \[7, 3, 112, 96\], expected uint8"),
        (reshape, r"crops-00002\.npy: holds uint8 \[7, 3, 112, 112\]"),
        (shorten, r"index\.csv: 23 rows for 24 crops in 4 shards"),
        (rename, r"index\.csv: not the index that dataset\.json was written with"),
        (halve, r"index\.csv: not the index|index\.csv: row 24"),
        (mistype, r"index\.csv: unreadable coordinates .*'ten'"),
        (unfinish, r"not finished.*\n.*idloss prepare"),
        (outdate, r"dataset\.json: prepared faces of format 7, .* reads 1"),
    ],
)
def test_damage_is_named(own, damage, said):
    damage(own)
    with pytest.raises(DataError, match=said):
        open_packed(own)


def test_damaged_pixels_are_found_on_demand(own):
    open_packed(own).verify(progress=False)
    path = own / "crops-00001.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    content[200] ^= 128
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"2 faults:\n  1/3: damaged: .*\n  3/1: damaged: "):
        open_packed(own).verify(progress=False)
