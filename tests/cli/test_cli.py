"""The frame of the command: names, versions, errors."""

import re
import shlex

import pytest
from conftest import ROOT
from typer.main import get_command

from idloss import __version__
from idloss.cli import app
from idloss.weights.sources import zoo_folder


@pytest.mark.parametrize(
    ("name", "said", "srnets"),
    [
        (
            "edsr16_64",
            {"srnet": "edsr16_64.celeba295", "identity_weight": 0, "iterations": 9250},
            ["edsr16_64", "edsr16_64_id"],
        ),
        (
            "edsr16_64_id",
            {"srnet": "edsr16_64.celeba295", "identity_weight": 0.5, "iterations": 9250},
            ["bilinear", "edsr16_64", "edsr16_64_id.celeba_aaf_mobilefacenet", "edsr16_64_id"],
        ),
        (
            "edsr16_64_id.celeba_aaf_mobilefacenet",
            {"fnet": "mobilefacenet", "identity_weight": 0.5, "iterations": 9250},
            ["edsr16_64", "edsr16_64_id.celeba_aaf_mobilefacenet"],
        ),
        (
            "edsr16_64_id.celeba_aaf_real_world",
            {"srnet": "edsr16_64_id", "degradation": "real_world", "iterations": 1500},
            ["bilinear", "edsr16_64_id", "edsr16_64_id.celeba_aaf_real_world"],
        ),
        (
            "edsr16_64.celeba295",
            {"srnet": "edsr16_64", "identity_weight": 0, "batch_size": 16, "iterations": 1500},
            ["bilinear", "bicubic", "edsr16_64.celeba295"],
        ),
        (
            "mobilefacenet.celeba_aaf",
            {"fnet": "mobilefacenet", "teacher": "mobilefacenet", "iterations": 1000},
            ["bilinear"],
        ),
    ],
)
def test_cards_of_the_zoo_say_licence_and_commands_that_run(
    name, said, srnets, command, monkeypatch
):
    card = (zoo_folder() / name / "README.md").read_text()
    (licence,) = re.findall("^license_name: (.+)$", card, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text().lower()
    assert f"and licenseref-{licence}" in project
    called = []
    for trains in ("train", "train_fnet"):
        monkeypatch.setattr(f"idloss.training.{trains}", lambda *args, **_: called.append(args))
    commands = card.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    train, evaluate = (shlex.split(line)[1:] for line in commands.splitlines())
    assert not command(*train)
    ((recipe, _),) = called
    assert {field: getattr(recipe, field) for field in said} == said
    options = get_command(app).commands[evaluate[0]].make_context("", evaluate[1:]).params
    assert options["srnet"] == srnets


def test_a_wrong_name_is_one_line(command):
    error = command("info", "mobilfacenet")
    assert "mobilefacenet" in error
    assert "\n" not in error


def test_version(command, capsys):
    assert not command("--version")
    assert capsys.readouterr().out == f"idloss {__version__}\n"


def test_a_wrong_option_names_the_right_one(command, capsys):
    assert command("evaluate", "data", "--sizes", "7x6") == 2
    assert re.search(r"No such option: --sizes.*--size\b", capsys.readouterr().err, re.DOTALL)


class BrokenHeaderError(Exception):
    """As SafetensorError, of no kind that a user's mistake raises."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("2 faults:\n  a: lost\n\n b: cut"),
            "idloss: 2 faults:\n    a: lost\n   b: cut",
        ),
        (
            ValueError("photo \x1b]0;owned\x07\u202egpj.exe \udcff"),
            r"idloss: photo \x1b]0;owned\x07\u202egpj.exe \udcff",
        ),
        (
            ValueError("give skip_missing=True, batch_size=4, sizes=((7, 6),) or no_figures=1"),
            "idloss: give --skip-missing, --batch-size 4, --size ((7, 6),) or no_figures=1",
        ),
        (ValueError(""), "idloss: failed without a message"),
        (KeyError("shape"), "idloss: KeyError: 'shape'\n  while reading {file}: is it damaged?"),
        (BrokenHeaderError("bad"), "idloss: BrokenHeaderError: bad\n  while reading {file}"),
    ],
)
def test_errors_are_told_for_a_terminal(error, said, command, monkeypatch, tmp_path):
    file = tmp_path / "results.json"
    file.write_text("{}")

    def compare(a, b, **_):
        raise error

    monkeypatch.setattr("idloss.evaluation.compare", compare)
    monkeypatch.setattr("idloss.evaluation.get_protocol", lambda _: compare(file, file))
    words = ["evaluate", file] if "skip" in str(error) else ["compare", file, file]
    assert command(*words).startswith(said.format(file=file))
