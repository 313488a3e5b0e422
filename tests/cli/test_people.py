"""`idloss verify` and `idloss search` as the shell calls them."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from idloss.detection import Detections
from idloss.detection.base import DETECTORS
from idloss.geometry import get_template

POINTS = torch.tensor(get_template("sphereface").points)


def seeing():
    """A detector that finds a face for each 100 columns of a photo, none in a narrower one."""

    def find(images):
        found = []
        for image in images:
            count = image.shape[-1] // 100
            points = torch.stack(
                [POINTS * 0.6 + torch.tensor([100.0 * k + 10, 10]) for k in range(count)]
                or [POINTS]
            )
            boxes = torch.cat((points.amin(1), points.amax(1)), 1)
            found.append(Detections(boxes[:count], torch.ones(count), points[:count]))
        return found

    return find


def photo(path, seed=0, width=100):
    pixels = np.random.default_rng(seed).integers(0, 255, (10, width // 10, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((width, 100)).save(path)
    return path


@pytest.fixture
def people(command, fnet, monkeypatch):
    monkeypatch.setitem(DETECTORS, "seeing", seeing)
    options = ("--detector", "seeing", "--srnet", "bicubic", "--fnet", fnet, "--device", "cpu")
    return lambda what, *words: command(what, *words, *options)


@pytest.fixture
def verify(people):
    return partial(people, "verify")


def test_verify_says_how_often_strangers_are_as_alike(verify, command, lfw, fnet, tmp_path, capsys):
    one, other = photo(tmp_path / "a.png"), photo(tmp_path / "b.png", seed=1)
    assert not verify(one, other)
    bare = capsys.readouterr().out
    assert "similarity 0." in bare
    assert "This is a bare cosine" in bare
    assert "calibration.csv" in bare
    out = tmp_path / "out"
    words = ("--fnet", fnet, "--srnet", "bicubic", "--size", "28x24", "--no-figures", "--out", out)
    assert not command("evaluate", lfw, *words)
    assert "calibration.csv" in capsys.readouterr().out
    small = photo(tmp_path / "c.png", seed=2, width=48)
    for path, size in ((other, "112x96"), (small.with_name("crop.png"), "28x24")):
        Image.open(other).resize((96, 112)).save(one)
        crop = Image.open(other).resize((96, 112) if path == other else (24, 28))
        crop.save(path)
        assert not verify(one, path, "--crop", "sphereface", "--table", out / "calibration.csv")
        said = capsys.readouterr().out
        assert f"{'both faces' if path == other else 'one face'} at {size}" in said
        assert "pairs of one person" in said
        assert "bare" not in said
    # both of few pixels: that was not measured
    assert not verify(path, path, "--crop", "sphereface", "--table", out / "calibration.csv")
    assert "bare cosine" in capsys.readouterr().out
    told = verify(one, other, "--crop", "sphereface", "--table", out / "results.csv")
    assert "is no calibration.csv" in told


def test_verify_wants_one_face(verify, tmp_path, capsys):
    one, two = photo(tmp_path / "1.png"), photo(tmp_path / "2.png", width=200)
    none = photo(tmp_path / "0.png", width=60)
    assert "0.png: no face was found; say --crop TEMPLATE if" in verify(one, none)
    told = verify(one, two)
    assert "2.png has several faces, choose by --face-b N" in told
    assert "2: from (1" in told
    assert not verify(one, two, "--face-b", "1")
    assert "similarity" in capsys.readouterr().out
    assert "has 2 faces, there is no --face-b 3" in verify(one, two, "--face-b", "3")
    assert "gone.png: No such file" in verify(one, tmp_path / "gone.png")


def test_search_keeps_its_gallery_and_fails_where_something_failed(people, tmp_path, capsys):
    search, gallery = partial(people, "search"), tmp_path / "gallery"
    for seed in range(4):
        photo(gallery / "deep" / f"{seed}.png", seed)
    probe = photo(tmp_path / "probe.png", 2)
    words = (probe, gallery, "--index", gallery / "index", "--top", "2")
    assert not search(*words)
    said = capsys.readouterr().out
    assert "4 faces in the gallery" in said
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    assert len(lines) == 2
    assert lines[0].startswith(f"  1.000  {gallery / 'deep' / '2.png'}, at (")
    assert "bare cosine" in said
    (gallery / "broken.png").write_bytes(b"nothing")
    none = photo(tmp_path / "none.png", width=60)
    error = search(tmp_path / "*.png", *words[1:])
    assert "2 faults" in error
    assert f"{none}: no face was found" in error
    assert "broken.png: unreadable image" in error
    assert "1.000" in capsys.readouterr().out
    assert "there is no such file" in search(tmp_path / "gone.png", *words[1:])
    assert "other networks" in people("search", *words, "--crop", "sphereface")
    (empty := tmp_path / "empty").mkdir()
    for places in ((empty, gallery), (probe, empty)):
        assert f"{empty}: no picture or face is there" in search(*places)
