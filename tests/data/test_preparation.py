"""Preparing faces: what is kept and what is dropped, and every way a run can be cut short."""

import csv
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_faces import NUMBERS
from data.test_files import jpeg
from minilfw import mini_lfw

from idloss import FaceEncoder, create_fnet
from idloss.data import (
    AlignedFaces,
    DataError,
    Exclusion,
    Fault,
    FileFaces,
    align_all,
    draw_faces,
    lfw,
    open_faces,
    open_prepared,
    preparation,
    prepare,
)
from idloss.data.files import MemoryFiles
from idloss.fnets.mobilefacenet import mobilefacenet_bubbliiiing


@pytest.fixture(autouse=True)
def _many_small_steps(monkeypatch):
    """Several batches of several chunks; and processes die here, machines do not."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("idloss.data.preparation.CHUNK", 10)
    monkeypatch.setattr("idloss.data.faces.BATCH_IMAGES", 4)
    monkeypatch.setattr("idloss.data.overlap.BATCH", 5)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 photos of 6 people with landmarks."""
    return lfw(mini_lfw(tmp_path_factory.mktemp("data"))).faces


@pytest.fixture
def own_photos(photos, tmp_path):
    """The same in a place of one's own, to mend and replace."""
    return lfw(shutil.copytree(photos.files.location, tmp_path / "photos")).faces


@pytest.fixture(scope="module")
def drawn():
    return draw_faces(6, 4)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def quiet(*arguments, **options):
    return prepare(*arguments, progress=False, **options)


def lenient(*arguments, **options):
    with pytest.warns(UserWarning, match="left out"):
        return quiet(*arguments, skip_missing=True, **options)


def pixels(faces):
    return faces.crops_at(torch.arange(len(faces)))


def content(folder):
    """The bytes of every file of a prepared folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def unbroken(source, out, **options):
    """The same of a folder that was filled at a stretch."""
    return content(quiet(source, out.with_name("unbroken"), **options).faces.folder)


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def points(faces):
    """Where the photos' points were, as the index tells."""
    rows = [list(map(float, row[2:12])) for row in table(faces.folder / "index.csv")[1:]]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 5, 2)


def described(folder):
    return json.loads((folder / "dataset.json").read_text())


def edit(folder, **changes):
    """Change the record of a preparation."""
    (folder / "dataset.json").write_text(json.dumps({**described(folder), **changes}))


def unfinish(folder):
    plan = {key: value for key, value in described(folder).items() if key != "content"}
    (folder / "dataset.json").write_text(json.dumps(plan))


def nobody(drawn, rows, names):
    """Crops of people who are not known."""
    return AlignedFaces(drawn.crops[rows], tuple(names), None, (), "sphereface")


def thumbnail(images):
    """A tiny encoder: copies are at a cosine of 1, other photos below 0.995."""
    small = torch.nn.functional.avg_pool2d(images, 8).flatten(1)
    return small - small.mean(1, keepdim=True)


def shared_people(drawn, encoder=thumbnail):
    """An evaluation set that has all photos of person 2 and one of person 5."""
    chosen = drawn.select(torch.tensor([8, 9, 10, 11, 21]))
    return Exclusion("bench", replace(chosen, identities=("x", "y")), encoder, "thumbnail", 0.995)


# --- What is kept, what is dropped ---------------------------------------------------------------


def test_crops_are_those_of_align_all(photos, tmp_path, monkeypatch):
    chunks = quiet(photos, tmp_path / "chunks").faces
    parts = [photos.select(part) for part in torch.arange(24).split(10)]
    crops = torch.cat([align_all(part, progress=False).crops for part in parts])
    assert torch.equal(pixels(chunks), crops)
    monkeypatch.undo()
    faces = quiet(photos, tmp_path / "out").faces
    assert torch.equal(pixels(faces), align_all(photos, progress=False).crops)
    assert (faces.names, faces.identities) == (photos.names, photos.identities)
    assert torch.equal(faces.labels, photos.labels)
    assert torch.equal(points(faces), photos.landmarks)
    wide = quiet(photos, tmp_path / "wide", crop="arcface").faces
    assert torch.equal(pixels(wide), align_all(photos, "arcface", progress=False).crops)


def test_any_faces_will_do(drawn, tmp_path):
    source = draw_faces(2, 3)
    faces = quiet(source, tmp_path / "out").faces
    assert torch.equal(pixels(faces), source.crops)
    assert torch.equal(points(faces), source.landmarks)
    again = quiet(faces, tmp_path / "again").faces
    assert torch.equal(pixels(again), pixels(faces))
    faces = quiet(nobody(drawn, slice(24), drawn.names), tmp_path / "nobody").faces
    assert (faces.labels, faces.identities, faces[3][1]) == (None, (), -1)
    labels = torch.tensor([1, -1, 0])
    some = AlignedFaces(drawn.crops[:3], drawn.names[:3], labels, ("b", "a"), "sphereface")
    faces = quiet(some, tmp_path / "some").faces
    assert (faces.identities, faces.labels.tolist()) == (("a", "b"), [0, -1, 1])


def test_the_record_of_a_preparation_and_a_tar_read_in_place(photos, out, tmp_path):
    report, dataset = quiet(photos, out), described(out)
    assert (dataset["crop"], dataset["size"]) == ("sphereface", [112, 96])
    assert (dataset["faces"], dataset["identities"], dataset["labelled"]) == (24, 6, True)
    assert dataset["software"]["torch"] == metadata.version("torch")
    assert report.dropped == dataset["dropped"] == {}
    names = "crops.npy dataset.json dropped.csv hashes.npy index.csv"
    assert sorted(content(out)) == names.split()
    assert np.load(out / "crops.npy").shape == (24, 3, 112, 96)
    rows = table(out / "index.csv")
    assert rows[0][:3] == ["image_id", "identity", "lefteye_x"]
    assert rows[1][:2] == ["Person_0/Person_0_0001.jpg", "Person_0"]
    assert [float(cell) for cell in rows[24][2:12]] == photos.landmarks[23].flatten().tolist()
    for file in content(out).values():
        assert str(tmp_path).encode() not in file
    root = mini_lfw(tmp_path / "data")
    with tarfile.open(tmp_path / "lfw.tar", "w") as archive:
        archive.add(root / "lfw", "lfw")
    shutil.copy(root / "lfw_landmarks.csv", tmp_path)
    packed = quiet(lfw(tmp_path / "lfw.tar").faces, tmp_path / "packed")
    assert packed.faces.content == report.faces.content
    assert described(tmp_path / "packed")["source"] == "lfw.tar"


def test_what_cannot_be_aligned_is_named_and_dropped_on_demand(photos, out):
    landmarks = photos.landmarks.clone()
    landmarks[2] += 4000
    landmarks[13] = torch.nan
    bad = replace(photos, landmarks=landmarks)
    with pytest.raises(DataError, match=r"Person_0_0003\.jpg: the landmarks lie outside"):
        quiet(bad, out)
    with pytest.raises(DataError, match="not finished"):
        open_prepared(out)
    report = lenient(bad, out)
    assert report.dropped == {"could not be read or aligned": 2}
    assert len(report.faces) == 22
    names = [row[0] for row in table(out / "dropped.csv")]
    assert names == ["name", photos.names[2], photos.names[13]]
    assert [fault.where for fault in report.faces.skipped] == names[1:]
    places = torch.tensor([photos.names.index(name) for name in report.faces.names])
    assert not {2, 13} & set(places.tolist())
    whole = align_all(photos, progress=False).crops[places]
    assert (pixels(report.faces).int() - whole.int()).abs().max() <= 1
    # what the reader left out is told too
    fault = Fault("rows.csv:7", "no such photo")
    told = quiet(replace(photos, skipped=(fault,)), out.with_name("told"))
    assert told.dropped == {"left out when the source was read": 1}
    assert told.faces.skipped[0] == (
        fault.where,
        f"left out when the source was read: {fault.what}",
    )
    # and it does not pass for what a strict run would have made
    with pytest.raises(DataError, match=r"(?s)2 faults.*0003\.jpg.*by skip_missing=True"):
        quiet(bad, out)
    assert quiet(bad, out, skip_missing=True).dropped == report.dropped


def test_equal_crops_are_counted_and_names_may_hold_anything(drawn, out, tmp_path):
    names = (" a", 'b,\n"c"', "d\udcff", "日本", "\x1b[2J", "../../e", "")
    report = quiet(nobody(drawn, [0, 1, 2, 3, 3, 3, 7], names), out)
    assert (report.duplicates, len(report.faces), report.dropped) == (2, 7, {})
    assert report.faces.names == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def listing(folder, rows):
    path = folder / "clean.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("header", ["", "path", "image_id"])
@pytest.mark.parametrize("separator", [None, ",", " ", "\t"])
def test_clean_list_of_names_and_of_landmarks(photos, out, tmp_path, header, separator):
    """Landmarks in the list replace those of the photos."""
    moved = photos.landmarks + torch.tensor([1.5, -2.0]) * (separator is not None)
    rows = [[header, *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]] if header else []
    for name, five in reversed(list(zip(photos.names, moved, strict=True))[4:9]):
        rows.append([name, *map(str, five.flatten().tolist())])
    lines = [row[0] if separator is None else separator.join(row) for row in rows]
    source = photos if separator is None else replace(photos, landmarks=None)
    report = quiet(source, out, clean_list=listing(tmp_path, lines))
    assert report.faces.names == photos.names[4:9]
    assert torch.equal(points(report.faces), moved[4:9])
    aligned = align_all(replace(photos, landmarks=moved).select(torch.arange(4, 9)), progress=False)
    assert torch.equal(pixels(report.faces), aligned.crops)
    assert report.dropped == {"not in the clean list": 19}
    assert table(out / "dropped.csv")[1] == [photos.names[0], "not in the clean list"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("none.jpg", r"clean\.csv:2: none\.jpg is not in the source"),
        ("none.jpg," + ",".join("1234567890"), r"clean\.csv:2: none\.jpg is not in the source"),
        ("NAME," + ",".join("123456789") + ",ten", r"clean\.csv:2: .*'ten'"),
        ("NAME," + ",".join("123456789") + ",nan", r"clean\.csv:2: .*ten finite coordinates"),
    ],
)
def test_faults_of_the_clean_list_are_named(photos, out, tmp_path, row, said):
    first, second, third = photos.names[:3]
    numbers = ",".join(map(str, photos.landmarks[0].flatten().tolist()))
    end = f",{numbers}" if "," in row else ""
    clean = listing(tmp_path, [first + end, row.replace("NAME", second), third + end])
    with pytest.raises(DataError, match=said):
        quiet(photos, out, clean_list=clean)
    assert not out.exists()
    report = lenient(photos, out, clean_list=clean)
    assert report.faces.names == (first, third)
    absent = report.dropped.get("in the clean list, but not in the source", 0)
    assert absent == ("none" in row)


# --- The overlap ---------------------------------------------------------------------------------


def test_people_of_the_evaluation_set_are_removed_and_listed(drawn, out, tmp_path):
    report = quiet(drawn, out, exclude=shared_people(drawn))
    gone = [*drawn.names[8:12], drawn.names[21]]
    assert report.dropped == {"also in bench": 5}
    left = [name for name in drawn.names if name not in gone]
    assert list(report.faces.names) == left
    assert report.faces.identities == ("0", "1", "3", "4", "5")
    places = torch.tensor([drawn.names.index(name) for name in left])
    assert torch.equal(pixels(report.faces), drawn.crops[places])
    assert report.faces.content == quiet(drawn, tmp_path / "all").faces.select(places).content
    # no pixel of them is left
    assert not np.load(out / "crops.npy")[[8, 9, 10, 11, 21]].any()
    found = {(match.identity, match.photo, match.other) for match in report.matches}
    assert found == {("2", None, "x"), ("5", "5/1", "y")}  # equal but for the last digit
    assert len(report.matches) == 2
    dropped = table(out / "dropped.csv")[1:]
    assert [row[0] for row in dropped] == gone
    assert dropped[0][1] == "also in bench: 2 is x there, cosine 1.00"
    others = draw_faces(3, 2, seed=9, first_identity=50)
    none = Exclusion("bench", others, thumbnail, "thumbnail", 0.999)
    report = quiet(drawn, tmp_path / "none", exclude=none)
    assert (report.matches, len(report.faces)) == ((), 24)
    assert described(tmp_path / "none")["matches"] == []


def test_who_could_not_be_looked_for_is_told(drawn, photos, out):
    """Else a person who is to be excluded stays in the training data without a word."""
    landmarks = photos.landmarks.clone()
    landmarks[2] = torch.nan
    exclude = Exclusion("lfw", replace(photos, landmarks=landmarks), thumbnail, "thumbnail", 0.999)
    with pytest.raises(DataError, match=r"Person_0_0003"):
        quiet(drawn, out, exclude=exclude)
    report = lenient(drawn, out, exclude=exclude)
    assert "Person_0_0003" in report.unchecked[0].where
    again = quiet(drawn, out, exclude=exclude, skip_missing=True)
    assert again.unchecked == report.unchecked
    with pytest.raises(DataError, match=r"(?s)Person_0_0003.*by skip_missing=True"):
        quiet(drawn, out, exclude=exclude)


def test_what_would_fail_after_the_work_is_refused_before_it(drawn, photos, out, tmp_path):
    clean = listing(tmp_path, [f"0/{i},{NUMBERS}" for i in range(4)])
    blind = replace(photos, landmarks=None)
    encoder = FaceEncoder(create_fnet("mobilefacenet"), crop="sphereface")
    order = photos.landmarks[..., [1, 0]].flatten(1).tolist()
    rows = [
        f"{name},{','.join(map(str, five))}" for name, five in zip(photos.names, order, strict=True)
    ]
    (tmp_path / "other").mkdir()
    other = listing(tmp_path / "other", rows)
    nowhere = Exclusion("lfw", blind, thumbnail, "thumbnail")
    wrong = {"crop": "arcface", "exclude": shared_people(drawn, encoder)}
    for source, options, said in (
        (nobody(drawn, slice(24), drawn.names), {"exclude": nowhere}, "identity of every face"),
        (drawn, {"exclude": nowhere}, "lfw: there are no landmarks"),
        (blind, {}, "there are no landmarks to align the photos by"),
        (drawn, {"clean_list": clean}, "points of photos, and the faces are sphereface crops"),
        (photos, {"clean_list": other}, "no landmarks in the expected order"),
        (drawn, wrong, "takes 'sphereface' crops and these are to be 'arcface'"),
        (FileFaces(MemoryFiles("memory", {}), (), ()), {}, "no faces to prepare"),
    ):
        with pytest.raises(ValueError, match=said):
            quiet(source, out, **options)
    assert not out.exists()


def test_real_people_are_found(shared, out):
    everyone = lfw(shared("data/lfw.tar")).faces
    weights = shared("weights/arcface_mobilefacenet.pth")
    released = torch.load(weights, map_location="cpu", weights_only=True)
    fnet = create_fnet("mobilefacenet")
    fnet.load_state_dict(mobilefacenet_bubbliiiing(released))
    counts = everyone.labels.bincount()
    people = (counts == 6).nonzero().flatten()[:6].tolist()
    places = [(everyone.labels == person).nonzero().flatten() for person in people]
    training = everyone.select(torch.cat([own[:4] for own in places]))
    evaluation = everyone.select(torch.cat([own[4:] for own in places[:2]]))
    exclude = Exclusion("lfw", evaluation, FaceEncoder(fnet, crop="sphereface"), "mobilefacenet")
    report = quiet(training, out, exclude=exclude)
    shared_names = [everyone.identities[person] for person in people[:2]]
    assert sorted(m.identity for m in report.matches if m.photo is None) == sorted(shared_names)
    assert not set(report.faces.identities) & set(shared_names)
    assert (len(report.faces), len(report.faces.identities)) == (16, 4)


def test_real_photos(shared, out, monkeypatch):
    monkeypatch.undo()
    source = open_faces(shared("data/celeba_wild.tar")).select(torch.arange(0, 5524, 120))
    faces = quiet(source, out).faces
    assert torch.equal(pixels(faces), align_all(source, progress=False).crops)


# --- Runs that are cut short ---------------------------------------------------------------------


class KilledError(BaseException):
    """What no code under test catches."""


@contextmanager
def killed_at(step, monkeypatch, *, before):
    """Stop at the step-th file or batch, just before or just after it is where it belongs."""
    steps = itertools.count()

    def mortal(own):
        def call(*arguments):
            now = next(steps) == step
            if now and before:
                raise KilledError
            result = own(*arguments)
            if now:
                raise KilledError
            return result

        return call

    align = preparation._Filling._align_batch
    with monkeypatch.context() as patch, suppress(KilledError):
        patch.setattr(Path, "replace", mortal(Path.replace))
        patch.setattr(preparation._Filling, "_align_batch", mortal(align))
        yield mortal(thumbnail)


@pytest.mark.parametrize("before", [True, False])
def test_a_run_stopped_at_any_step_goes_on(drawn, out, tmp_path, monkeypatch, before):
    exclude = shared_people(drawn)
    whole = unbroken(drawn, out, exclude=exclude)
    # one face and a probe, the plan, batches of 4 in chunks of 10, twice a probe and those of 5 to
    # embed, and three files at the end
    last = 2 + 1 + (3 + 3 + 1) + 1 + (1 + 1 + 5) + 3
    for step in range(last + 1):
        place, finished = tmp_path / str(step), False
        with killed_at(step, monkeypatch, before=before) as encoder:
            quiet(drawn, place, exclude=replace(exclude, encoder=encoder), threads=1)
            finished = True
        assert finished == (step == last)
        quiet(drawn, place, exclude=exclude)
        assert content(place) == whole, step
    for step in range(last + 1):  # again and again
        with killed_at(step, monkeypatch, before=before) as encoder:
            quiet(drawn, out, exclude=replace(exclude, encoder=encoder), threads=1)
    assert content(out) == whole


DYING = """
import os, signal, sys
import idloss.data.faces, idloss.data.preparation
from idloss.data import lfw, prepare
idloss.data.preparation.CHUNK, idloss.data.faces.BATCH_IMAGES = 10, 4
align = idloss.data.preparation._Filling._align_batch
def last(self, batch):
    if 18 in batch:
        os.kill(os.getpid(), signal.SIGKILL)
    return align(self, batch)
idloss.data.preparation._Filling._align_batch = last
prepare(lfw(sys.argv[1]).faces, sys.argv[2], threads=1, progress=False)
"""


def test_a_killed_process_leaves_what_it_finished(photos, out, monkeypatch):
    words = [sys.executable, "-c", DYING, photos.files.location, str(out)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    finished = int(np.load(out / "hashes.npy").any(1).sum())
    assert finished >= 10
    with pytest.raises(DataError, match="not finished"):
        open_prepared(out)
    (out / ".dataset.json.1234.tmp").write_bytes(b"half a table")
    seen = []
    read = FileFaces.read
    monkeypatch.setattr(FileFaces, "read", lambda self, i: (seen.append(i), read(self, i))[1])
    quiet(photos, out)
    assert 24 - finished <= len(seen) <= 14
    assert content(out) == unbroken(photos, out)


def test_the_search_goes_on_where_it_was_stopped(drawn, out):
    """Embedding is the longest part; and what another network embedded is no help."""
    seen = []

    def encoder(images, gain=1.0):
        seen.append(len(images))
        if sum(seen) == 2 + (1 + 5) + (1 + 15):
            raise KilledError
        return thumbnail(images) * torch.linspace(gain, 1, 504)

    exclude = shared_people(drawn, encoder)
    with pytest.raises(KilledError):
        quiet(drawn, out, exclude=exclude)
    seen.clear()
    quiet(drawn, out, exclude=exclude)
    assert sum(seen) == 2 + 1 + (1 + 24 - 10)
    stopped = replace(exclude, encoder=lambda images: encoder(images, gain=5.0))
    with pytest.raises(DataError, match="prepared otherwise: overlap_probe was"):
        quiet(drawn, out, exclude=stopped)


@pytest.mark.parametrize("lost", ["crops.npy", "hashes.npy", "half", "zeros", "photo"])
def test_what_a_run_lost_is_made_anew(own_photos, out, monkeypatch, lost):
    """After a power cut a file may lack what was written last; and photos may be replaced."""
    with killed_at(8, monkeypatch, before=True):
        quiet(own_photos, out)
    assert "content" not in described(out)
    if lost.endswith("npy"):
        (out / lost).unlink()
    elif lost == "photo":
        first, last = (Path(own_photos.files.where(own_photos.members[i])) for i in (0, 23))
        first.write_bytes(last.read_bytes())
    else:
        whole = (out / "crops.npy").read_bytes()
        end = b"" if lost == "half" else bytes(len(whole) // 2)
        (out / "crops.npy").write_bytes(whole[: len(whole) - len(whole) // 2] + end)
    quiet(own_photos, out)
    assert content(out) == unbroken(own_photos, out)


# --- Other photos, other plans, other people's files ---------------------------------------------


def test_replaced_photos_are_told_from_those_prepared(own_photos, out, tmp_path, monkeypatch):
    place = Path(own_photos.files.where(own_photos.members[7]))
    photo, told = place.read_bytes(), r"Person_1_0004\.jpg: is not the photo that was prepared"
    whole = unbroken(own_photos, out)
    place.write_bytes(photo[:500])
    with pytest.raises(DataError, match=r"Person_1_0004\.jpg: unreadable"):
        quiet(own_photos, out)
    lenient(own_photos, tmp_path / "lenient")
    place.write_bytes(photo)
    quiet(own_photos, out)
    assert content(out) == whole
    with pytest.raises(DataError, match=told):
        quiet(own_photos, tmp_path / "lenient", skip_missing=True)
    place.write_bytes(jpeg())
    with pytest.raises(DataError, match=told):
        quiet(own_photos, out)
    place.write_bytes(photo)  # all is done, perhaps on a disk to be read only
    monkeypatch.setattr(FileFaces, "read", None)
    monkeypatch.setattr("idloss.data.preparation.WeakFileLock", None)
    assert content(quiet(own_photos, out).faces.folder) == whole


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(photos, drawn, out, finished):
    quiet(photos, out)
    edit(out, software={**described(out)["software"], "torch": "1.0"})
    if not finished:
        unfinish(out)
    fewer = photos.select(torch.arange(20))
    moved = replace(photos, landmarks=photos.landmarks + 1.0)
    for source, options, said in (
        (photos, {"crop": "arcface"}, "crop was sphereface, now it is arcface; size was"),
        (fewer, {}, "photos was 24, now it is 20; names was"),
        (moved, {}, r"landmarks was \w+, now it is \w+"),
        (photos, {"exclude": shared_people(drawn)}, "overlap was None, now it is bench"),
    ):
        with pytest.raises(DataError, match=f"was prepared otherwise: {said}"):
            quiet(source, out, **options)
    if finished:  # by other software, whose crops are as good
        quiet(photos, out)
        return
    with pytest.raises(DataError, match=r"software was \{.*'torch': '1\.0'"):
        quiet(photos, out)


def test_other_peoples_files_are_left_alone(photos, out, tmp_path):
    elsewhere = tmp_path / "elsewhere.npy"
    out.mkdir()
    (out / "a.jpg").write_bytes(b"photo")
    with pytest.raises(DataError, match=r"holds other files, and no dataset\.json"):
        quiet(photos, out)
    assert list(content(out)) == ["a.jpg"]
    (out / "a.jpg").unlink()
    elsewhere.write_bytes(b"somebody's")
    (out / "crops.npy").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"crops\.npy: is a link"):
        quiet(photos, out)
    assert elsewhere.read_bytes() == b"somebody's"
    with pytest.raises(DataError, match=r"(?s)Not a directory.*name another folder to fill"):
        quiet(photos, elsewhere / "out")


@contextmanager
def no_file_beyond(count):
    """The system refuses a file beyond a size as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_kills_nobody_and_loses_nothing(photos, out, monkeypatch):
    small = shutil.disk_usage(out.parent)._replace(free=500_000)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: small)
        with pytest.raises(DataError, match=r"0\.0 GB are needed for 24 faces, 0\.0 GB are free"):
            quiet(photos, out)
    with no_file_beyond(100_000), pytest.raises(DataError, match="File too large"):
        quiet(photos, out)  # before the work
    write = preparation.write_table

    def full(*arguments):
        with no_file_beyond(100):
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_table", full)
        with pytest.raises(DataError) as caught:
            quiet(photos, out)  # after all of it
    assert "cannot be written to: File too large" in str(caught.value)
    assert "What is aligned stays. Make room" in str(caught.value)
    assert "name another folder to fill" in str(caught.value)
    assert not list(out.glob(".*.tmp"))
    with monkeypatch.context() as patch:
        patch.setattr(FileFaces, "read", None)
        quiet(photos, out)
    assert content(out) == unbroken(photos, out)
