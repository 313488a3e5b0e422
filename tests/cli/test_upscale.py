"""`idloss upscale` as the shell calls it."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from idloss import create_srnet
from idloss.detection import Detections
from idloss.detection.base import DETECTORS
from idloss.geometry import get_template

POINTS = torch.tensor(get_template("sphereface").points) * 0.24 + 20
CROPS = ("--crop", "sphereface", "--srnet", "edsr16_64_id", "--device", "cpu")


def pointing():
    box = torch.tensor([[20.0, 20, 45, 48]])
    return lambda images: [Detections(box, torch.ones(1), POINTS[None]) for _ in images]


@pytest.fixture
def upscale(command, monkeypatch):
    monkeypatch.setitem(DETECTORS, "pointing", pointing)
    return partial(command, "upscale", "--detector", "pointing", "--srnet", "bicubic")


def records(out):
    return [json.loads(line) for line in (out / "found.jsonl").read_text().splitlines()]


def contents(folder):
    """All files below a folder, but for the order of lines, which is that of the file system."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): sorted(path.read_bytes().splitlines(keepends=True))
        for path in files
    }


def noise(path, height=90, width=80):
    """Write a picture that no other is like."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def test_a_folder_with_faults_and_once_more(upscale, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    for name in ("a.png", "deep/a.png", "line\nbreak\x1b[2J.png", "x" * 240 + ".png"):
        noise(photos / name)
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:5000])
    Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
    Image.new("1", (9_000, 9_000)).save(photos / "large.png")
    os.mkfifo(photos / "waits.png")
    (photos / "loop").symlink_to(photos)
    (photos / "round.png").symlink_to("round.png")
    (photos / b"\xff.png".decode(errors="surrogateescape")).symlink_to(photos / "nowhere.png")
    outside = {path for path in tmp_path.rglob("*") if out not in path.parents}
    error = upscale(photos, photos / "a.png", tmp_path / "gone.png", "-o", out)
    assert "8 could not be read:" in error
    for said in (
        "broken.jpg: unreadable image",
        "cut.png: unreadable image",
        "bomb.png: unreadable image (DecompressionBombError",
        "large.png: 9000x9000 pixels, more than",
        "waits.png: it is no regular file",
        "round.png: Too many levels of symbolic links",
        "\\udcff.png: No such file",
        "gone.png: there is no such file",
    ):
        assert said in error
    assert "4 faces in 4 photos" in capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*") if out not in path.parents} == outside | {out}
    crops, pictures = (sorted((out / name).iterdir()) for name in ("crops", "pictures"))
    assert [path.name for path in crops] == [path.name for path in pictures]
    assert len(crops) == 4  # two of them of photos of one name
    assert Image.open(crops[0]).size == (24, 28)
    assert Image.open(pictures[0]).size == (384, 448)
    assert Image.open(out / "sheet.png").size == (4 * (2 * 192 + 8) + 8, 224 + 16)
    found = records(out)
    assert len(found) == 12
    (first,) = (one for one in found if one["photo"] == str(photos / "a.png"))
    assert first["faces"][0]["landmarks"][0] == pytest.approx(POINTS[0].tolist(), abs=0.01)
    assert first["faces"][0]["restored"]
    assert (out / first["faces"][0]["picture"]).is_file()
    # what failed is tried again, and no other
    before = {path: path.stat().st_mtime_ns for path in (*crops, *pictures)}
    noise(photos / "broken.jpg")
    assert "6 could not be read:" in upscale(photos, "-o", out)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list((out / "crops").iterdir())) == 5
    assert "other settings" in upscale(photos, "--size", "56x48", "-o", out)


def test_a_pattern_a_size_and_faces_pasted_in(upscale, tmp_path):
    Image.new("RGB", (80, 90), "red").save(tmp_path / "a.png")
    assert not upscale(tmp_path / "*.png", "--size", "56x48", "--paste", "-o", tmp_path / "out")
    (picture,) = (tmp_path / "out" / "pictures").iterdir()
    assert Image.open(picture).size == (48, 56)
    (pasted,) = (tmp_path / "out" / "pasted").iterdir()
    assert Image.open(pasted).size == (320, 360)


def test_crops_of_any_size(upscale, tmp_path, capsys):
    """For which no detector is needed, nor its weights."""
    for name, size in (("a", (28, 24)), ("b", (7, 6)), ("c", (112, 96)), ("square", (50, 50))):
        noise(tmp_path / "in" / f"{name}.png", *size)
    options = ("--detector", "none", "--crop", "sphereface")
    error = upscale(tmp_path / "in", *options, "-o", tmp_path / "out")
    assert "square.png: a 'sphereface' crop is 112x96 or of the same aspect, got 50x50" in error
    said = capsys.readouterr().out
    assert "3 faces in 3 photos, 1 of them with pixels enough without an SRNet" in said
    sizes = {Image.open(path).size for path in (tmp_path / "out" / "crops").iterdir()}
    assert sizes == {(24, 28), (6, 7), (96, 112)}


DYING = """
import os, signal
import idloss.cli, idloss.upscaling
write = idloss.upscaling._write
def last(path, content):
    write(path, content)
    if path.parent.name == "found" and len(list(path.parent.glob("*.json"))) >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
idloss.upscaling._write = last
idloss.cli.main()
"""


def test_killed_in_the_middle_and_started_again(command, tmp_path):
    for place in range(60):
        noise(tmp_path / "in" / f"{place}.png", 28, 24)
    words = ["upscale", str(tmp_path / "in"), *CROPS, "-o", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", DYING, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = tmp_path / "out" / "found"
    files = [path for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".png", ".json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    done = {path.stem for path in files if path.parent == found}
    assert 5 <= len(done) < 60
    assert not (tmp_path / "out" / "found.jsonl").exists()
    assert not command(*words)
    assert len({record["photo"] for record in records(tmp_path / "out")}) == 60
    assert len(records(tmp_path / "out")) == 60
    kept = [path for path in files if path.stem.removesuffix("_0") in done]
    assert len(kept) == 3 * len(done)
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    words[-1] = str(tmp_path / "whole")
    assert not command(*words)
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


def test_two_processes_write_what_one_does(command, tmp_path):
    """And join without being told that there is no GPU."""
    for place, size in enumerate([(28, 24), (14, 12), (7, 6), (112, 96)] * 3):
        noise(tmp_path / "in" / f"{place}.png", *size)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    crops = CROPS if torch.accelerator.is_available() else CROPS[: CROPS.index("--device")]
    words = ["upscale", str(tmp_path / "in"), *crops, "-o"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "idloss.cli"]
    run = subprocess.run(
        [sys.executable, *launch, *words, tmp_path / "two"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "12 faces in 12 photos, 3 of them" in run.stdout  # behind what gloo of torch 2.8 says
    assert run.stdout.count("found.jsonl and sheet.png in") == 1
    assert "broken.jpg: unreadable image" in run.stderr
    assert "broken.jpg: unreadable image" in command(*words, tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_weights_that_were_replaced_and_folders_without_pictures_are_told(command, tmp_path):
    """What the weights before had made was taken for theirs."""
    noise(tmp_path / "photos" / "a.png", 112, 96)
    srnet = create_srnet("edsr16_64", depth=1, width=8)
    words = ("--crop", "sphereface", "--srnet", f"local-dir:{tmp_path / 'net'}", "--device", "cpu")
    for run in range(2):
        torch.nn.init.normal_(srnet.tail.weight)
        save_for_hf(srnet, tmp_path / "net", model_args={"depth": 1, "width": 8})
        error = command("upscale", tmp_path / "photos", "-o", tmp_path / "out", *words)
        assert "holds a run with other settings" in error if run else not error
    (tmp_path / "none").mkdir()
    said = command(
        "upscale", tmp_path / "none", "-o", tmp_path / "more", "--srnet", "bicubic", *words[:2]
    )
    assert "there are no pictures in" in said
