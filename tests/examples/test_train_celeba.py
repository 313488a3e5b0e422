"""The example, piece by piece on a few drawn faces, and whole on a few real ones."""

import importlib.util
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from conftest import ROOT
from tinytraining import losses

from idloss import HallucinationLoss, create_fnet, create_srnet
from idloss.data import EvaluationSet
from idloss.data.synthetic import SyntheticFaces
from idloss.resample import resize, to_float
from idloss.training import FNetRecipe, Recipe, load_recipe, train

SCRIPT = ROOT / "examples" / "train_celeba.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_celeba", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn():
    return SyntheticFaces(8, 4).render(progress=False)


@pytest.fixture(scope="module")
def fnet():
    torch.manual_seed(0)
    recipe = load_recipe("fnet_small", [], FNetRecipe)
    return create_fnet(recipe.fnet, **recipe.fnet_options).eval()


def small_srnet():
    torch.manual_seed(0)
    return create_srnet("edsr16_64", depth=1, width=8)


def test_training_lowers_what_it_is_told_to(drawn, fnet, tmp_path):
    """The same seed and budget; the identity term is lower where it was trained on."""
    judge = HallucinationLoss(fnet).identity.eval()
    after = {}
    for weight in (0.0, 5.0):
        recipe = Recipe(
            iterations=60,
            batch_size=8,
            learning_rate=3e-3,
            factors=(8,),
            identity_weight=weight,
            device="cpu",
            trackers=(),
        )
        srnet = train(
            recipe,
            tmp_path / f"{weight}",
            faces=drawn,
            srnet=small_srnet(),
            criterion=HallucinationLoss(fnet, weight=weight),
        )
        assert not srnet.training
        with torch.no_grad():
            hr, lr = to_float(drawn.crops), to_float(resize(drawn.crops, (14, 12)))
            after[weight] = judge(srnet(lr), hr).item()
    assert after[5.0] < after[0.0]


def test_report_prints_a_table_and_saves_a_picture(example, drawn, fnet, tmp_path):
    pairs = example.random_pairs(drawn, 40, seed=0)
    assert pairs.same.float().mean() == 0.5
    assert (drawn.labels[pairs.first] == drawn.labels[pairs.second]).equal(pairs.same)
    with example.console.capture() as shown:
        example.report(
            EvaluationSet("drawn", drawn, pairs), {"small": fnet}, {"ours": small_srnet()}, tmp_path
        )
    for word in ("bilinear", "bicubic", "ours", "faces.png"):
        assert word in shown.get().replace("\n", "")  # a long path is broken over lines
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
    command = [sys.executable, str(SCRIPT), "--data", str(photos), "--fnet", "mobilefacenet"]
    command += ["--weight", "0", "0.5", "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["iterations=2", "batch_size=4", "precision=bf16", "device=cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for weight in ("0", "0.5"):
        folder = tmp_path / "out" / f"edsr16_64_lambda_{weight}"
        assert create_srnet(f"local-dir:{folder}/model", pretrained=True).scale == 4
        assert list(losses(folder)) == [2]
    # both learnt from the same HR features, if at all: computed once, kept beside the faces
    assert len(list((tmp_path / "out" / "faces").glob("features-*.npy"))) == 1
