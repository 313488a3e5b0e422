"""Preparing faces: what is kept and what is dropped, and every way a run can be cut short."""

import csv
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from minilfw import mini_lfw

from idloss import FaceEncoder, adapters, create_fnet
from idloss.data import (
    AlignedFaces,
    DataError,
    Exclusion,
    FileFaces,
    SyntheticFaces,
    align_all,
    lfw,
    open_faces,
    open_packed,
    prepare,
    read_report,
)
from idloss.data import filling as filling_module
from idloss.data.files import MemoryFiles
from idloss.weights import files as files_module


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Processes die here, machines do not."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 photos of 6 people with landmarks."""
    return lfw(mini_lfw(tmp_path_factory.mktemp("data"))).faces


@pytest.fixture(scope="module")
def drawn():
    return SyntheticFaces(6, 4).render(progress=False)


def quiet(*arguments, **options):
    return prepare(*arguments, progress=False, **options)


def content(folder):
    """The bytes of every file of a prepared folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def thumbnail(images):
    """A tiny encoder: copies are at a cosine of 1, other photos below 0.995."""
    small = torch.nn.functional.avg_pool2d(images, 8).flatten(1)
    return small - small.mean(1, keepdim=True)


def shared_people(drawn):
    """An evaluation set that has all photos of person 2 and one of person 5."""
    rows = torch.tensor([8, 9, 10, 11, 21])
    chosen = drawn.select(rows)
    return Exclusion("bench", replace(chosen, identities=("x", "y")), thumbnail, "thumbnail", 0.995)


def test_crops_are_those_of_align_all(photos, tmp_path):
    faces = quiet(photos, tmp_path / "out", shard_faces=10).faces
    parts = [photos.select(part) for part in torch.arange(24).split(10)]
    crops = torch.cat([align_all(part, progress=False).crops for part in parts])
    assert torch.equal(faces.load(progress=False).crops, crops)
    assert faces.names == photos.names
    assert faces.identities == photos.identities
    assert torch.equal(faces.labels, photos.labels)
    assert torch.equal(faces.photo_landmarks, photos.landmarks)
    wide = quiet(photos, tmp_path / "wide", crop="arcface").faces
    assert torch.equal(
        wide.load(progress=False).crops, align_all(photos, "arcface", progress=False).crops
    )


def test_any_face_source_will_do(tmp_path):
    source = SyntheticFaces(2, 3)
    faces = quiet(source, tmp_path / "out", shard_faces=4).faces
    assert torch.equal(faces.load(progress=False).crops, source.render(progress=False).crops)
    assert torch.equal(faces.photo_landmarks, source.landmarks)


def test_a_tar_is_read_in_place(photos, tmp_path):
    root = mini_lfw(tmp_path / "data")
    with tarfile.open(tmp_path / "lfw.tar", "w") as archive:
        archive.add(root / "lfw", "lfw")
    shutil.copy(root / "lfw_landmarks.csv", tmp_path)
    report = quiet(lfw(tmp_path / "lfw.tar").faces, tmp_path / "out")
    assert report.faces.content == quiet(photos, tmp_path / "other").faces.content
    assert json.loads((tmp_path / "out/dataset.json").read_text())["source"] == "lfw.tar"


def test_the_record_of_a_preparation(photos, tmp_path):
    report = quiet(photos, tmp_path / "out", shard_faces=10)
    dataset = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (dataset["template"], dataset["size"]) == ("sphereface", [112, 96])
    assert (dataset["faces"], dataset["identities"], dataset["labelled"]) == (24, 6, True)
    assert [shard["faces"] for shard in dataset["shards"]] == [10, 10, 4]
    for shard in dataset["shards"]:
        assert files_module.file_sha256(tmp_path / "out" / shard["file"]) == shard["sha256"]
    assert dataset["software"]["torch"] == metadata.version("torch")
    assert report.dropped == dataset["dropped"] == {}
    rows = table(tmp_path / "out/index.csv")
    assert rows[0][:3] == ["image_id", "identity", "lefteye_x"]
    assert rows[0][-1] == "hash"
    assert rows[1][:2] == ["Person_0/Person_0_0001.jpg", "Person_0"]
    assert [float(cell) for cell in rows[24][2:12]] == photos.landmarks[23].flatten().tolist()
    for file in content(tmp_path / "out").values():
        assert str(tmp_path).encode() not in file


def test_what_cannot_be_aligned_is_named_and_dropped_on_demand(photos, tmp_path):
    landmarks = photos.landmarks.clone()
    landmarks[2] += 4000
    landmarks[13] = torch.nan
    bad = replace(photos, landmarks=landmarks)
    with pytest.raises(DataError, match=r"Person_0_0003\.jpg: the landmarks lie outside"):
        quiet(bad, tmp_path / "out", shard_faces=10)
    with pytest.raises(DataError, match="not finished"):
        open_packed(tmp_path / "out")
    with pytest.warns(UserWarning, match="left out"):
        report = quiet(bad, tmp_path / "out", shard_faces=10, skip_missing=True)
    assert report.dropped == {"could not be read or aligned": 2}
    assert len(report.faces) == 22
    assert photos.names[13] not in report.faces.names
    names = [row[0] for row in table(tmp_path / "out/dropped.csv")]
    assert names == ["name", photos.names[2], photos.names[13]]
    assert [fault.where for fault in report.faces.skipped] == names[1:]
    whole = align_all(photos, progress=False).crops
    places = torch.tensor([photos.names.index(name) for name in report.faces.names])
    difference = report.faces.load(progress=False).crops.int() - whole[places].int()
    assert difference.abs().max() <= 1


def test_what_the_reader_left_out_is_told_too(tmp_path):
    root = mini_lfw(tmp_path / "data", people=2)
    rows = (root / "lfw_landmarks.csv").read_text().splitlines()
    (root / "lfw_landmarks.csv").write_text("\n".join(rows[1:]))
    (root / "pairs.txt").unlink()
    with pytest.warns(UserWarning, match="left out"):
        source = lfw(root, skip_missing=True).faces
    report = quiet(source, tmp_path / "out")
    assert report.dropped == {"left out when the source was read": 1}
    assert "no points of Person_0/Person_0_0001.jpg" in report.faces.skipped[0].what


def test_equal_crops_are_counted_and_kept(drawn, tmp_path):
    rows = torch.tensor([0, 1, 2, 3, 3, 3, 7])
    twins = AlignedFaces(drawn.crops[rows], tuple("abcdefg"), None, (), "sphereface")
    report = quiet(twins, tmp_path / "out", shard_faces=4)
    assert report.duplicates == 2
    assert len(report.faces) == 7
    assert report.dropped == {}


# --- The clean list ------------------------------------------------------------------------------


def listing(folder, rows):
    path = folder / "clean.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("header", [[], ["path"], ["image_id"]])
def test_clean_list_of_names(photos, tmp_path, header):
    clean = listing(tmp_path, [*header, *reversed(photos.names[3:20])])
    report = quiet(photos, tmp_path / "out", clean_list=clean)
    assert report.faces.names == photos.names[3:20]
    assert torch.equal(report.faces.photo_landmarks, photos.landmarks[3:20])
    assert report.dropped == {"not in the clean list": 7}
    assert table(tmp_path / "out/dropped.csv")[1][:2] == [photos.names[0], "not in the clean list"]


@pytest.mark.parametrize("separator", [",", " ", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_landmarks_of_the_clean_list_replace_the_others(photos, tmp_path, separator, header):
    points = photos.landmarks + torch.tensor([1.5, -2.0])
    columns = ["photo", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]
    rows = [columns] if header else []
    for name, five in zip(photos.names[4:9], points[4:9], strict=True):
        rows.append([name, *map(str, five.flatten().tolist())])
    clean = listing(tmp_path, map(separator.join, rows))
    blind = replace(photos, landmarks=None)
    report = quiet(blind, tmp_path / "out", clean_list=clean)
    assert torch.equal(report.faces.photo_landmarks, points[4:9])
    moved = replace(photos, landmarks=points).select(torch.arange(4, 9))
    crops = align_all(moved, progress=False).crops
    assert torch.equal(report.faces.load(progress=False).crops, crops)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("none.jpg", r"clean\.csv:2: none\.jpg is not in the source"),
        ("none.jpg," + ",".join("1234567890"), r"clean\.csv:2: none\.jpg is not in the source"),
        ("NAME," + ",".join("123456789") + ",ten", r"clean\.csv:2: .*'ten'"),
        ("NAME," + ",".join("123456789") + ",nan", r"clean\.csv:2: .*ten finite coordinates"),
    ],
)
def test_faults_of_the_clean_list_are_named(photos, tmp_path, row, said):
    first, second, third = photos.names[:3]
    numbers = ",".join(map(str, photos.landmarks[0].flatten().tolist()))
    end = f",{numbers}" if "," in row else ""
    clean = listing(tmp_path, [first + end, row.replace("NAME", second), third + end])
    with pytest.raises(DataError, match=said):
        quiet(photos, tmp_path / "out", clean_list=clean)
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="left out"):
        report = quiet(photos, tmp_path / "out", clean_list=clean, skip_missing=True)
    assert report.faces.names == (first, third)
    absent = report.dropped.get("in the clean list, but not in the source", 0)
    assert absent == ("none" in row)


# --- The overlap ---------------------------------------------------------------------------------


def test_people_of_the_evaluation_set_are_removed_and_listed(drawn, tmp_path):
    before = quiet(drawn, tmp_path / "before", shard_faces=5).faces
    report = quiet(drawn, tmp_path / "out", shard_faces=5, exclude=shared_people(drawn))
    gone = [*drawn.names[8:12], drawn.names[21]]
    assert report.dropped == {"also in bench": 5}
    left = [name for name in drawn.names if name not in gone]
    assert list(report.faces.names) == left
    assert report.faces.identities == ("0", "1", "3", "4", "5")
    places = torch.tensor([drawn.names.index(name) for name in left])
    assert torch.equal(report.faces.load(progress=False).crops, drawn.crops[places])
    assert report.faces.content == before.select(places).content
    report.faces.verify(progress=False)
    # no pixel of them is left
    assert sum(report.faces.shards.counts.values()) == 19
    rows = table(tmp_path / "out/overlap.csv")
    assert rows[0] == ["identity", "photo", "other", "cosine"]
    assert [row[:3] for row in rows[1:]] == [["2", "", "x"], ["5", "5/1", "y"]]
    assert [(m.identity, m.photo, m.other) for m in report.matches] == [
        ("2", None, "x"),
        ("5", "5/1", "y"),
    ]
    dropped = table(tmp_path / "out/dropped.csv")[1:]
    assert [row[0] for row in dropped] == gone
    assert dropped[0][2] == "2 is x there, cosine 1.00"


def test_a_shard_may_lose_all_its_faces(drawn, tmp_path):
    report = quiet(drawn, tmp_path / "out", shard_faces=4, exclude=shared_people(drawn))
    assert list(report.faces.shards.counts.values()) == [4, 4, 0, 4, 4, 3]
    report.faces.verify(progress=False)


def test_no_overlap_is_recorded_as_such(drawn, tmp_path):
    others = SyntheticFaces(3, 2, seed=9, first_identity=50).render(progress=False)
    report = quiet(
        drawn, tmp_path / "out", exclude=Exclusion("bench", others, thumbnail, "thumbnail", 0.999)
    )
    assert report.matches == ()
    assert len(report.faces) == 24
    assert len(table(tmp_path / "out/overlap.csv")) == 1


def test_the_overlap_needs_identities_and_landmarks(drawn, photos, tmp_path):
    nobody = AlignedFaces(drawn.crops, drawn.names, None, (), "sphereface")
    with pytest.raises(DataError, match="identity of every face"):
        quiet(nobody, tmp_path / "out", exclude=shared_people(drawn))
    blind = replace(photos, landmarks=None)
    with pytest.raises(DataError, match=r"lfw: there are no landmarks"):
        quiet(drawn, tmp_path / "out", exclude=Exclusion("lfw", blind, thumbnail, "thumbnail"))
    with pytest.raises(DataError, match=r"there are no landmarks to align the photos by"):
        quiet(blind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_people_are_found(shared, tmp_path):
    everyone = lfw(shared("data/lfw.tar")).faces
    weights = shared("weights/arcface_mobilefacenet.pth")
    released = torch.load(weights, map_location="cpu", weights_only=True)
    fnet = create_fnet("mobilefacenet")
    fnet.load_state_dict(adapters.mobilefacenet_bubbliiiing(released))
    counts = everyone.labels.bincount()
    people = (counts == 6).nonzero().flatten()[:6].tolist()
    places = [(everyone.labels == person).nonzero().flatten() for person in people]
    training = everyone.select(torch.cat([own[:4] for own in places]))
    evaluation = everyone.select(torch.cat([own[4:] for own in places[:2]]))
    exclude = Exclusion("lfw", evaluation, FaceEncoder(fnet, crop="sphereface"), "mobilefacenet")
    report = quiet(training, tmp_path / "out", shard_faces=10, exclude=exclude)
    shared_names = [everyone.identities[person] for person in people[:2]]
    assert sorted(m.identity for m in report.matches if m.photo is None) == sorted(shared_names)
    assert not set(report.faces.identities) & set(shared_names)
    assert len(report.faces) == 16
    assert len(report.faces.identities) == 4


def test_real_photos(shared, tmp_path):
    source = open_faces(shared("data/celeba_wild.tar")).select(torch.arange(0, 5524, 120))
    faces = quiet(source, tmp_path / "out", shard_faces=25).faces
    parts = [source.select(part) for part in torch.arange(len(source)).split(25)]
    crops = torch.cat([align_all(part, progress=False).crops for part in parts])
    assert torch.equal(faces.load(progress=False).crops, crops)


# --- Runs that are cut short ---------------------------------------------------------------------


class KilledError(BaseException):
    """What no code under test catches."""


@contextmanager
def killed_at(step, monkeypatch, *, before):
    """Stop at the step-th file, just before or just after it takes its place."""
    steps = itertools.count()
    own = files_module.settle

    def settle(temporary, target):
        now = next(steps) == step
        if now and before:
            raise KilledError
        own(temporary, target)
        if now:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "settle", settle)
        yield


@pytest.mark.parametrize("before", [True, False])
def test_a_run_stopped_at_any_step_goes_on(drawn, tmp_path, monkeypatch, before):
    options = {"shard_faces": 12, "exclude": shared_people(drawn)}
    unbroken = content(quiet(drawn, tmp_path / "unbroken", **options).faces.folder)
    for step in itertools.count():
        out = tmp_path / str(step)
        stopped = False
        with killed_at(step, monkeypatch, before=before):
            try:
                quiet(drawn, out, **options)
            except KilledError:
                stopped = True
        if not stopped:
            break
        quiet(drawn, out, **options)
        assert content(out) == unbroken, step
    # the plan, two shards of three files, two of the overlap, two shards cut, three at the end
    assert step == 1 + 2 * 3 + 2 + 2 + 3


def test_a_run_killed_again_and_again_arrives(drawn, tmp_path, monkeypatch):
    options = {"shard_faces": 9, "exclude": shared_people(drawn)}
    unbroken = content(quiet(drawn, tmp_path / "unbroken", **options).faces.folder)
    for _ in range(30):
        with killed_at(3, monkeypatch, before=True):
            try:
                quiet(drawn, tmp_path / "out", **options)
            except KilledError:
                continue
        break
    assert content(tmp_path / "out") == unbroken


SLOW = """
import sys, time
from idloss.data import FileFaces, lfw, prepare
read = FileFaces.read
FileFaces.read = lambda self, index: (time.sleep(0.1), read(self, index))[1]
prepare(lfw(sys.argv[1]).faces, sys.argv[2], shard_faces=6, threads=1, progress=False)
"""


def test_a_killed_process_leaves_what_it_finished(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, photos.files.location, str(out)])
    try:
        while not (out / "index-00001.csv").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(DataError, match=r"not finished, 2 shards are there"):
        open_packed(out)
    (out / ".crops-00002.npy.1234.tmp").write_bytes(b"half a shard")
    made = {n: (out / f"crops-{n:05d}.npy").stat().st_ino for n in range(2)}
    seen = []
    read = FileFaces.read
    monkeypatch.setattr(FileFaces, "read", lambda self, i: (seen.append(i), read(self, i))[1])
    quiet(photos, out, shard_faces=6)
    assert sorted(seen) == list(range(12, 24))
    assert made == {n: (out / f"crops-{n:05d}.npy").stat().st_ino for n in range(2)}
    quiet(photos, tmp_path / "unbroken", shard_faces=6)
    assert content(out) == content(tmp_path / "unbroken")


def test_a_finished_folder_is_found_finished(photos, tmp_path, monkeypatch):
    first = quiet(photos, tmp_path / "out", shard_faces=10)
    monkeypatch.setattr(FileFaces, "read", None)
    again = quiet(photos, tmp_path / "out", shard_faces=10)
    assert again.faces.content == first.faces.content == read_report(tmp_path / "out").faces.content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop": "arcface"}, "template was sphereface, now it is arcface; size was"),
        ({"shard_faces": 11}, "shard_faces was 10, now it is 11"),
        ({"faces": slice(0, 20)}, "faces was 24, now it is 20; names was"),
        ({"landmarks": 1.0}, r": landmarks was \w+, now it is \w+\n"),
        ({"exclude": True}, "overlap was None, now it is bench"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(photos, drawn, tmp_path, change, said, finished):
    out = tmp_path / "out"
    quiet(photos, out, shard_faces=10)
    if not finished:
        (out / "dataset.json").unlink()
    source, options = photos, {"shard_faces": 10, **change}
    if chosen := options.pop("faces", None):
        source = source.select(torch.arange(24)[chosen])
    if shift := options.pop("landmarks", None):
        source = replace(source, landmarks=source.landmarks + shift)
    if options.get("exclude"):
        options["exclude"] = shared_people(drawn)
    with pytest.raises(DataError, match=f"was prepared otherwise.*{said}"):
        quiet(source, out, **options)


def test_other_software_may_not_finish_a_folder(photos, tmp_path):
    out = tmp_path / "out"
    quiet(photos, out)
    plan = (out / "plan.json").read_text()
    (out / "plan.json").write_text(plan.replace(metadata.version("torch"), "1.0"))
    quiet(photos, out)
    (out / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"software was \{.*'torch': '1\.0'"):
        quiet(photos, out)


def test_other_peoples_files_are_left_alone(photos, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"photo")
    with pytest.raises(DataError, match=r"holds other files, and no plan\.json"):
        quiet(photos, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.jpg"]


def test_nothing_to_prepare(photos, tmp_path):
    with pytest.raises(ValueError, match="shard_faces must be at least 1, got 0"):
        quiet(photos, tmp_path / "out", shard_faces=0)
    with pytest.raises(DataError, match="no faces to prepare"):
        quiet(FileFaces(MemoryFiles("memory", {}), (), ()), tmp_path / "out")


def test_a_small_disk_is_told_before_the_work(photos, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", ["total", "used", "free"])
    monkeypatch.setattr(
        "idloss.data.filling.shutil.disk_usage", lambda _: Usage(10**6, 0, 30_000_000)
    )
    quiet(photos, tmp_path / "out", shard_faces=10)
    monkeypatch.setattr("idloss.data.filling.shutil.disk_usage", lambda _: Usage(10**6, 0, 10**6))
    with pytest.raises(DataError, match=r"0\.0 GB are needed for 24 faces, 0\.0 GB are free"):
        quiet(photos, tmp_path / "other")


def test_a_disk_that_fills_up_leaves_the_finished_shards(photos, tmp_path, monkeypatch):
    """The system refuses a file beyond a size as it does on a full disk."""
    own = filling_module.write_shard
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_shard(path, crops):
        full = path.name == "crops-00002.npy"
        if full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            own(path, crops)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(filling_module, "write_shard", write_shard)
        with pytest.raises(DataError) as caught:
            quiet(photos, out, shard_faces=6)
    assert "cannot be written to: File too large" in str(caught.value)
    assert "2 of 4 shards are finished and stay" in str(caught.value)
    assert not list(out.glob(".*.tmp"))
    made = (out / "crops-00001.npy").stat().st_ino
    quiet(photos, out, shard_faces=6)
    assert (out / "crops-00001.npy").stat().st_ino == made
    quiet(photos, tmp_path / "unbroken", shard_faces=6)
    assert content(out) == content(tmp_path / "unbroken")


def test_a_lost_shard_is_made_anew_before_the_end(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = {"shard_faces": 6}
    unbroken = content(quiet(photos, tmp_path / "unbroken", **options).faces.folder)
    with killed_at(8, monkeypatch, before=True), pytest.raises(KilledError):
        quiet(photos, out, **options)
    (out / "crops-00001.npy").unlink()
    (out / "crops-00000.npy").write_bytes(b"cut short")
    quiet(photos, out, **options)
    assert content(out) == unbroken
