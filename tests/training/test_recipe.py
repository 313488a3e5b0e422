"""Recipes: the paper's, those of a person, and everything that is wrong before training starts."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from nets import tiny_fnet
from tinytraining import FIELDS, tiny_faces, tiny_run

from idloss import HallucinationLoss, create_srnet
from idloss.training import FNetRecipe, Recipe, load_recipe, recipe_names, train
from idloss.training.recipe import save_recipe

PAPER = ["paper_edsr16_64", "paper_edsr16_64_id", "paper_edsr32_256", "paper_edsr32_256_id"]


@pytest.mark.parametrize("name", PAPER)
def test_they_are_section_4_1(name):
    assert [name for name in recipe_names() if name.startswith("paper_")] == PAPER
    recipe = load_recipe(name)
    assert recipe.identity_weight == (0.5 if name.endswith("_id") else 0)
    assert recipe.srnet == name.removeprefix("paper_")
    assert (recipe.iterations, recipe.batch_size, recipe.learning_rate) == (50_000, 64, 1e-4)
    assert recipe.lr_sizes() == ((28, 24), (14, 12), (7, 6))
    assert (recipe.schedule, recipe.decay_every, recipe.decay_rate) == ("step", 25_000, 0.5)
    assert (recipe.fnet, recipe.crop, recipe.degradation) == ("sface", "sphereface", "bicubic")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("compile=no", "compile", "no"),
        ("exclude=[0000045, 12:30:45, no, 1e3]", "exclude", ("0000045", "12:30:45", "no", "1e3")),
        ("exclude=[7398, 191847.jpg]", "exclude", ("7398", "191847.jpg")),
        ("data=a #1", "data", Path("a #1")),
        ("data=a: b", "data", Path("a: b")),
        ("data=null", "data", None),
        ("srnet=0012", "srnet", "0012"),
        ("fnet={0045: 1, sface: 0.5}", "fnet", {"0045": 1.0, "sface": 0.5}),
        ("batch_size=32", "batch_size", 32),
        ("factors=[4, 8]", "factors", (4, 8)),
        ("sizes=[7x6, 16x16]", "sizes", ((7, 6), (16, 16))),
        ("seed=0045", "seed", 45),
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("channels_last=False", "channels_last", False),
        ("srnet_options={a: 4, b: 1e-1}", "srnet_options", {"a": 4, "b": 0.1}),
        (
            "srnet_options={a: '4', b: ~, c: False}",
            "srnet_options",
            {"a": "4", "b": None, "c": False},
        ),
        ("srnet='null'", "srnet", "null"),
        ("image_loss=huber", "image_loss", "huber"),
    ],
    ids=str,
)
def test_text_is_taken_as_written(tmp_path, override, field, value):
    """YAML 1.1 makes false of no, 37 of 0000045, 45045 of 12:30:45, and a of 'a #1'."""
    recipe = load_recipe("paper_edsr16_64", [override])
    assert getattr(recipe, field) == value
    if field == "sizes":
        assert recipe.lr_sizes() == value
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["precision"] == "fp32"


def test_text_in_a_file_is_taken_as_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("compile: no\nexclude: [0000045, 12:30:45]\ndata: 0012\nwarmup: 0010\n")
    recipe = load_recipe(path)
    assert (recipe.compile, recipe.exclude) == ("no", ("0000045", "12:30:45"))
    assert (recipe.data, recipe.warmup) == (Path("0012"), 10)


@pytest.mark.parametrize("kind", [Recipe, FNetRecipe])
def test_every_field_is_explained(kind):
    attributes = kind.__doc__.partition("Attributes:\n")[2].splitlines()
    explained = dict(line.strip().split(": ", 1) for line in attributes)
    assert explained.keys() == kind.model_fields.keys()
    assert all(text[0].isupper() or text[0] == "`" for text in explained.values())
    assert all(text.endswith(".") or text.endswith("...") for text in explained.values())


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (Recipe, "batch=32", r"yaml: unknown field 'batch'. Did you mean 'batch_size'"),
        (Recipe, "batch_size=many", r"batch_size: input should be a valid integer.*got 'many'"),
        (Recipe, "batch_size=0", r"batch_size: input should be greater than 0, got 0"),
        (Recipe, "precision=fp8", r"precision: input should be 'fp32', 'tf32', 'bf16' or 'fp16'"),
        (Recipe, "device=gpu", "device: string should match pattern"),
        (Recipe, "sizes=[7by6]", r"'7by6' is not rows x columns; write it as 7x6"),
        (Recipe, "distance=cosin", r"unknown distance 'cosin'. Did you mean 'cosine'"),
        (Recipe, "image_loss=l3", r"unknown image loss 'l3'.*Known: huber, l1, mse"),
        (Recipe, "srnet_options={tanh: no}", r"tanh: no can be two things: write true, false or"),
        (Recipe, "learning_rate=inf", r"learning_rate: input should be a finite number, got inf"),
        (Recipe, "ema=1.5", r"ema: input should be less than 1, got 1.5"),
        (Recipe, "batch_size 32", r"'batch_size 32' is not field=value, such as batch_size=32"),
        (Recipe, "factors=[4, 8", r"not YAML"),
        (Recipe, "factors=[5]", r"factor 5 does not divide 112x96"),
        (FNetRecipe, "factors=[]", r"factors is empty: give at least one"),
        (FNetRecipe, "crop=sphereface2", r"unknown template 'sphereface2'. Did you mean 'sphere"),
        (FNetRecipe, "degradation=blur", r"unknown degradation 'blur'.*bicubic"),
        (FNetRecipe, "degradation_options={a: 1}", r"unknown option of degradation 'bicubic' 'a'"),
        (FNetRecipe, "margin=arcfase", r"unknown margin 'arcfase'. Did you mean 'arcface'"),
        (FNetRecipe, "margin_options={a: 1}", r"unknown option of margin 'sphereface' 'a'"),
        (FNetRecipe, "low_resolution=2", r"low_resolution: .*less than or equal to 1, got 2"),
        (FNetRecipe, "identity_weight=0.5", r"unknown field 'identity_weight'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(kind, override, message):
    recipe = "paper_edsr16_64" if kind is Recipe else "fnet_sphereface20"
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(recipe, [override], kind)
    assert "\n" not in str(caught.value)


def test_unknown_and_broken_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"unknown recipe 'paper_edsr16'.*Did you mean"):
        load_recipe("paper_edsr16")
    path = tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match=r"no recipe at .*mine\.yaml"):
        load_recipe(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match=r"mine\.yaml: a recipe is a list of 'field: value'"):
        load_recipe(path)
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: not YAML \(seed is said twice"):
        load_recipe(path)


GIVEN = {"faces": tiny_faces()}


class TinySR(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 3, 3, padding=1)


def criterion(wanted, **options):
    fnet = tiny_fnet()
    fnet.crop = wanted
    return HallucinationLoss(fnet, **options)


@pytest.mark.parametrize(
    ("message", "given", "fields"),
    [
        ("set data=FOLDER", {}, {}),
        ("no folder and no archive at", {}, {"data": "/gone"}),
        ("20 faces do not fill a batch", GIVEN, {"batch_size": 32}),
        ("multiple of 3", GIVEN, {"accumulate": 3}),
        (
            "size 56x48 does not fit: its SR of 224x192 is larger than the 112x96 crops",
            GIVEN,
            {"sizes": ["56x48"]},
        ),
        ("has nothing to train", GIVEN | {"srnet": lambda: create_srnet("bicubic")}, {}),
        ("aligned to 'sphereface'.*crop=arcface", GIVEN, {"crop": "arcface"}),
        ("needs faces to verify", GIVEN, {"validate_every": 5}),
        ("unknown tracker 'tensorbord'", GIVEN, {"trackers": ["tensorbord"]}),
        (
            "TinySR has no set_grad_checkpointing",
            GIVEN | {"srnet": TinySR},
            {"grad_checkpointing": True},
        ),
        (
            r"FNet and crop do not fit.*'facenet' crops, of which crop=sphereface holds \d+%",
            GIVEN | {"criterion": lambda: criterion("facenet", crop="sphereface")},
            {},
        ),
        *(
            (
                "takes faces for 'arcface' crops.*crop=sphereface: give the criterion crop=",
                GIVEN | {"criterion": partial(criterion, "arcface", **crop)},
                {},
            )
            for crop in ({}, {"crop": "arcface"})
        ),
        (
            r"TinySR does not take a 28x24 face, float32 RGB \[1, 3, 28, 24\]",
            GIVEN | {"srnet": lambda: TinySR().bfloat16()},
            {},
        ),
        (
            "exclude names 0.jpeg, 1.jpeg.* and 92 more: neither images nor identities of the f",
            GIVEN,
            {"exclude": [f"{i}.jpeg" for i in range(100)]},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the rest is its border")
def test_what_does_not_fit_fails_before_training(tmp_path, message, given, fields):
    recipe = Recipe(
        **FIELDS | {"identity_weight": 0, "srnet_options": {"depth": 1, "width": 8}} | fields
    )
    given = {name: one() if callable(one) else one for name, one in given.items()}
    kind = FileNotFoundError if "data" in fields else ValueError
    with pytest.raises(kind, match=message) as caught:
        train(recipe, tmp_path, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "training.csv").exists()


def test_eight_columns_more_on_either_side_are_the_habit_of_the_field(tmp_path):
    fnet = tiny_fnet()
    fnet.crop = "arcface"
    tiny_run(tmp_path, fnet=fnet, iterations=1)
