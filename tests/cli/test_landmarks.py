"""`idloss landmarks` as the shell calls it."""

import torch
from minilfw import mini_lfw

from idloss.detection import Detections
from idloss.detection.base import DETECTORS
from idloss.geometry import get_template

POINTS = torch.tensor(get_template("sphereface").points)


def test_points_for_evaluate(command, tmp_path, monkeypatch, capsys, fnet):
    """LFW without its table becomes one that evaluate takes; what cannot be read is told."""
    found = Detections(torch.tensor([[20.0, 20, 90, 110]]), torch.ones(1), POINTS[None] + 20)
    monkeypatch.setitem(DETECTORS, "pointing", lambda: lambda _: [found])
    data, own = mini_lfw(tmp_path / "data", people=3, photos=3), tmp_path / "own.csv"
    (data / "lfw_landmarks.csv").unlink()
    assert not command("landmarks", data, own, "--detector", "pointing")
    assert "five points of 9 photos" in capsys.readouterr().out
    options = ("--fnet", fnet, "--srnet", "bicubic", "--size", "7x6", "--no-figures")
    folder = ("--landmarks", own, "--out", tmp_path / "results")
    assert "idloss landmarks" in command("evaluate", data, *options, "--out", tmp_path / "none")
    assert not command("evaluate", data, *options, *folder)
    photo = next(path for path in data.rglob("*.jpg"))
    photo.write_bytes(b"no picture")
    error = command("landmarks", data, own, "--detector", "pointing")
    assert "unreadable image" in error
    assert "The rest is in the table." in error
