"""Verification while training: figures in a log, faces on a sheet, and no trace in the run."""

import csv

import numpy as np
import pytest
import torch
from minilfw import mini_lfw
from nets import TinySRNet, tiny_fnet
from PIL import Image
from tinytraining import assert_same, losses, tiny_run


def read(folder):
    with (folder / "validation.csv").open() as file:
        return list(csv.DictReader(file))


def test_pairs_are_verified_every_so_often_and_training_does_not_notice(tmp_path, monkeypatch):
    """By the first FNet of the recipe, and at the end too; with faces on a sheet."""
    named = []

    def fnet(name, pretrained):
        named.append((name, pretrained))
        return tiny_fnet()

    monkeypatch.setattr("idloss.training.runs.create_fnet", fnet)
    pairs = {"validate_on": mini_lfw(tmp_path / "lfw", people=4, photos=3), "validate_every": 3}
    for name, validation in (("judged", pairs), ("alone", {})):
        fields = {"iterations": 5, "sizes": ["14x12", "7x6"], "fnets": {"one": 1, "two": 2}}
        torch.manual_seed(0)
        tiny_run(tmp_path / name, srnet=TinySRNet(), **fields, **validation)
    assert_same(tmp_path / "judged", tmp_path / "alone")
    assert named == [("one", True)]
    rows = read(tmp_path / "judged")
    assert [row["step"] for row in rows] == ["3", "5"]
    assert rows[0].keys() == {"step", "14x12", "7x6"}
    assert all(0 <= float(row[size]) <= 1 for row in rows for size in ("14x12", "7x6"))
    with Image.open(tmp_path / "judged/pictures/step-000003/faces-7x6.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_a_validation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    broken = [6]

    def judge(network, step):
        assert not network.training
        if step in broken:
            raise OSError("the disk of the pairs is gone")
        return {"figure": step}

    monkeypatch.setattr("idloss.training.runs._validation", lambda *_: judge)
    with pytest.raises(OSError, match="gone"):
        tiny_run(tmp_path, validate_every=3)
    broken.clear()
    tiny_run(tmp_path, validate_every=3, resume=True)
    assert [row["step"] for row in read(tmp_path)] == ["3", "6", "8"]
    assert list(losses(tmp_path)) == list(range(1, 9))
