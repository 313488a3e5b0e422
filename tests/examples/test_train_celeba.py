"""The example, piece by piece on a few drawn faces, and whole on a few real ones."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tinytraining import losses

from idloss import HallucinationLoss, create_fnet, create_srnet
from idloss.data import EvaluationSet, draw_faces, draw_pairs
from idloss.resample import resize, to_float
from idloss.training import FNetRecipe, Recipe, load_recipe, train


@pytest.fixture(scope="module")
def drawn():
    return draw_faces(8, 4)


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
    script = example("train_celeba")
    pairs = draw_pairs(drawn, 40)
    with script.console.capture() as shown:
        script.report(
            EvaluationSet("drawn", drawn, pairs), {"small": fnet}, {"ours": small_srnet()}, tmp_path
        )
    for word in ("bilinear", "bicubic", "ours", "faces.png"):
        assert word in shown.get().replace("\n", "")  # a long path is broken over lines
    assert {"verification.json", "faces.png", "faces.pdf"} <= {p.name for p in tmp_path.iterdir()}


def test_on_real_faces(photos, shared, tmp_path):
    """Sixteen photos of CelebA, the real recogniser, two steps, as a user runs it."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    weights = shared("weights/arcface_mobilefacenet.pth")
    add = "import sys; from idloss import weights; weights.add(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", add, "mobilefacenet", str(weights)], env=environment, check=True
    )
    command = [sys.executable, str(ROOT / "examples" / "train_celeba.py")]
    command += ["--data", str(photos(16)), "--fnet", "mobilefacenet"]
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
