"""The example, piece by piece on a few drawn faces, and whole on a few real ones."""

import importlib.util
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import ROOT

from idloss import HallucinationLoss, create_srnet
from idloss.data import EvaluationSet
from idloss.data.synthetic import SyntheticFaces

SCRIPT = ROOT / "examples" / "train_celeba.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_celeba", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    return SyntheticFaces(8, 4).render(progress=False)


@pytest.fixture(scope="module")
def fnet(example, drawn):
    torch.manual_seed(0)
    return example.train_fnet(example.SmallFNet(), drawn, example.Recipe(40, 16, 2e-3))


def small_srnet():
    torch.manual_seed(0)
    return create_srnet("edsr16_64", depth=1, width=8)


def test_rate_is_that_of_the_released_schedule(example):
    recipe = example.Recipe()
    rates = {i: recipe.rate(i) for i in (1, 24_999, 25_000, 49_999, 50_000)}
    assert rates == {1: 1e-4, 24_999: 1e-4, 25_000: 5e-5, 49_999: 5e-5, 50_000: 2.5e-5}


def test_batches_hold_every_face_once_and_drop_the_rest(example):
    batches = example.endless_batches(10, 4, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches), next(batches)])
    assert len(epoch.unique()) == 8
    assert len(torch.cat([next(batches), next(batches)]).unique()) == 8
    with pytest.raises(SystemExit, match="lower --batch-size"):
        next(example.endless_batches(3, 4, torch.Generator()))


def test_training_lowers_what_it_is_told_to(example, drawn, fnet):
    """The same seed and budget; the identity term is lower where it was trained on."""
    recipe = example.Recipe(60, 8, 3e-3, factors=(8,))
    judge = HallucinationLoss(fnet).identity.eval()
    after = {}
    for weight in (0.0, 5.0):
        criterion = HallucinationLoss(fnet, weight=weight)
        srnet = example.train_srnet(small_srnet(), criterion, drawn.crops, recipe)
        assert not srnet.training
        with torch.no_grad():
            hr = drawn.crops.float() / 255
            lr = example.resize(drawn.crops, (14, 12)).float() / 255
            after[weight] = judge(srnet(lr), hr).item()
    assert after[5.0] < after[0.0]


def test_two_runs_of_one_seed_are_equal(example, drawn, fnet):
    runs = [
        example.train_srnet(
            small_srnet(), HallucinationLoss(fnet), drawn.crops, example.Recipe(2, 8)
        ).state_dict()
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_report_prints_a_table_and_saves_a_picture(example, drawn, fnet, tmp_path):
    pairs = example.random_pairs(drawn, 40, seed=0)
    assert pairs.same.float().mean() == 0.5
    assert (drawn.labels[pairs.first] == drawn.labels[pairs.second]).equal(pairs.same)
    with example.console.capture() as shown:
        example.report(
            EvaluationSet("drawn", drawn, pairs), {"small": fnet}, {"ours": small_srnet()}, tmp_path
        )
    for word in ("bilinear", "bicubic", "ours", "faces.png"):
        assert word in shown.get()
    assert {"verification.json", "faces.png", "faces.pdf"} <= {p.name for p in tmp_path.iterdir()}


def test_on_real_faces(shared, tmp_path):
    """Sixteen photos of CelebA, the real recogniser, two steps, as a user runs it."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    weights = shared("weights/arcface_mobilefacenet.pth")
    add = "import sys; from idloss import weights; weights.add(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", add, "mobilefacenet", str(weights)], env=environment, check=True
    )
    photos = tmp_path / "celeba_wild"
    with tarfile.open(shared("data/celeba_wild.tar")) as archive:
        table = archive.extractfile("celeba_wild/landmarks.csv").read().decode().splitlines()
        rows = table[1:17]
        archive.extractall(
            tmp_path,
            [archive.getmember(f"celeba_wild/{row.split(',')[0]}") for row in rows],
            filter="data",
        )
    (photos / "landmarks.csv").write_text("\n".join([table[0], *rows]) + "\n")
    options = "--fnet mobilefacenet --iterations 2 --batch-size 4 --weight 0 0.5 --bfloat16"
    command = [sys.executable, str(SCRIPT), "--data", str(photos), *options.split()]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "16 faces" in done.stdout
    for weight in ("0", "0.5"):
        folder = tmp_path / "out" / f"edsr16_64_lambda_{weight}"
        assert create_srnet(f"local-dir:{folder}", pretrained=True).scale == 4
