"""`idloss prepare` as the shell calls it."""

import json
import re
import shutil
import sys
import warnings

import pytest
import torch
from data.test_faces import NUMBERS, celeba, folder
from minilfw import mini_lfw
from timm.models import save_for_hf

from idloss import create_fnet
from idloss.cli import main
from idloss.data import open_prepared, open_training


@pytest.fixture
def command(monkeypatch):
    """Run `idloss prepare WORDS...` as the shell does; gives the error's line, or None."""
    monkeypatch.setattr("os.fsync", lambda _: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["idloss", "prepare", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    return call


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return mini_lfw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fnet(tmp_path_factory):
    """An FNet with drawn weights, as a `local-dir:` name."""
    path = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    save_for_hf(create_fnet("mobilefacenet"), path)
    return f"local-dir:{path}"


def test_lfw_from_end_to_end(home, command, tmp_path, capsys):
    out = tmp_path / "out"
    clean = tmp_path / "clean.txt"
    clean.write_text("".join(f"Person_{p}/Person_{p}_0002.jpg\n" for p in range(5)))
    words = ["--clean-list", clean, "--crop", "arcface", "--threads", 1]
    assert not command("lfw", home, out, *words)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"5 faces of 5 people, arcface 112x112, in {out}"
    assert "dropped 19: not in the clean list" in shown
    faces = open_prepared(out)
    assert faces.crop == "arcface"
    # once more: it is all there
    assert not command("lfw", home, out, *words)
    assert capsys.readouterr().out.splitlines() == shown


def test_celeba_and_its_splits(command, tmp_path, capsys):
    photos = celeba(tmp_path / "photos", "flat")
    assert not command("celeba", photos, tmp_path / "all")
    assert not command("celeba", photos, tmp_path / "test", "--split", "test")
    assert open_training(tmp_path / "all").names == tuple(f"00000{i}.jpg" for i in range(1, 5))
    assert open_training(tmp_path / "test").names == ("000003.jpg", "000004.jpg")
    assert "2 crops" not in capsys.readouterr().out


def test_what_is_dropped_is_told(command, tmp_path, capsys):
    rows = [f"{name}.jpg,{NUMBERS},{name}" for name in "abc"]
    photos = folder(tmp_path / "photos", rows)
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    error = command("folder", photos, tmp_path / "out")
    assert re.search(r"b\.jpg: unreadable image.*\n.*--skip-missing", error)
    assert error.count("\n") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert not command("folder", photos, tmp_path / "out", "--skip-missing")
    told = capsys.readouterr()
    assert "dropped 1: could not be read or aligned" in told.out
    assert "dropped.csv" in told.out
    assert "1 crops have the pixels of another" in told.out  # the fixture's photos are all alike
    assert "idloss: warning: left out:" in told.err


def test_people_of_an_evaluation_set_are_removed(home, fnet, command, tmp_path, capsys):
    out, words = tmp_path / "out", ["--exclude-overlap", home, "--fnet", fnet, "--threshold"]
    clean = tmp_path / "clean.txt"
    clean.write_text("".join(f"Person_0/Person_0_000{n}.jpg\n" for n in range(1, 5)))
    # of itself nothing is left but what an impossible cosine leaves
    assert not command("lfw", home, out, "--clean-list", clean, *words, 1.1)
    assert "also in" not in capsys.readouterr().out
    assert json.loads((out / "dataset.json").read_text())["overlap_fnet"] == fnet
    assert not command("lfw", home, tmp_path / "none", "--clean-list", clean, *words, 0.5)
    shown = capsys.readouterr().out
    assert "dropped 4: also in lfw" in shown
    assert re.search(r"removed: all of Person_0 is Person_\d \(cosine (0\.\d\d|1\.00)\)", shown)
    assert shown.startswith("0 faces")


def test_who_could_not_be_looked_for_is_told(home, fnet, command, tmp_path, capsys):
    """Among the training faces such a person may be, and nothing else would say so."""
    broken = shutil.copytree(home, tmp_path / "broken")
    photo = broken / "lfw/Person_5/Person_5_0003.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    photos = folder(tmp_path / "photos", [f"{name}.jpg,{NUMBERS},\x1b[2J{name}" for name in "abc"])
    words = ["--exclude-overlap", broken, "--fnet", fnet, "--threshold", 0.0, "--device", "cpu"]
    assert "Person_5_0003.jpg" in command("folder", photos, tmp_path / "out", *words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not command("folder", photos, tmp_path / "out", *words, "--skip-missing")
    shown = capsys.readouterr().out
    assert re.search(r"not looked for, .*who is in .*Person_5_0003\.jpg", shown)
    assert "removed: all of ?[2Ja is" in shown  # and no name of theirs commands the terminal
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["celebra", "HOME", "OUT"], "unknown kind of faces 'celebra'.*celeba"),
        (["celeba", "HOME", "OUT"], "no CelebA in .*photos beside a landmarks.csv.*prepare folder"),
        (["folder", "HOME", "OUT", "--split", "train"], "--split is CelebA's; 'folder' has none"),
        (["celeba", "HOME", "OUT", "--split", "trian"], "unknown split 'trian'.*train"),
        (["lfw", "HOME", "OUT", "--crop", "arcfase"], "unknown template 'arcfase'.*arcface"),
        (["lfw", "HOME", "OUT", "--exclude-overlap", "HOME", "--fnet", "sface"], "--threshold"),
        (["lfw", "OUT", "OUT"], "no folder and no archive"),
        (["lfw", "HOME", "HOME"], r"holds other files, and no dataset\.json"),
    ],
)
def test_wrong_words_are_told_briefly(words, said, home, command, tmp_path):
    places = {"HOME": home, "OUT": tmp_path / "out"}
    error = command(*(places.get(word, word) for word in words))
    assert re.search(said, error), error
    assert error.count("\n") <= 1
