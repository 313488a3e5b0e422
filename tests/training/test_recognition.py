"""Training FNets: what the tasks feed, that they teach, and that runs are repeatable."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from minilfw import mini_lfw
from nets import tiny_fnet
from tinytraining import FIELDS, assert_same, launch, losses, tiny_faces, weights

from idloss import FaceEncoder, IdentityPreservedLoss, create_fnet
from idloss.data import draw_faces, folder_faces
from idloss.fnets.mobilefacenet import mobilefacenet_bubbliiiing
from idloss.resample import resize, to_float
from idloss.training import FNetRecipe, load_recipe, recipe_names, train_fnet
from idloss.training.batches import Draw, generator_for
from idloss.training.margins import get_margin
from idloss.training.tasks import Distillation, FNetTask, Recognition, input_of

SMALL = {
    "iterations": 8,
    "batch_size": 8,
    "learning_rate": 0.05,
    "margin": "cosface",
}
NOBODY = replace(tiny_faces(), labels=None, identities=())
CPU = torch.device("cpu")
SPHEREFACE = {"widths": [8, 8, 8, 8], "depths": [0, 0, 0, 0], "num_features": 16}


def small_fnet(seed=0, num_features=16):
    """Without dropout and batch norm's noise of small batches: what is learned shows at once."""
    torch.manual_seed(seed)
    return create_fnet("sface", **{**SPHEREFACE, "num_features": num_features})


def run(folder, *, faces=None, fnet=None, teacher=None, resume=False, **fields):
    return train_fnet(
        FNetRecipe(**{**FIELDS, **SMALL, **fields}),
        folder,
        faces=tiny_faces() if faces is None else faces,
        fnet=tiny_fnet() if fnet is None else fnet,
        teacher=teacher,
        resume=resume,
    )


def task(faces, fnet=None, share=0.0, teacher=None):
    fnet = create_fnet(tiny_fnet()) if fnet is None else fnet
    module = Recognition(fnet, torch.nn.Identity())
    if teacher is not None:
        module = Distillation(fnet, FaceEncoder(teacher, crop="sphereface"))
    return FNetTask(module, faces, FNetRecipe(low_resolution=share), CPU)


def draws(steps=1, total=8, parts=1):
    size = total // parts
    for step in range(1, steps + 1):
        faces = torch.arange(total)
        for start in range(0, total, size):
            rows = slice(start, start + size)
            yield Draw(step, faces[rows], rows, total)


# what the FNet sees


@pytest.mark.parametrize("crop", ["sphereface", "arcface"])
def test_input_is_what_a_face_encoder_feeds_its_fnet(crop):
    fnet = tiny_fnet()
    hr = torch.rand(3, 3, 112, 112 if crop == "arcface" else 96)
    encoder = FaceEncoder(tiny_fnet(), crop=crop)
    assert input_of(create_fnet(fnet), crop).preprocess(hr).equal(encoder.preprocess(hr))
    assert fnet.training
    assert all(parameter.requires_grad for parameter in fnet.parameters())


def test_faces_are_mirrored_and_made_small_by_seed_and_step():
    faces = tiny_faces(8)
    hr = to_float(faces.crops)
    [batch] = task(faces, teacher=tiny_fnet(1)).batches(draws())
    seen, preprocess = batch["faces"], input_of(create_fnet(tiny_fnet()), "sphereface").preprocess
    kept = (seen == hr).flatten(1).all(1)
    flipped = (seen == hr.flip(-1)).flatten(1).all(1)
    assert (kept | flipped).all()
    assert kept.any()
    assert flipped.any()
    assert batch["images"].equal(preprocess(seen))

    [low] = task(faces, share=0.5, teacher=tiny_fnet(1)).batches(draws())
    small = (low["images"] != preprocess(low["faces"])).flatten(1).any(1)
    assert small.equal(torch.rand(8, generator=generator_for(0, 2, 1)) < 0.5)
    assert small.any()
    assert not small.all()
    both = torch.stack((hr, hr.flip(-1)))  # as for everybody else: a teacher sees nobody small
    assert (low["faces"] == both).flatten(2).all(2).any(0).all()


def test_low_resolution_is_the_degradation_and_back():
    small = task(tiny_faces(4), share=1.0, teacher=tiny_fnet(1))
    small.sizes = ((7, 6),)
    [batch] = small.batches(draws(total=4))
    faces = (batch["faces"] * 255).round().to(torch.uint8)
    expected = resize(to_float(resize(faces, (7, 6))), (112, 96), mode="bilinear")
    assert batch["images"].equal(small.input.preprocess(expected))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_seen_does_not_depend_on_how_a_batch_is_shared_out(share):
    one = task(tiny_faces(8), share=share)
    whole = [batch["images"] for batch in one.batches(draws(2))]
    parts = [batch["images"] for batch in one.batches(draws(2, parts=4))]
    assert torch.cat(whole).equal(torch.cat(parts))
    assert not whole[0].equal(whole[1])


def test_who_is_seen_and_when():
    faces, fnet = tiny_faces(8), create_fnet(tiny_fnet())
    one = task(faces, fnet)
    [batch] = one.batches(draws())
    assert batch["labels"].equal(faces.labels)
    assert batch["step"].item() == 1
    assert len(one) == 8
    assert one.network is fnet


# learning


def test_identities_that_were_never_seen_are_told_apart_better(tmp_path):
    training = draw_faces(16, 6)
    unseen = draw_faces(12, 4, first_identity=16)
    untrained = small_fnet()

    def gap(fnet):
        encoder = FaceEncoder(fnet, crop="sphereface")
        with torch.no_grad():
            embeddings = F.normalize(encoder(to_float(unseen.crops)))
        cosines = embeddings @ embeddings.T
        same = unseen.labels[:, None] == unseen.labels
        return ((cosines[same].mean() - cosines[~same].mean()) / cosines[~same].std()).item()

    fields = {"optimizer": "adamw", "learning_rate": 3e-3, "iterations": 60, "batch_size": 32}
    options = {"scale": 16, "margin": 0.2}
    trained = run(
        tmp_path, faces=training, fnet=small_fnet(), margin_options=options, log_every=20, **fields
    )
    assert not trained.training
    accuracy = [row[1] for row in losses(tmp_path).values()]
    assert accuracy[-1] > accuracy[0]
    assert gap(trained) > gap(untrained) + 0.3


@pytest.mark.parametrize("width", [16, 24])
def test_a_student_comes_to_embed_as_its_teacher_does(tmp_path, width):
    faces = replace(draw_faces(16, 4), labels=None, identities=())
    teacher = small_fnet(1, num_features=width)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    fields = {"optimizer": "adamw", "learning_rate": 3e-3, "iterations": 40, "batch_size": 32}
    student = run(tmp_path, faces=faces, fnet=small_fnet(), teacher=teacher, **fields)
    found = [row[0] for row in losses(tmp_path).values()]
    assert found[-1] < 0.5 * found[0]
    assert student.num_features == 16
    assert weights(tmp_path).keys() == small_fnet().state_dict().keys()  # no projection, no teacher
    assert all(value.equal(state[key]) for key, value in teacher.state_dict().items())
    if width == 16:
        hr = to_float(faces.crops)
        with torch.no_grad():
            pair = [FaceEncoder(one, crop="sphereface")(hr) for one in (student, teacher)]
        assert F.cosine_similarity(*pair).mean() > 1 - 0.5 * found[0]


def test_gradients_reach_the_student_alone():
    fnet = create_fnet(tiny_fnet())
    module = Distillation(fnet, FaceEncoder(tiny_fnet(1), crop="sphereface"))
    module.train()
    assert not module.teacher.fnet.training
    module(torch.rand(4, 3, 28, 24), torch.rand(4, 3, 112, 96))["loss"].backward()
    assert all(parameter.grad is not None for parameter in fnet.parameters())
    assert all(parameter.grad is None for parameter in module.teacher.fnet.parameters())
    assert all(key.startswith("fnet.") for key in module.state_dict())


# runs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(folder, low_resolution=0.3)
    return folder


def test_two_runs_of_a_seed_are_equal_and_of_two_are_not(plain, tmp_path):
    run(tmp_path / "same", low_resolution=0.3)
    assert_same(tmp_path / "same", plain)
    run(tmp_path / "other", low_resolution=0.3, seed=1)
    assert losses(tmp_path / "other") != losses(plain)


def test_a_resumed_run_is_as_one_without_a_break(plain, tmp_path, monkeypatch):
    """Dropout and all; killed between a checkpoint and the end."""
    batch = FNetTask.batch

    def dying(self, draw, crops):
        if draw.step == 5:
            raise KeyboardInterrupt
        return batch(self, draw, crops)

    with monkeypatch.context() as patched:
        patched.setattr(FNetTask, "batch", dying)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, low_resolution=0.3)
    with pytest.raises(FileExistsError, match="resume it"):
        run(tmp_path, low_resolution=0.3)
    run(tmp_path, low_resolution=0.3, resume=True)
    assert_same(tmp_path, plain)


def test_parts_of_a_step_add_up_to_it(tmp_path):
    """Without batch norm and dropout; A-Softmax anneals by the step, not by the part."""
    for parts in (1, 4):
        run(tmp_path / str(parts), fnet=small_fnet(), margin="sphereface", accumulate=parts)
    assert_same(tmp_path / "4", tmp_path / "1", atol=1e-4, rtol=1e-4)


def both_tasks(folder):
    """A-Softmax, and a projection between widths; no batch norm, whose noise is a process's own."""
    run(folder / "margin", fnet=small_fnet(), margin="sphereface", low_resolution=0.3)
    run(folder / "teacher", fnet=small_fnet(), teacher=small_fnet(1, num_features=24))


TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from training.test_recognition import both_tasks
both_tasks(Path(sys.argv[1]))
"""


def test_two_processes_compute_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(tests=str(ROOT / "tests")))
    code, shown = launch(script, tmp_path / "two", processes=2)
    assert code == 0, shown
    both_tasks(tmp_path / "one")
    for task in ("margin", "teacher"):
        assert_same(tmp_path / "two" / task, tmp_path / "one" / task, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sphereface", "adaface"])
def test_compiled_around_the_margin(name):
    module = Recognition(small_fnet(), get_margin(name, 5, 16))
    batch = {"images": torch.rand(4, 3, 112, 96), "labels": torch.arange(4)}
    both = torch.compile(module, backend="eager"), module
    for step in (1, 2):
        found = [one(**batch, step=torch.tensor(step))["loss"] for one in both]
        torch.testing.assert_close(*found, rtol=1e-3, atol=0)  # AdaFace takes note twice
        found[0].backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_what_was_saved_opens_by_name_and_serves_as_an_identity_loss(tmp_path):
    options = {**SPHEREFACE, "img_size": [56, 48], "input_size": [3, 56, 48]}
    trained = train_fnet(
        FNetRecipe(**FIELDS | SMALL | {"iterations": 2}, fnet="sface", fnet_options=options),
        tmp_path,
        faces=tiny_faces(),
    )
    opened = create_fnet(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    assert opened.num_features == 16
    assert opened.crop == "sphereface"
    assert opened.pretrained_cfg["input_size"] == (3, 56, 48)
    images = torch.rand(2, 3, 56, 48)
    assert opened(images).equal(trained(images))
    loss = IdentityPreservedLoss(opened, crop="sphereface")
    sr = torch.rand(2, 3, 28, 24, requires_grad=True)
    loss(sr, torch.rand(2, 3, 112, 96)).backward()
    assert sr.grad.abs().sum() > 0


def test_validation_at_full_resolution_and_below(tmp_path):
    data = mini_lfw(tmp_path / "lfw", people=4, photos=3)
    run(tmp_path / "run", iterations=2, validate_on=data, factors=(8,))
    header, row = (tmp_path / "run" / "validation.csv").read_text().splitlines()
    assert header == "step,HR,14x12"
    assert all(0 <= float(value) <= 1 for value in row.split(",")[1:])


# what does not fit


def test_faces_of_nobody_and_identities_without_faces_are_left_out(tmp_path, capsys):
    faces = tiny_faces()
    labels = faces.labels.clone()
    labels[:3] = -1
    faces = replace(faces, labels=labels, identities=(*faces.identities, "nobody"))
    run(tmp_path, faces=faces, iterations=1)
    shown = capsys.readouterr().out
    assert "left out: 3 faces of nobody known, 2 identities without faces" in shown
    told = json.loads((tmp_path / "model" / "config.json").read_text())["idloss"]
    assert (told["data"]["faces"], told["data"]["identities"]) == (17, 9)


@pytest.mark.parametrize(
    ("message", "given", "fields"),
    [
        (r"FNet and crop do not fit.*'facenet'.*set crop=facenet", {"crop": "facenet"}, {}),
        ("the faces are aligned to 'sphereface'", {}, {"crop": "arcface"}),
        ("has nothing to train", {"frozen": True, "teacher": tiny_fnet(1)}, {}),
        ("validate_every needs faces to verify", {}, {"validate_every": 1}),
        ("no identities to tell apart: give labelled ones, or a", {"faces": NOBODY}, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the rest is its border")
def test_runs_that_do_not_fit_say_so_before_they_start(tmp_path, message, given, fields):
    fnet = create_fnet(tiny_fnet(), crop=given.pop("crop", "sphereface"))
    fnet.requires_grad_(not given.pop("frozen", False))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, fnet=fnet, **given, **fields)
    assert not (tmp_path / "training.csv").exists()


def test_faces_must_be_named_and_only_the_same_run_is_resumed(tmp_path):
    with pytest.raises(ValueError, match="no faces to train on: set data=FOLDER"):
        train_fnet(FNetRecipe(**FIELDS), tmp_path)
    run(tmp_path, iterations=1)
    with pytest.raises(ValueError, match="margin was 'cosface' and is 'arcface'"):
        run(tmp_path, iterations=1, margin="arcface", resume=True)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("fnet_")])
def test_recipes_of_the_zoo_are_sound(name):
    recipe = load_recipe(name, [], FNetRecipe)
    fnet = create_fnet(recipe.fnet, **recipe.fnet_options)
    assert fnet.crop == recipe.crop
    assert recipe.warmup < recipe.iterations
    if recipe.teacher:
        assert create_fnet(recipe.teacher).crop == recipe.crop


# real faces


def test_real_faces_distilled_from_a_real_recogniser(shared, tmp_path):
    """A dozen photos of CelebA, aligned as they are read; a step changes a copy of the teacher."""
    state = torch.load(shared("weights/arcface_mobilefacenet.pth"), weights_only=True)
    teacher = create_fnet("mobilefacenet")
    teacher.load_state_dict(mobilefacenet_bubbliiiing(state))
    photos = folder_faces(shared("data/celeba_wild.tar"))
    faces = photos.select(torch.arange(12))
    recipe = FNetRecipe(
        **FIELDS | {"iterations": 2, "batch_size": 6, "learning_rate": 0.01, "log_every": 1},
        low_resolution=0.5,
        crop="arcface",
    )
    student = create_fnet("mobilefacenet")
    student.load_state_dict(teacher.state_dict())
    train_fnet(recipe, tmp_path, faces=faces, fnet=student, teacher=teacher)
    found = [row[0] for row in losses(tmp_path).values()]
    assert all(0 < loss < 1 for loss in found)
    opened = create_fnet(f"local-dir:{tmp_path}/model", pretrained=True)
    assert not opened.embedding.weight.equal(teacher.embedding.weight)
