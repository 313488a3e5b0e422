"""`idloss prepare` as the shell calls it."""

import json
import re
import shutil
import warnings
from functools import partial

import pytest
from data.test_faces import NUMBERS, celeba, folder

from idloss.data import open_faces, open_prepared


@pytest.fixture
def prepare(command, monkeypatch):
    """Run `idloss prepare WORDS...`; gives the error's lines, or None."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    return partial(command, "prepare")


def test_lfw_from_end_to_end(lfw, prepare, tmp_path, capsys):
    out = tmp_path / "out"
    clean = tmp_path / "clean.txt"
    clean.write_text("".join(f"Person_{p}/Person_{p}_0002.jpg\n" for p in range(5)))
    words = ["--clean-list", clean, "--crop", "arcface", "--threads", 1]
    assert not prepare("lfw", lfw, out, *words)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"5 faces of 5 people, arcface 112x112, in {out}"
    assert "dropped 19: not in the clean list" in shown
    faces = open_prepared(out)
    assert faces.crop == "arcface"
    # once more: it is all there
    assert not prepare("lfw", lfw, out, *words)
    assert capsys.readouterr().out.splitlines() == shown


def test_celeba_and_its_splits(prepare, tmp_path, capsys):
    photos = celeba(tmp_path / "photos", "flat")
    assert not prepare("celeba", photos, tmp_path / "all")
    assert not prepare("celeba", photos, tmp_path / "test", "--split", "test")
    assert open_faces(tmp_path / "all").names == tuple(f"00000{i}.jpg" for i in range(1, 5))
    assert open_faces(tmp_path / "test").names == ("000003.jpg", "000004.jpg")
    assert "2 crops" not in capsys.readouterr().out


def test_what_is_dropped_is_told(prepare, tmp_path, capsys):
    rows = [f"{name}.jpg,{NUMBERS},{name}" for name in "abc"]
    photos = folder(tmp_path / "photos", rows)
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    error = prepare("folder", photos, tmp_path / "out")
    assert re.search(r"b\.jpg: unreadable image.*\n.*--skip-missing", error)
    assert error.count("\n") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert not prepare("folder", photos, tmp_path / "out", "--skip-missing")
    told = capsys.readouterr()
    assert "dropped 1: could not be read or aligned" in told.out
    assert "dropped.csv" in told.out
    assert "1 crops have the pixels of another" in told.out  # the fixture's photos are all alike
    assert "idloss: warning: left out:" in told.err


def test_people_of_an_evaluation_set_are_removed(lfw, fnet, prepare, tmp_path, capsys):
    out, words = tmp_path / "out", ["--exclude-overlap", lfw, "--fnet", fnet, "--threshold"]
    clean = tmp_path / "clean.txt"
    clean.write_text("".join(f"Person_0/Person_0_000{n}.jpg\n" for n in range(1, 5)))
    # of itself nothing is left but what an impossible cosine leaves
    assert not prepare("lfw", lfw, out, "--clean-list", clean, *words, 1.1)
    assert "also in" not in capsys.readouterr().out
    assert json.loads((out / "dataset.json").read_text())["overlap_fnet"] == fnet
    assert not prepare("lfw", lfw, tmp_path / "none", "--clean-list", clean, *words, 0.5)
    shown = capsys.readouterr().out
    assert "dropped 4: also in lfw" in shown
    assert re.search(r"removed: all of Person_0 is Person_\d \(cosine (0\.\d\d|1\.00)\)", shown)
    assert shown.startswith("0 faces")


def test_who_could_not_be_looked_for_is_told(lfw, fnet, prepare, tmp_path, capsys):
    """Among the training faces such a person may be, and nothing else would say so."""
    broken = shutil.copytree(lfw, tmp_path / "broken")
    photo = broken / "lfw/Person_5/Person_5_0003.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    photos = folder(tmp_path / "photos", [f"{name}.jpg,{NUMBERS},\x1b[2J{name}" for name in "abc"])
    words = ["--exclude-overlap", broken, "--fnet", fnet, "--threshold", 0.0, "--device", "cpu"]
    assert "Person_5_0003.jpg" in prepare("folder", photos, tmp_path / "out", *words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not prepare("folder", photos, tmp_path / "out", *words, "--skip-missing")
    shown = capsys.readouterr().out
    assert re.search(r"not looked for, .*who is in .*Person_5_0003\.jpg", shown)
    assert "removed: all of ?[2Ja is" in shown  # and no name of theirs commands the terminal
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["celebra", "LFW", "OUT"], "unknown kind of faces 'celebra'.*celeba"),
        (["celeba", "LFW", "OUT"], "no CelebA in .*photos beside a landmarks.csv.*prepare folder"),
        (["folder", "LFW", "OUT", "--split", "train"], "--split is CelebA's; 'folder' has none"),
        (["celeba", "LFW", "OUT", "--split", "trian"], "unknown split 'trian'.*train"),
        (["lfw", "LFW", "OUT", "--crop", "arcfase"], "unknown template 'arcfase'.*arcface"),
        (["lfw", "LFW", "OUT", "--exclude-overlap", "LFW", "--fnet", "sface"], "--threshold"),
        (["lfw", "OUT", "OUT"], "no folder and no archive"),
        (["lfw", "LFW", "LFW"], r"holds other files, and no dataset\.json"),
    ],
)
def test_wrong_words_are_told_briefly(words, said, lfw, prepare, tmp_path):
    places = {"LFW": lfw, "OUT": tmp_path / "out"}
    error = prepare(*(places.get(word, word) for word in words))
    assert re.search(said, error), error
    assert error.count("\n") <= 1
