"""The engine: the paper's golden steps, and the same numbers however a run is carried out."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tinytraining import FIELDS, assert_same, losses, tiny_edsr, tiny_faces, tiny_run, weights
from torch import nn

from idloss import HallucinationLoss, create_srnet
from idloss.data import AlignedFaces
from idloss.degradation import draw_batch
from idloss.srnets import EDSR
from idloss.srnets.edsr import edsr_released
from idloss.training import Recipe, TrainingStoppedError, load_recipe, train
from idloss.training.batches import shares, shuffled_batches
from idloss.training.engine import create_optimizer, create_schedule
from idloss.training.recipe import RunOptions


def test_golden_steps_through_the_engine(
    golden, released_edsr, sface_seeded, tmp_path, monkeypatch
):
    """Six steps of the released training, fp32, no compile, HR features in each step."""
    factors = golden["train_factors"].tolist()

    def as_released(step, count, *, seed, sizes):
        drawn = draw_batch(step, count, seed=seed, sizes=sizes)
        size = (112 // factors[step - 1], 96 // factors[step - 1])
        return drawn._replace(size=size, mirrored=torch.zeros(count, dtype=torch.bool))

    monkeypatch.setattr("idloss.training.tasks.draw_batch", as_released)
    srnet = EDSR(depth=2, width=16)
    srnet.load_state_dict(edsr_released(released_edsr("edsr_2_16")))
    crops = torch.from_numpy(golden["aligned_bgr"]).permute(0, 3, 1, 2).flip(1).contiguous()
    faces = AlignedFaces(crops, tuple(golden["names"].tolist()), None, (), "sphereface")
    recipe = Recipe(
        **FIELDS | {"iterations": 6, "learning_rate": 1e-4, "decay_every": 25_000},
        precision="fp32",
        compile="no",
        store_hr_features=False,
    )
    criterion = HallucinationLoss(sface_seeded, weight=0.5, crop="sphereface")
    trained = train(recipe, tmp_path, faces=faces, srnet=srnet, criterion=criterion)

    found = np.array(list(losses(tmp_path).values()))
    np.testing.assert_allclose(found[:, 1], golden["train_loss_image"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[:, 2], golden["train_loss_id"], atol=1e-4, rtol=0)
    expected = edsr_released(released_edsr("train_final"))
    state = trained.state_dict()
    assert state.keys() == expected.keys()
    difference = torch.cat([(state[key] - expected[key]).abs().flatten() for key in state])
    assert difference.mean() < 1e-6


def test_it_learns_and_leaves_a_network_that_opens(plain):
    found = losses(plain)
    assert list(found) == list(range(1, 9))
    assert found[8][0] < found[1][0]
    srnet = create_srnet(f"local-dir:{plain}/model", pretrained=True, depth=1, width=8)
    assert srnet(torch.rand(1, 3, 7, 6)).shape == (1, 3, 28, 24)
    kept = {path.name for path in (plain / "checkpoints").iterdir()}
    assert kept == {"step-000006", "step-000008"}


@pytest.mark.parametrize(
    "fields",
    [
        {"accumulate": 4},
        {"store_hr_features": False},
        {"grad_checkpointing": True},
        {"channels_last": False},
        {"hold_crops": "device"},
        {"checkpoint_every": 1, "keep_checkpoints": 1},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_same_numbers_however_it_is_carried_out(plain, tmp_path, fields):
    tiny_run(tmp_path, **fields)
    assert_same(tmp_path, plain, atol=1e-5)


def test_compiled(tmp_path):
    fields = {"iterations": 3, "factors": (8,)}
    tiny_run(tmp_path / "eager", **fields)
    tiny_run(tmp_path / "compiled", compile="default", **fields)
    assert_same(tmp_path / "compiled", tmp_path / "eager", atol=1e-4)


def test_bfloat16_follows_to_its_precision(plain, tmp_path):
    tiny_run(tmp_path, precision="bf16")
    expected, found = losses(plain), losses(tmp_path)
    first, bf16 = (np.array(list(one.values()))[:, 0] for one in (expected, found))
    np.testing.assert_allclose(bf16, first, rtol=0.02)
    assert not np.array_equal(bf16, first)


def test_moving_average_is_what_is_kept(plain, tmp_path):
    tiny_run(tmp_path, ema=0.99)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(plain).values()))
    start = tiny_edsr().state_dict()
    averaged, last = weights(tmp_path), weights(plain)
    moved = {key: (last[key] - start[key]).norm() for key in last}
    lagging = {key: (averaged[key] - start[key]).norm() for key in last}
    assert 0 < sum(lagging.values()) < sum(moved.values())


def test_clipping_bounds_the_step(tmp_path):
    moved = {}
    for name, clip in (("free", None), ("clipped", 1e-4)):
        fields = {"optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"}
        trained = tiny_run(tmp_path / name, iterations=1, clip_norm=clip, **fields)
        before, after = (
            torch.cat([p.detach().flatten() for p in net.parameters()])
            for net in (tiny_edsr(), trained)
        )
        moved[name] = float((after - before).norm())
    # Nesterov's first step is 1.9 times the gradient
    assert moved["clipped"] == pytest.approx(1.9e-4, rel=0.01)
    assert moved["free"] > moved["clipped"]


def test_lambda_zero_needs_no_fnet_and_logs_and_recipe_are_kept(tmp_path):
    tiny_run(tmp_path, identity_weight=0.0, iterations=2, trackers=("tensorboard",))
    assert all(len(row) == 3 for row in losses(tmp_path).values())  # loss, image, learning rate
    assert list(tmp_path.rglob("events.out.tfevents*"))
    kept = load_recipe(tmp_path / "recipe.yaml")
    assert (kept.iterations, kept.precision, kept.factors) == (2, "fp32", (4, 8, 16))


def rates(options, steps):
    optimizer = create_optimizer([nn.Parameter(torch.zeros(1))], options)
    schedule = create_schedule(optimizer, options)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_fnets_are_fed_as_the_recipe_says(tmp_path):
    name = "mobilefacenet.celeba_aaf"
    for way in ("bilinear", "bicubic"):
        recipe = Recipe(**FIELDS | {"iterations": 1}, fnet=name, interpolation=way)
        given = HallucinationLoss(name, crop="sphereface", interpolation=way)
        for folder, criterion in ((way, None), (f"{way} given", given)):
            faces, srnet = tiny_faces(), tiny_edsr()
            train(recipe, tmp_path / folder, faces=faces, srnet=srnet, criterion=criterion)
        assert_same(tmp_path / way, tmp_path / f"{way} given")
    assert losses(tmp_path / "bicubic")[1] != losses(tmp_path / "bilinear")[1]


def test_rate_is_that_of_the_released_schedule():
    """StepLR stepped before the optimizer: FIELD.md, section 1."""
    steps = (1, 24_999, 25_000, 49_999, 50_000)
    assert rates(RunOptions(), steps) == [1e-4, 1e-4, 5e-5, 5e-5, 2.5e-5]


def test_cosine_and_warmup():
    options = RunOptions(iterations=100, schedule="cosine", warmup=10, learning_rate=1.0)
    found = rates(options, range(1, 101))
    assert found[4] == pytest.approx(0.5)
    assert max(found) == found[9] == pytest.approx(1.0)
    assert found[54] == pytest.approx(0.5, abs=0.02)
    assert 0 < found[-1] < 0.01
    assert rates(RunOptions(schedule="constant"), (1, 50_000)) == [1e-4, 1e-4]


def test_an_epoch_holds_every_face_once_and_drops_the_rest():
    steps = shuffled_batches(10, 4, seed=0)
    first, second, third = (next(steps) for _ in range(3))
    assert len(torch.cat([first[1], second[1]]).unique()) == 8
    assert [step for step, _ in (first, second, third)] == [1, 2, 3]
    step, again = next(shuffled_batches(10, 4, seed=0, start=3))
    assert step == 3
    assert again.equal(third[1])
    with pytest.raises(ValueError, match="3 faces do not fill a batch: lower batch_size=4"):
        next(shuffled_batches(3, 4, seed=0))


def test_shares_cover_the_batch():
    rows = [row for process in range(2) for row in shares(8, process, 2, 2)]
    assert [i for row in rows for i in range(8)[row]] == list(range(8))
    with pytest.raises(ValueError, match=r"batch_size=8 cannot.*3 processes.*multiple of 3"):
        shares(8, 0, 3, 1)


def poisoned_run(folder, bad, **fields):
    """An image loss that is not finite in some calls."""
    calls = itertools.count()  # the first one tries its gradient

    def image_loss(sr, mr):
        return nn.functional.l1_loss(sr, mr) * (float("nan") if next(calls) in bad else 1.0)

    criterion = HallucinationLoss(None, image_loss=image_loss)
    return tiny_run(folder, criterion=criterion, identity_weight=0, **fields)


def test_a_loss_that_is_not_finite_stops_and_leaves_its_batch(tmp_path):
    with pytest.raises(
        TrainingStoppedError, match=r"step 5 .*not finite \(loss nan.*non_finite=skip"
    ):
        poisoned_run(tmp_path, {5})
    batch = load_file(next(tmp_path.glob("not-finite-step-000005*.safetensors")))
    assert batch["0/hr"].shape == (8, 3, 112, 96)
    assert (tmp_path / "checkpoints" / "step-000003").is_dir()


def test_or_is_skipped_but_not_for_ever(tmp_path):
    trained = poisoned_run(tmp_path / "once", {5}, non_finite="skip")
    assert all(p.isfinite().all() for p in trained.parameters())
    assert losses(tmp_path / "once").keys() == {1, 2, 3, 4, 6, 7, 8}
    with pytest.raises(
        TrainingStoppedError, match=r"step 12 .*9 steps before: the weights are lost"
    ):
        poisoned_run(tmp_path / "ever", set(range(3, 99)), non_finite="skip", iterations=30)
