"""LFW in all its layouts, its lists, and its download from a real server on loopback."""

import hashlib
import io
import shutil
import sys
import tarfile

import pytest
import torch
from data.test_faces import NUMBERS, write
from data.test_files import jpeg
from servers import Fault, FileServer

from idloss.data import DataError, lfw
from idloss.data.pairs import balanced_folds, lfw_name
from idloss.weights import NotAsPromisedError
from idloss.weights.files import Piece

COUNTS = {"Ann_Li": 3, "Bo": 2, "Cy_de_la_Cruz": 1, "Dee": 2}
IMAGES = [lfw_name(person, n + 1) for person, count in COUNTS.items() for n in range(count)]
PAIRS = """2\t2
Ann_Li\t1\t2
Bo\t1\t2
Ann_Li\t1\tBo\t1
Bo\t2\tCy_de_la_Cruz\t1
Ann_Li\t1\t3
Dee\t1\t2
Ann_Li\t2\tDee\t1
Dee\t2\tCy_de_la_Cruz\t1
"""


@pytest.fixture
def home(tmp_path):
    files = {f"lfw/{name}": jpeg(seed=i) for i, name in enumerate(IMAGES)}
    table = "".join(f"{name},{NUMBERS}\n" for name in IMAGES)
    return write(tmp_path / "data", {**files, "pairs.txt": PAIRS, "lfw_landmarks.csv": table})


def names(pairs, faces):
    return [
        (faces.names[a], faces.names[b]) for a, b in zip(pairs.first, pairs.second, strict=True)
    ]


def check(found):
    faces, pairs = found.faces, found.pairs
    assert sorted(faces.names) == sorted(IMAGES)
    assert faces.identities == tuple(sorted(COUNTS))
    assert faces.landmarks.shape == (8, 5, 2)
    assert names(pairs, faces)[2] == ("Ann_Li/Ann_Li_0001.jpg", "Bo/Bo_0001.jpg")
    assert names(pairs, faces)[4] == ("Ann_Li/Ann_Li_0001.jpg", "Ann_Li/Ann_Li_0003.jpg")
    assert pairs.same.tolist() == [True, True, False, False] * 2
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(pairs.same, faces.labels[pairs.first] == faces.labels[pairs.second])
    assert faces.read(faces.names.index("Dee/Dee_0002.jpg")).shape == (3, 110, 100)


@pytest.mark.parametrize("layout", ["root", "inner", "torchvision", "bare"])
def test_folders(home, layout):
    if layout == "torchvision":
        shutil.move(home / "lfw", home / "lfw-py/lfw")
    if layout == "bare":
        home = home.rename(home.parent / "moved") / "lfw"
    check(lfw(home / "lfw" if layout == "inner" else home))


@pytest.mark.parametrize("name", ["lfw.tgz", "lfw.tar", "anything.tar"])
def test_archives_are_read_in_place(home, name):
    with tarfile.open(home / name, "w:gz" if name.endswith("tgz") else "w") as tar:
        tar.add(home / "lfw", "lfw")
    shutil.rmtree(home / "lfw")
    check(lfw(home / name))
    if name != "anything.tar":
        check(lfw(home))


def test_golden_landmarks_and_the_real_lists(golden, shared):
    found = lfw(shared("data/lfw.tar"), pairs=shared("data/pairs.txt"))
    index = {name: i for i, name in enumerate(found.faces.names)}
    rows = [index[str(name)] for name in golden["names"]]
    assert torch.equal(found.faces.landmarks[rows], torch.tensor(golden["landmarks"]))
    assert len(found.faces) == 11585
    assert found.pairs.fold.bincount().tolist() == [600] * 10
    labels = found.faces.labels
    same = labels[found.pairs.first] == labels[found.pairs.second]
    assert torch.equal(found.pairs.same, same)
    assert torch.equal(found.pairs.fold, balanced_folds(found.pairs.same))
    assert int((labels.bincount() >= 4).sum()) == 610  # the paper's Table 2


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("2\t2\n", "2\t3\n", 1, r"announces 2 x 2 x 3 = 12 pairs, lists 8"),
        ("2\t2\n", "ten\t2\n", 1, r"expected a whole number from 1, got 'ten'"),
        ("Bo\t1\t2\n", "Bo\t1\n", 3, r"expected a name and two numbers, got 'Bo 1'"),
        ("Bo\t1\t2\n", "Bo\t1\t0\n", 3, r"expected a whole number from 1, got '0'"),
        ("Bo\t2\tCy", "Bo\t7\tCy", 5, r"there is no image Bo/Bo_0007\.jpg"),
        ("Ann_Li\t1\t3\n", "Ann_Li\t2\t1\n", 6, r"were paired before, at .*pairs\.txt:2"),
        ("Dee\t1\t2\n", "Dee\t1\t1\n", 7, r"is paired with itself"),
    ],
)
def test_faulty_pairs_are_named_with_their_line(home, old, new, line, what):
    (home / "pairs.txt").write_text(PAIRS.replace(old, new))
    with pytest.raises(DataError, match=rf"pairs\.txt:{line}: .*{what}"):
        lfw(home)


def test_missing_images_and_points_are_counted_and_can_be_skipped(home):
    (home / "lfw_landmarks.csv").write_text("".join(f"{n},{NUMBERS}\n" for n in IMAGES[:5]))
    with pytest.raises(DataError, match=r"no points of (?s:.*)skip_missing=True") as caught:
        lfw(home)
    assert len(caught.value.faults) == 3 + 4  # images without points, and pairs of these
    with pytest.warns(UserWarning, match="left out: 7 faults"):
        found = lfw(home, skip_missing=True)
    assert (len(found.pairs), len(found.faces), len(found.faces.skipped)) == (4, 5, 7)


def test_people_lists_are_counted(home):
    listed = "".join(f"{name}\t{count}\n" for name, count in COUNTS.items())
    path = home / "people.txt"
    path.write_text("1\n4\n" + listed)
    assert len(lfw(home, people=path).faces) == 8
    path.write_text(listed.replace("Bo\t2", "Bo\t4"))
    with pytest.raises(DataError, match=r"people\.txt:2: Bo has 2 of 4 images, .*Bo_0003\.jpg"):
        lfw(home, people=path)


def test_pairs_and_points_are_optional_and_images_are_not(home):
    (home / "pairs.txt").unlink()
    (home / "lfw_landmarks.csv").unlink()
    found = lfw(home)
    assert found.pairs is None
    assert found.faces.landmarks is None
    shutil.rmtree(home / "lfw")
    with pytest.raises(FileNotFoundError, match=r"lfw/Name/Name_0001\.jpg.*lfw\.tgz"):
        lfw(home)


@pytest.fixture
def host(home, monkeypatch):
    """A server on loopback that has LFW, and the pieces that point to it."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(home / "lfw", "lfw")
    contents = {
        "lfw.tgz": archive.getvalue(),
        "pairs.txt": PAIRS.encode(),
        "lfw_landmarks.csv": (home / "lfw_landmarks.csv").read_bytes(),
    }
    with FileServer() as server:
        server.files = {f"/{name}": data for name, data in contents.items()}
        pieces = tuple(
            Piece(name, f"{server.url}/{name}", hashlib.sha256(data).hexdigest())
            for name, data in contents.items()
        )
        # by its full name: the package exports a function of the module's name
        monkeypatch.setattr(sys.modules["idloss.data.lfw"], "HOSTED", pieces)
        monkeypatch.setattr("idloss.weights.files.time.sleep", lambda _: None)
        yield server


def asked(server):
    return sorted(seen.path for seen in server.seen)


def test_download_once_and_on_from_where_it_broke_off(host, tmp_path):
    host.faults["/lfw.tgz"] = [Fault(cut=1000)]
    check(lfw(tmp_path / "new", download=True))
    assert [seen.range for seen in host.gets("/lfw.tgz")] == [None, "bytes=1000-"]
    check(lfw(tmp_path / "new", download=True))
    assert asked(host) == ["/lfw.tgz", "/lfw.tgz", "/lfw_landmarks.csv", "/pairs.txt"]


def test_only_what_is_missing_is_downloaded_and_into_a_folder(host, home):
    (home / "pairs.txt").unlink()
    check(lfw(home, download=True))
    assert asked(host) == ["/pairs.txt"]
    with pytest.raises(NotADirectoryError, match=r"pairs\.txt is a file; .* into a folder"):
        lfw(home / "pairs.txt", download=True)


def test_download_of_another_file_is_refused(host, tmp_path):
    host.files["/pairs.txt"] += b"more"
    with pytest.raises(NotAsPromisedError, match=r"pairs\.txt is not the pinned file"):
        lfw(tmp_path / "new", download=True)
    assert not (tmp_path / "new" / "pairs.txt").exists()


def test_aligned_copies_in_png_fit_the_lists(home):
    for path in [*(home / "lfw").rglob("*.jpg")]:
        path.rename(path.with_suffix(".PNG"))
    found = lfw(home, crop="sphereface")
    assert sorted(found.faces.names) == sorted(IMAGES)
    assert len(found.pairs) == 8
    assert found.faces.landmarks is None
    write(home, {"lfw/Bo/Bo_0001.jpg": jpeg()})
    with pytest.raises(DataError, match=r"the image .*Bo_0001\.\w+ once more"):
        lfw(home, crop="sphereface")


def test_pictures_that_are_not_taken_are_told(home):
    write(home, {"lfw/Bo/Bo_3.jpg": jpeg(), "lfw/Bo/notes.txt": b""})
    with pytest.warns(UserWarning, match=r"1 pictures .*not called as in LFW.*'lfw/Bo/Bo_3\.jpg'"):
        check(lfw(home))
    (home / "lfw/Bo/Bo_3.jpg").unlink()
    (home / "pairs.txt").unlink()
    shutil.rmtree(home / "lfw/Dee")
    with pytest.warns(UserWarning, match=r"points of 2 images that are not there.*'Dee/Dee_0001"):
        assert len(lfw(home).faces) == 6


def test_names_decomposed_on_disk_fit_the_lists(home):
    (home / "lfw/Zoe\u0301").mkdir()
    for number in (1, 2):
        path = home / f"lfw/Zoe\u0301/Zoe\u0301_000{number}.jpg"
        path.write_bytes(jpeg(seed=number))
    with (home / "lfw_landmarks.csv").open("a", encoding="utf-8") as table:
        table.writelines(f"Zo\u00e9/Zo\u00e9_000{n}.jpg,{NUMBERS}\n" for n in (1, 2))
    (home / "pairs.txt").write_text("1\nZo\u00e9\t1\t2\nBo\t1\tZo\u00e9\t1\n", encoding="utf-8")
    found = lfw(home)
    assert names(found.pairs, found.faces)[0] == (lfw_name("Zo\u00e9", 1), lfw_name("Zo\u00e9", 2))
    assert found.faces.read(len(found.faces) - 1).shape == (3, 110, 100)
    (home / "lfw/Zo\u00e9").mkdir()
    (home / "lfw/Zo\u00e9/Zo\u00e9_0001.jpg").write_bytes(jpeg())
    with pytest.raises(DataError, match="once more"):
        lfw(home)
