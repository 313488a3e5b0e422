"""Folds, pairs.csv, and insightface's .bin through a reader that runs nothing."""

import os
import pickle
import re
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch
from data.test_faces import HEADER, NUMBERS, write
from data.test_files import jpeg
from sklearn.model_selection import KFold

from idloss.data import DataError, draw_faces, draw_pairs, open_evaluation
from idloss.data.insightface import _Reader, insightface_bin
from idloss.data.pairs import balanced_folds, contiguous_folds, pairs_csv

IMAGES = [jpeg(size=(112, 112), seed=i) for i in range(8)]
SAME = [True, False, True, False]


def bin_file(tmp_path, content, protocol=4):
    path = tmp_path / "tiny.bin"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content",
    [
        (IMAGES, SAME),
        [tuple(IMAGES), np.array(SAME)],
        ([np.frombuffer(image, np.uint8) for image in IMAGES], [np.bool_(same) for same in SAME]),
        ([bytearray(image) for image in IMAGES], np.array(SAME, np.int64)),
    ],
    ids=["bytes", "array-of-labels", "array-of-bytes", "bytearray"],
)
def test_bins_of_all_makes(tmp_path, content, protocol):
    found = open_evaluation(bin_file(tmp_path, content, protocol))
    assert found.name == "tiny"
    assert found.faces.crop == "arcface"
    assert found.pairs.same.tolist() == SAME
    assert found.pairs.first.tolist() == [0, 2, 4, 6]
    assert found.pairs.second.tolist() == [1, 3, 5, 7]
    assert [found.faces.files.read(name) for name in found.faces.members] == IMAGES
    assert found.faces.read(5).shape == (3, 112, 112)


def test_bin_of_python_2(tmp_path):
    # protocol 2 as Python 2 writes it: str as SHORT_BINSTRING, True as NEWTRUE
    data = b"\x80\x02" + b"](U\x03ab\xffU\x01ce" + b"]\x88a\x86."
    found = insightface_bin(bin_file(tmp_path, data))
    assert [found.faces.files.read(name) for name in found.faces.members] == [b"ab\xff", b"c"]


class Run:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"(posix|nt)\.system"),
        (eval, r"(builtins|__builtin__)\.eval"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (subprocess.call, r"(subprocess|commands)\.call"),
        (np.load, r"numpy\.load"),
        (torch.load, r"torch\.\w+\.load"),
    ],
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, function, name, protocol):
    marker = tmp_path / "ran"
    content = ([Run(function, f"touch {marker}")], SAME)
    with pytest.raises(DataError, match=rf"tiny\.bin: .*it asks for {name}"):
        insightface_bin(bin_file(tmp_path, content, protocol))
    assert not marker.exists()


def test_what_a_pickle_sets_does_not_outlive_it(tmp_path):
    # BUILD sets attributes of what a name stands for: here the default of bytearray
    state = b"N}(\x8c\x0c__defaults__C\x04evil\x85u\x86b."
    path = bin_file(tmp_path, b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93" + state)
    with pytest.raises(DataError, match="expected images and labels"):
        insightface_bin(path)
    empty = _Reader.allowed["builtins", "bytearray"]()
    assert empty == b""


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ((IMAGES, SAME[:3]), "8 images for 3 pairs"),
        ((IMAGES, [*SAME[:3], 2]), "expected every label to be True or False"),
        ((["text"] * 8, SAME), "expected every image to be the bytes of a file"),
        ((IMAGES,), "expected images and labels"),
        ({"a": 1}, "expected images and labels"),
        ((IMAGES[0], SAME), "expected a list of images"),
        (([], []), "0 images for 0 pairs"),
        (b"", "pickle exhausted before seeing STOP"),
        (b"garbage", ""),
        # STACK_GLOBAL lets a pickle ask for an attribute of an attribute
        (b"\x80\x04\x8c\x08builtins\x8c\x0fbytes.__class__\x93.", r"it asks for .*__class__"),
        ((IMAGES, np.array([Run(os.system, "true"), None], object)), "(it asks for|.*not allowed)"),
        ((np.array(IMAGES, dtype=object), SAME), "arrays of 'O8' are not allowed"),
        *((pickle.dumps((IMAGES, SAME))[:size], "") for size in (3000, 15000, 29000)),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, content, what):
    with pytest.raises(DataError, match=rf"tiny\.bin: not a verification set: {what}"):
        insightface_bin(bin_file(tmp_path, content))


def test_damaged_image_in_a_bin(tmp_path):
    images = [*IMAGES]
    images[3] = images[3][:100]
    path = bin_file(tmp_path, (images, SAME))
    with pytest.raises(DataError, match=r"tiny\.bin:00003: unreadable image"):
        insightface_bin(path).faces.read(3)
    with pytest.warns(UserWarning, match=r"tiny\.bin:00003: unreadable image"):
        found = insightface_bin(path, skip_missing=True)
    assert found.pairs.first.tolist() == [0, 4, 6]
    assert found.pairs.same.tolist() == [True, True, False]
    assert found.pairs.fold.tolist() == [0, 2, 3]  # those of the whole list
    assert len(found.faces.skipped) == 1


def listed(tmp_path, text, **files):
    images = {
        name: jpeg(size=(96, 112), seed=i) for i, name in enumerate(["a.jpg", "b/b.jpg", "c.jpg"])
    }
    return write(tmp_path, {"pairs.csv": text, **images, **files}) / "pairs.csv"


@pytest.mark.parametrize("header", ["", "first,second,same\n"])
def test_pairs_csv(tmp_path, header):
    path = listed(tmp_path, f"{header}a.jpg,b/b.jpg,1\nb/b.jpg, c.jpg,0\n\na.jpg,c.jpg,1\n")
    found = open_evaluation(path, crop="sphereface")
    assert found.faces.names == ("a.jpg", "b/b.jpg", "c.jpg")
    assert found.faces.crop == "sphereface"
    assert found.pairs.first.tolist() == [0, 1, 0]
    assert found.pairs.second.tolist() == [1, 2, 2]
    assert found.pairs.same.tolist() == [True, False, True]
    assert found.pairs.fold.tolist() == [0, 0, 1]


def test_names_may_be_quoted_and_of_any_letters(tmp_path):
    odd = ["a, b.jpg", "Zoë 李.jpg", "c.jpg"]
    images = {name: jpeg(seed=i) for i, name in enumerate(odd)}
    table = 'first,second,same\n"a, b.jpg",Zoë 李.jpg,1\n"c.jpg", "a, b.jpg",0\n'
    found = pairs_csv(write(tmp_path, {"pairs.csv": table, **images}) / "pairs.csv")
    assert found.faces.names == tuple(odd)
    assert found.pairs.second.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("kinds", "folds"), [((3, 12), [0, 1, 2]), ((25, 12), list(range(10))), ((1, 5), [0])]
)
def test_there_are_no_more_folds_than_pairs_of_a_kind(tmp_path, kinds, folds):
    images = {f"{n}.jpg": jpeg(size=(9, 9), seed=n) for n in range(2 * max(kinds))}
    rows = [f"{2 * n}.jpg,{2 * n + 1}.jpg,1\n" for n in range(kinds[0])]
    rows += [f"{n}.jpg,{n + 2}.jpg,0\n" for n in range(kinds[1])]
    pairs = pairs_csv(write(tmp_path, {"pairs.csv": "".join(rows), **images}) / "pairs.csv").pairs
    both = set(pairs.fold[pairs.same].tolist()) & set(pairs.fold[~pairs.same].tolist())
    assert sorted(both) == folds


def test_pairs_csv_beside_landmarks(tmp_path):
    table = "\n".join([HEADER, f"c.jpg,{NUMBERS},3", f"a.jpg,{NUMBERS},3", f"b/b.jpg,{NUMBERS},4"])
    path = listed(tmp_path, "a.jpg,c.jpg,1\n", **{"landmarks.csv": table})
    found = pairs_csv(path)
    assert found.faces.landmarks.shape == (3, 5, 2)
    assert (found.pairs.first.tolist(), found.pairs.second.tolist()) == ([1], [0])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (b"a.jpg,none.jpg,0", "there is no image none.jpg"),
        (b"b/b.jpg,a.jpg,1", "a.jpg were paired before, at .*pairs.csv:1"),
        (b"c.jpg,c.jpg,1", "c.jpg is paired with itself"),
        (b"a.jpg,c.jpg", "expected two images and 0 or 1"),
        (b"a.jpg,c.jpg,maybe", "expected two images and 0 or 1"),
        (b"b\xff.jpg,c.jpg,1", "not UTF-8 text"),
        (b"a" * 200_000 + b",c.jpg,1", "not a row"),
    ],
)
def test_faulty_rows_are_named_with_their_line(tmp_path, row, what):
    with pytest.raises(DataError, match=rf"pairs\.csv:3: .*{what}"):
        pairs_csv(listed(tmp_path, b"a.jpg,b/b.jpg,1\n\n" + row + b"\n"))


def test_skipping_is_recorded(tmp_path):
    path = listed(tmp_path, "a.jpg,b/b.jpg,1\na.jpg,none.jpg,0\n")
    with pytest.warns(UserWarning, match="none.jpg"):
        found = pairs_csv(path, skip_missing=True)
    assert len(found.pairs) == 1
    assert [fault.where.rpartition(":")[2] for fault in found.faces.skipped] == ["2"]
    with pytest.raises(DataError, match="there are no pairs"):
        pairs_csv(listed(tmp_path, ""))
    with pytest.raises(DataError, match=r"none\.bin: No such file"):
        insightface_bin(tmp_path / "none.bin")


def test_unknown_kind_and_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"unknown evaluation set 'lwf'.*'lfw'"):
        open_evaluation(tmp_path, "lwf")
    with pytest.raises(FileNotFoundError) as caught:
        open_evaluation(tmp_path)
    for name in ("lfw", "tinyface", "scface", "survface-verification", "Testing_Set"):
        assert re.search(name, str(caught.value))


def test_nothing_of_numpy_can_be_reached():
    for stand_in in _Reader.allowed.values():
        assert stand_in.__module__ == "idloss.data.insightface"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        # LONG_BINPUT at a place that only a 32 GB memo has
        (b"\x80\x04]r\xff\xff\xff\x7f.", "it asks for room for 2147483647 objects"),
        # bytearray(32 << 30), and numpy.ndarray((32 << 30,)), which are to be made at once
        (b"\x80\x04cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x08\x85R.", "bytes of an unknown make"),
        (b"\x80\x04cnumpy\nndarray\n\x8a\x05\0\0\0\0\x08\x85\x85R.", "expected images and labels"),
        # BINBYTES8 of 32 GB in a short file
        (b"\x80\x04\x8e\0\0\0\0\x08\0\0\0.", "expected 34359738368 bytes"),
    ],
)
def test_a_short_bin_gets_no_room(tmp_path, data, what):
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"tiny\.bin: not a verification set: .*{what}"):
        insightface_bin(bin_file(tmp_path, data))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_one_photo_under_two_names_is_told(tmp_path):
    path = listed(tmp_path, "a.jpg,d.jpg,1\n", **{"d.jpg": jpeg(size=(96, 112), seed=0)})
    with pytest.warns(UserWarning, match=r"1 pairs of .*pairs\.csv .*'a\.jpg' and 'd\.jpg'"):
        open_evaluation(path, crop="sphereface")
    with pytest.warns(UserWarning, match=r"1 pairs of .*tiny\.bin .*'00000' and '00001'"):
        open_evaluation(bin_file(tmp_path, ([IMAGES[0], *IMAGES[:7]], SAME)))


def test_pictures_that_are_no_crops_are_told(tmp_path):
    noise = [jpeg(size=(112, 112), seed=i) for i in range(16)]
    with pytest.warns(UserWarning, match=r"like an aligned face by .* Are they arcface crops\?"):
        open_evaluation(bin_file(tmp_path, (noise, [True, False] * 4)))


def test_photos_with_nothing_to_align_them_by_are_refused(tmp_path):
    path = listed(tmp_path, "a.jpg,c.jpg,1\n")
    said = rf"put landmarks\.csv beside it \(idloss landmarks {tmp_path} FILE .*crop=sphereface"
    with pytest.raises(ValueError, match=said):
        open_evaluation(path)
    with pytest.raises(ValueError, match="unknown template"):
        open_evaluation(path, crop="spherefaec")
    with pytest.raises(ValueError, match="need no landmarks: leave one of them out"):
        open_evaluation(tmp_path, "scface", crop="arcface", landmarks=path)


@pytest.mark.parametrize("count", [10, 17, 61, 600, 607, 6000])
def test_folds_equal_scikit_learn_and_released_code(count):
    first = contiguous_folds(count)
    for fold, (_, test) in enumerate(KFold(n_splits=10, shuffle=False).split(np.arange(count))):
        np.testing.assert_array_equal(np.flatnonzero(first == fold), test)
    spread = contiguous_folds(count, remainder="spread")
    for fold in range(10):
        cuts = range(int(fold * count / 10), int((fold + 1) * count / 10))
        np.testing.assert_array_equal(np.flatnonzero(spread == fold), list(cuts))


def test_balanced_folds_hold_both_kinds_whatever_their_order():
    same = torch.tensor([True] * 7 + [False] * 9)
    folds = balanced_folds(same, 3)
    assert folds[same].bincount().tolist() == [3, 2, 2]
    assert folds[~same].bincount().tolist() == [3, 3, 3]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert balanced_folds(same[order], 3)[same[order]].bincount().tolist() == [3, 2, 2]


def test_drawn_pairs_are_of_people_known_half_and_half_and_none_twice():
    faces = draw_faces(12, 5)
    faces.labels[:7] = -1
    pairs = draw_pairs(faces, 60, seed=3)
    assert pairs.same.sum() == 30
    assert (faces.labels[pairs.first] == faces.labels[pairs.second]).equal(pairs.same)
    assert (pairs.first < pairs.second).all()  # nobody with himself
    assert min(faces.labels[pairs.first].min(), faces.labels[pairs.second].min()) == 1
    assert len(set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))) == 60
    assert all(pairs.same[pairs.fold == fold].sum() == 3 for fold in range(10))
    assert not pairs.first.equal(draw_pairs(faces, 60, seed=4).first)
    with pytest.raises(ValueError, match="need 500 of each kind; one has"):
        draw_pairs(faces, 1000)
