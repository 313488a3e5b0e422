"""Each hypothesis does what it says, and the study that asks for them can be read."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from pytorch_metric_learning.losses import NTXentLoss
from torch.nn import functional as F

from idloss import IdentityPreservedLoss, create_fnet, create_srnet
from idloss.degradation import _degradations, get_degradation
from idloss.losses import DISTANCES
from idloss.training import load_recipe

STUDIES = [ROOT / "zoo" / "studies" / name for name in ("hypotheses.yaml", "factors.yaml")]


@pytest.fixture(scope="module")
def hypotheses():
    """The module, as study.py imports it; its degradation is in no other test's list."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        module = importlib.import_module("hypotheses")  # which registers once in a process
        _degradations.pop("antialiased", None)
        patch.setitem(_degradations, "antialiased", module.AntialiasedDegradation)
        yield module


def edgeface(shared):
    return f"local-dir:{shared('weights/edgeface_xxs')}"


def test_every_variant_is_a_recipe_and_every_loss_a_variant(hypotheses):
    asked = set()
    for study in map(yaml.safe_load, map(Path.read_text, STUDIES)):
        for variant, fields in study["variants"].items():
            recipe = load_recipe(study["recipe"], [*study["fields"], *fields])
            length = {"half_as_long": 12_000, "twice_as_long": 48_000}.get(variant, 24_000)
            assert recipe.iterations * recipe.batch_size == length, variant
        assert study["module"] == "hypotheses"
        assert study.get("people", {}).keys() <= study["variants"].keys()
        asked |= study["variants"].keys()
    assert hypotheses.LOSSES.keys() < asked


def test_info_nce_is_that_of_pytorch_metric_learning(hypotheses):
    a, b = torch.randn(2, 6, 32)
    places = torch.arange(6)
    # each SR face an anchor, its own HR the one positive, the others' the negatives
    negatives = (~torch.eye(6, dtype=torch.bool)).nonzero().unbind(1)
    theirs = NTXentLoss(temperature=0.1)(
        a, indices_tuple=(places, places, *negatives), ref_emb=b, ref_labels=None
    )
    torch.testing.assert_close(DISTANCES.find("info_nce")(a, b).mean(), 0.1 * theirs)


def test_a_face_of_twice_the_norm_weighs_twice(hypotheses):
    a, b = torch.randn(2, 2, 32)
    b = F.normalize(b, dim=1) * torch.tensor([[2.0], [1.0]])
    plain = DISTANCES.find("cosine")(a, b)
    weighted = DISTANCES.find("norm_weighted")(a, b)
    torch.testing.assert_close(weighted, plain * torch.tensor([4 / 3, 2 / 3]))


@pytest.mark.parametrize("size", [(7, 6), (14, 12), (28, 24)])
def test_antialiased_faces_are_pillows(hypotheses, size):
    face = torch.randint(256, (1, 3, 112, 96), dtype=torch.uint8)
    picture = Image.fromarray(face[0].permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
    ours = get_degradation("antialiased")(face, size, seeds=[0])[0].permute(1, 2, 0)
    np.testing.assert_allclose(255 * ours.numpy(), theirs, atol=1.01)
    theirs = get_degradation("bicubic")(face, size, seeds=[0])[0].permute(1, 2, 0)
    assert float((ours - theirs).abs().max()) > 0.1


def test_train_mode_is_that_of_torch(hypotheses):
    forgotten = hypotheses.TrainMode("mobilefacenet.celeba_aaf")
    x = torch.randn(6, 3, 112, 112)
    fnet = create_fnet("mobilefacenet.celeba_aaf", pretrained=True)
    in_eval, in_train = fnet.eval()(x), fnet.train()(x)
    loss = IdentityPreservedLoss(forgotten, crop="arcface", value_range=(-1, 1))
    found = loss(x.clamp(-1, 1).requires_grad_(), x.clamp(-1, 1))  # quickens what can be
    assert found < 1e-5
    torch.testing.assert_close(loss.encoders[0].fnet(x), in_train, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(in_train, in_eval).max() < 0.9


def test_icnr_begins_as_nearest_neighbour(hypotheses):
    network = create_srnet("edsr16_64_icnr", depth=1, width=8)
    up = F.pixel_shuffle(network.upsample[0](torch.rand(1, 8, 5, 4)), 2)
    assert torch.equal(up, F.interpolate(up[..., ::2, ::2], scale_factor=2, mode="nearest"))
    plain = create_srnet("edsr16_64", depth=1, width=8)
    up = F.pixel_shuffle(plain.upsample[0](torch.rand(1, 8, 5, 4)), 2)
    assert not torch.equal(up, F.interpolate(up[..., ::2, ::2], scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("size", [(7, 6), (14, 12), (28, 24)])
def test_enlarged_faces_come_out_as_large_as_hr(hypotheses, size):
    network = create_srnet("edsr16_64_enlarged", depth=1, width=8)
    assert network(torch.rand(2, 3, *size)).shape == (2, 3, 112, 96)


def test_only_sr_is_moved(hypotheses, shared):
    moved = hypotheses.Moved(edgeface(shared))
    x = torch.rand(2, 3, 112, 112)
    assert torch.equal(moved(x), moved.fnet(x))
    assert not torch.allclose(moved(x.requires_grad_()), moved.fnet(x), atol=1e-3)


def test_layers_weigh_alike(hypotheses, shared):
    layers = hypotheses.Layers(edgeface(shared))
    features = layers(torch.rand(2, 3, 112, 112))
    assert features.shape == (2, layers.num_features)
    torch.testing.assert_close(features.square().sum(1), torch.tensor([3.0, 3.0]))


def test_one_fnet_is_drawn(hypotheses):
    fnets = [create_fnet("mobilefacenet"), create_fnet("edgeface_xxs")]
    loss = hypotheses.Drawn(fnets, crop="arcface")
    sr, hr = torch.rand(2, 2, 3, 112, 112)
    single = [IdentityPreservedLoss(fnet, crop="arcface").eval()(sr, hr) for fnet in fnets]
    seen = {min(range(2), key=lambda i: abs(found - single[i])) for found in twelve(loss, sr, hr)}
    assert seen == {0, 1}
    targets = loss.embed(hr)
    for found in twelve(loss, sr, None, target_features=targets):
        assert min(abs(found - one) for one in single) < 1e-6
    with pytest.raises(TypeError, match="weight"):
        loss(sr, hr, weight=torch.ones(2))


def twelve(loss, sr, *hr, **given):
    return [loss(sr.requires_grad_(), *hr, **given).detach() for _ in range(12)]


def test_lambda_rises(hypotheses):
    loss = hypotheses.WarmedUp(create_fnet("mobilefacenet"), crop="arcface", steps=4)
    sr, hr = torch.rand(2, 2, 3, 112, 112)
    sr.requires_grad_()
    totals, parts = zip(*(loss(sr, hr) for _ in range(6)), strict=True)
    lambdas = [
        float((total.detach() - part["image"]) / part["identity"])
        for total, part in zip(totals, parts, strict=True)
    ]
    assert lambdas == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("name", ["moved", "layers", "warmed_up", "train_mode", "bgr"])
def test_losses_are_made_of_a_recipe(hypotheses, shared, name):
    asked = ["iterations=3", "identity_weight=0.25", "distance=angular", "image_loss=mse"]
    recipe = load_recipe("paper_edsr16_64_id", [f"fnet={edgeface(shared)}", *asked])
    loss = hypotheses.LOSSES[name](recipe)
    assert (loss.weight, loss.image_loss) == (0.25, F.mse_loss)
    assert loss.identity.distance is DISTANCES.find("angular")
    sr, hr = torch.rand(2, 2, 3, 112, 96)
    total, parts = loss(sr.requires_grad_(), hr)
    total.backward()
    assert math.isfinite(parts["identity"])
    assert sr.grad.abs().sum() > 0
