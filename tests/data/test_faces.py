"""Folders with landmarks.csv and the two CelebA layouts, on miniature trees."""

import os
import re
import tarfile
import warnings

import pytest
import torch
from data.test_files import jpeg
from torchvision.datasets import CelebA

from idloss.data import DataError, celeba_faces, folder_faces, open_faces
from idloss.data.landmarks import POINT_COLUMNS

NUMBERS = "30,52 66,52 48,72 34,92 63,92".replace(" ", ",")
HEADER = ",".join(["image_id", *POINT_COLUMNS, "identity"])


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def folder(tmp_path, rows, images=("a.jpg", "b.jpg", "c.jpg")):
    table = "\n".join([HEADER, *rows]) + "\n"
    return write(tmp_path, {"landmarks.csv": table, **{name: jpeg() for name in images}})


def test_folder(tmp_path):
    rows = [f"b.jpg,{NUMBERS},20", f"a.jpg,{NUMBERS},9", f"c.jpg,{NUMBERS},20"]
    faces = open_faces(folder(tmp_path, rows))
    assert faces.names == ("b.jpg", "a.jpg", "c.jpg")
    assert faces.identities == ("9", "20")
    assert faces.labels.tolist() == [1, 0, 1]
    assert faces.landmarks.shape == (3, 5, 2)
    assert faces.landmarks[0, 4].tolist() == [63, 92]
    assert faces.read(0).shape == (3, 110, 100)


def test_tar_with_a_top_folder_equals_the_folder(tmp_path):
    rows = [f"{n}.jpg,{NUMBERS},{n}" for n in "abc"]
    path = folder(tmp_path / "faces", rows)
    with tarfile.open(tmp_path / "faces.tar", "w") as tar:
        tar.add(path, "some")
    one, two = open_faces(path), open_faces(tmp_path / "faces.tar")
    assert (one.names, one.identities, one.content) == (two.names, two.identities, two.content)
    assert torch.equal(one.read(2), two.read(2))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (f"none.jpg,{NUMBERS},1", "none.jpg is not in"),
        (f"../out.jpg,{NUMBERS},1", "../out.jpg is not in"),
        (f"/etc/hostname,{NUMBERS},1", "/etc/hostname is not in"),
        (f"./a.jpg,{NUMBERS},1", r"\./a\.jpg is the photo of a\.jpg once more"),
        ("b.jpg,1,2,3,4,5,6,7,8,9", "expected ten finite coordinates"),
        ("b.jpg,1,2,3,4,5,6,7,8,9,nan,1", "expected ten finite coordinates"),
        ("b.jpg,1,2,3,4,5,6,7,8,9,ten,1", "could not convert string to float: 'ten'"),
        (f"a.jpg,{NUMBERS},1", "its points are given twice"),
        (f"b.jpg,{NUMBERS}", "expected 12 filled fields"),
        (f"b.jpg,{NUMBERS},", "expected 12 filled fields"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*has no line of 1 pictures")
def test_faulty_rows_are_named_with_their_line(tmp_path, row, what):
    write(tmp_path, {"out.jpg": jpeg()})
    path = folder(tmp_path / "in", [f"a.jpg,{NUMBERS},1", row, f"c.jpg,{NUMBERS},2"])
    with pytest.raises(DataError, match=rf"landmarks\.csv:3: .*{what}"):
        folder_faces(path)
    with pytest.warns(UserWarning, match="left out"):
        faces = folder_faces(path, skip_missing=True)
    assert faces.names == ("a.jpg", "c.jpg")
    assert [fault.where.rpartition(":")[2] for fault in faces.skipped] == ["3"]


def test_headers_and_layouts_that_are_unknown(tmp_path):
    table = f"{HEADER.removesuffix(',identity')}\na.jpg,{NUMBERS}\n"
    faces = folder_faces(write(tmp_path, {"landmarks.csv": table, "a.jpg": jpeg()}))
    assert (faces.labels, faces.identities) == (None, ())
    write(tmp_path, {"landmarks.csv": f"file,x,y\na.jpg,{NUMBERS}\n"})
    with pytest.raises(DataError, match=r"landmarks\.csv:1: expected the header image_id,"):
        folder_faces(tmp_path)
    (tmp_path / "landmarks.csv").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        open_faces(tmp_path)
    for wanted in ("img_celeba/", "img_align_celeba/", "landmarks.csv"):
        assert wanted in str(caught.value)


COLUMNS = " ".join(POINT_COLUMNS)
POINTS = "30 52 66 52 48 72 34 92 63 92"


def celeba(tmp_path, layout, *, count=4):
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    points = f"{count}\n{COLUMNS}\n" + "".join(f"{n} {POINTS}\n" for n in names)
    people = "".join(f"{n} {2880 - i % 2 * 1000}\n" for i, n in enumerate(names))
    parts = "".join(f"{n} {min(i, 2)}\n" for i, n in enumerate(names))
    wild = layout != "torchvision"
    table = "list_landmarks_celeba.txt" if wild else "list_landmarks_align_celeba.txt"
    where = {
        "flat": ("", "", "img_celeba/"),
        "official": ("Anno/", "Eval/", "Img/img_celeba/"),
        "torchvision": ("celeba/", "celeba/", "celeba/img_align_celeba/"),
    }[layout]
    files = {
        f"{where[0]}{table}": points,
        f"{where[0]}identity_CelebA.txt": people,
        f"{where[1]}list_eval_partition.txt": parts,
    }
    return write(tmp_path, {**files, **{where[2] + n: jpeg(seed=i) for i, n in enumerate(names)}})


@pytest.mark.parametrize("layout", ["flat", "official", "torchvision"])
@pytest.mark.filterwarnings("ignore:.*holds the aligned CelebA")
def test_celeba_layouts(tmp_path, layout):
    faces = open_faces(celeba(tmp_path, layout))
    assert faces.names == ("000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg")
    assert faces.identities == ("1880", "2880")
    assert faces.labels.tolist() == [1, 0, 1, 0]
    assert faces.landmarks[3, 2].tolist() == [48, 72]
    assert faces.read(3).shape == (3, 110, 100)
    assert celeba_faces(tmp_path, split="test").names == ("000003.jpg", "000004.jpg")
    assert celeba_faces(tmp_path, split="valid").names == ("000002.jpg",)


def test_torchvision_reads_what_we_take_for_its_layout(tmp_path, monkeypatch):
    path = celeba(tmp_path, "torchvision") / "celeba"
    names = [line.split()[0] for line in (path / "identity_CelebA.txt").open()]
    boxes = "4\nx y w h\n" + "".join(f"{n} 1 2 3 4\n" for n in names)
    attributes = "4\nSmiling\n" + "".join(f"{n} 1\n" for n in names)
    write(path, {"list_bbox_celeba.txt": boxes, "list_attr_celeba.txt": attributes})
    monkeypatch.setattr(CelebA, "_check_integrity", lambda self: True)
    theirs = CelebA(str(tmp_path), split="all", target_type=["identity", "landmarks"])
    with pytest.warns(UserWarning, match="the paper was trained on the photos in the wild"):
        ours = open_faces(tmp_path)
    for index, (_, (identity, points)) in enumerate(theirs):
        assert ours.identities[ours.labels[index]] == str(int(identity))
        assert ours.landmarks[index].flatten().tolist() == points.tolist()


def test_celeba_lost_files_are_named(tmp_path):
    path = celeba(tmp_path, "flat")
    (path / "img_celeba/000003.jpg").unlink()
    with pytest.raises(DataError, match=r"list_landmarks_celeba\.txt:5: 000003\.jpg is not in"):
        open_faces(path)
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_faces(path, skip_missing=True)) == 3
    (path / "identity_CelebA.txt").unlink()
    with pytest.raises(DataError, match=r"no identity_CelebA\.txt in"):
        open_faces(path)
    with pytest.raises(ValueError, match=r"unknown split 'vaild'.*'valid'"):
        celeba_faces(path, split="vaild")


LOST, AGAIN = "000003.jpg 2880\n", "000002.jpg stands here a second"


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("list_eval_partition", "000003.jpg 2\n", "", "celeba.txt:5: 000003.jpg is in no split"),
        ("identity_CelebA", LOST, "", "celeba.txt:5: 000003.jpg has no identity"),
        ("identity_CelebA", "000003", "000002", f"CelebA.txt:3: {AGAIN}"),
        ("identity_CelebA", "2880\n", "02880\n", "2880: is the identity 02880 in another spelling"),
        ("list_landmarks_celeba", f"000003.jpg {POINTS}\n", "", "announces 4 images and lists 3"),
    ],
)
def test_celeba_tables_must_agree(tmp_path, name, old, new, what):
    path = celeba(tmp_path, "flat")
    table = path / f"{name}.txt"
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=re.escape(what)):
        celeba_faces(path, split="all" if "spelling" in what else "test")


def test_celeba_photos_without_a_line_and_photos_had_twice(tmp_path):
    path = celeba(tmp_path, "flat")
    write(path, {"img_celeba/more/000002.jpg": jpeg(), "img_celeba/9.JPG": jpeg()})
    with pytest.raises(DataError, match="2 faults") as caught:
        open_faces(path)
    second, unlisted = caught.value.faults
    assert str(second).partition("img_celeba/")[2].startswith("more/000002.jpg: a second photo")
    assert "img_celeba/9.JPG: a photo that list_landmarks_celeba.txt has no line" in str(unlisted)


def test_kaggles_celeba_says_what_is_missing(tmp_path):
    files = {"list_landmarks_align_celeba.csv": "image_id\n", "img_align_celeba/1.jpg": jpeg()}
    with pytest.raises(DataError, match=r"no identities\nPut identity_CelebA\.txt and list_land"):
        celeba_faces(write(tmp_path, files))


def test_pictures_without_a_line_and_second_tables_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"no line of 2 pictures, which are not taken.*'b\.jpg'"):
        folder_faces(folder(tmp_path / "one", [f"a.jpg,{NUMBERS},1"]))
    folder(tmp_path / "one", [f"{n}.jpg,{NUMBERS},{n}" for n in "abc"])
    write(tmp_path, {"two/d.JFIF": jpeg()})
    with pytest.warns(UserWarning, match=r"no line of 1 pictures, .*'two/d\.JFIF'"):
        assert len(open_faces(tmp_path)) == 3
    folder(tmp_path / "two", [f"a.jpg,{NUMBERS},1"])
    with pytest.raises(DataError, match=r"there are 2 tables, one/landmarks\.csv and two/"):
        open_faces(tmp_path)


@pytest.mark.parametrize("other", ["1.0", "01"])
def test_a_persons_number_in_two_spellings_is_told(tmp_path, other):
    people = ("1", other, "Bob")
    rows = [f"{n}.jpg,{NUMBERS},{person}" for n, person in zip("abc", people, strict=True)]
    with pytest.raises(DataError, match=r"is the identity \S+ in another spelling"):
        open_faces(folder(tmp_path, rows))


def test_names_that_are_not_utf8_and_tables_that_are_not(tmp_path):
    path = folder(tmp_path, [f"Zoe\u0301.jpg,{NUMBERS},1"], images=["Zo\u00e9.jpg"])
    assert open_faces(path).read(0).shape == (3, 110, 100)
    (path / "Zo\u00e9.jpg").rename(path / os.fsdecode("Zo\u00e9.jpg".encode("latin-1")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a picture without a line
        faces = open_faces(path)
    assert faces.read(0).shape == (3, 110, 100)
    assert faces.names[0].encode()
    table = path / "landmarks.csv"
    table.write_bytes(table.read_text().encode("latin-1", "replace").replace(b"?", b"\xe9"))
    with pytest.raises(DataError, match=r"csv:2: not UTF-8 text .*save the table as UTF-8"):
        open_faces(path)
