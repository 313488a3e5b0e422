"""`idloss upscale` as the shell calls it."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from idloss.detection import Detections
from idloss.detection.base import DETECTORS
from idloss.geometry import get_template

POINTS = torch.tensor(get_template("sphereface").points) * 0.24 + 20


def pointing():
    box = torch.tensor([[20.0, 20, 45, 48]])
    return lambda images: [Detections(box, torch.ones(1), POINTS[None]) for _ in images]


@pytest.fixture
def upscale(command, monkeypatch):
    monkeypatch.setitem(DETECTORS, "pointing", pointing)
    return partial(command, "upscale", "--detector", "pointing", "--srnet", "bicubic")


def records(out):
    return [json.loads(line) for line in (out / "found.jsonl").read_text().splitlines()][1:]


def test_a_folder_with_faults_and_once_more(upscale, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    (photos / "deep").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8))
    for name in ("a.png", "deep/a.png", "line\nbreak.png"):
        picture.save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "loop").symlink_to(photos)
    error = upscale(photos, tmp_path / "gone.png", "-o", out)
    assert "broken.jpg: unreadable image" in error
    assert "gone.png: there is no such file" in error
    assert "3 faces in 3 photos" in capsys.readouterr().out
    crops, pictures = (sorted((out / name).iterdir()) for name in ("crops", "pictures"))
    assert [path.name for path in crops] == [path.name for path in pictures]
    assert len(crops) == 3
    assert Image.open(crops[0]).size == (24, 28)
    assert Image.open(pictures[0]).size == (384, 448)
    found = records(out)
    assert found[0]["faces"][0]["landmarks"][0] == pytest.approx(POINTS[0].tolist(), abs=0.01)
    assert (out / found[0]["faces"][0]["picture"]).is_file()
    # killed in the middle of a line: that photo is done again, and no other
    told = (out / "found.jsonl").read_bytes().splitlines(keepends=True)
    (out / "found.jsonl").write_bytes(b"".join(told[:2]) + told[2][:20])
    before = {path: path.stat().st_mtime_ns for path in crops}
    assert upscale(photos, "-o", out)
    assert sum(path.stat().st_mtime_ns != before[path] for path in crops) == 2
    assert sorted(r["photo"] for r in records(out)) == sorted(r["photo"] for r in found)
    assert "other settings" in upscale(photos, "--size", "56x48", "-o", out)


def test_a_pattern_and_a_size(upscale, tmp_path):
    Image.new("RGB", (80, 90), "red").save(tmp_path / "a.png")
    assert not upscale(tmp_path / "*.png", "--size", "56x48", "-o", tmp_path / "out")
    (picture,) = (tmp_path / "out" / "pictures").iterdir()
    assert Image.open(picture).size == (48, 56)
