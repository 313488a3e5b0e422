"""Verification while training: figures in a log, faces on a sheet, and no trace in the run."""

import csv

import numpy as np
import pytest
import torch
from minilfw import mini_lfw
from nets import tiny_fnet
from PIL import Image
from tinytraining import FIELDS, losses, tiny_edsr, tiny_faces, tiny_run

from idloss import HallucinationLoss
from idloss.training import Recipe
from idloss.training.engine import Engine, create_accelerator
from idloss.training.tasks import Hallucination, HallucinationTask


def engine(folder, validate, every=0):
    recipe = Recipe(**FIELDS, validate_every=every)
    accelerator = create_accelerator(recipe, folder)
    srnet = tiny_edsr()
    module = Hallucination(srnet, HallucinationLoss(tiny_fnet(), crop="sphereface"))
    black = lambda hr, size, *, seeds: torch.zeros(len(hr), 3, *size)  # noqa: E731
    task = HallucinationTask(module, srnet, tiny_faces(), recipe, accelerator.device, black)
    return Engine(task, recipe, folder, accelerator, validate=validate)


def read(folder):
    with (folder / "validation.csv").open() as file:
        return list(csv.DictReader(file))


def test_pairs_are_verified_every_so_often_and_at_the_end(tmp_path, monkeypatch):
    """By the first FNet of the recipe; with faces on a sheet."""
    named = []

    def fnet(name, pretrained):
        named.append((name, pretrained))
        return tiny_fnet()

    monkeypatch.setattr("idloss.training.runs.create_fnet", fnet)
    data = mini_lfw(tmp_path / "lfw", people=4, photos=3)
    fields = {"validate_on": data, "validate_every": 3, "sizes": ["14x12", "7x6"]}
    tiny_run(tmp_path / "run", iterations=5, fnets={"one": 1, "two": 2}, **fields)
    assert named == [("one", True)]
    rows = read(tmp_path / "run")
    assert [row["step"] for row in rows] == ["3", "5"]
    assert rows[0].keys() == {"step", "14x12", "7x6"}
    assert all(0 <= float(row[size]) <= 1 for row in rows for size in ("14x12", "7x6"))
    with Image.open(tmp_path / "run/pictures/step-000003/faces-7x6.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_training_does_not_notice(tmp_path):
    seen = []

    def judge(network, step):
        seen.append((step, network.training))
        network.eval().to(torch.float64)
        for parameter in network.parameters():
            parameter.data.zero_()
        return {"figure": 1.0}

    engine(tmp_path / "judged", judge, every=2).run()
    engine(tmp_path / "alone", None).run()
    assert [step for step, _ in seen] == [2, 4, 6, 8]
    assert losses(tmp_path / "judged") == losses(tmp_path / "alone")


def test_a_validation_that_was_cut_off_is_made_up_for(tmp_path):
    def fails(network, step):
        if step == 6:
            raise OSError("the disk of the pairs is gone")
        return {"figure": step}

    with pytest.raises(OSError, match="gone"):
        engine(tmp_path, fails, every=3).run()
    engine(tmp_path, lambda network, step: {"figure": step}, every=3).run(resume=True)
    assert [row["step"] for row in read(tmp_path)] == ["3", "6", "8"]
    assert list(losses(tmp_path)) == list(range(1, 9))
