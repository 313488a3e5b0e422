"""`idloss list`, `info`, `fetch` and `publish`."""

import json

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from idloss import catalogue
from idloss.cli import app
from idloss.publish import Publication
from idloss.weights import NotFoundError, UnreachableError, describe
from idloss.weights.sources import zoo_folder


@pytest.fixture
def shown(command, capsys):
    """`shown("list")` is what the command prints."""

    def call(*words):
        assert not command(*words)
        return capsys.readouterr().out

    return call


def test_list_names_both_kinds_and_takes_filters(shown):
    every = shown("list")
    assert "sface.casia_webface" in every
    assert "edsr16_64_id.celeba_aaf *" in every
    assert "bicubic" in every
    some = shown("list", "edsr*")
    assert "edsr16_64" in some
    assert "sface" not in some
    assert "edsr" not in shown("list", "--kind", "fnet")
    (one,) = json.loads(shown("list", "mobile*", "--licence", "mit", "--json"))
    assert (one["name"], one["lfw"], one["input"]) == (
        "mobilefacenet.casia_webface",
        98.78,
        [112, 112],
    )
    assert shown("list", "--markdown") == catalogue.markdown()


def test_info_names_source_licence_and_training_data(shown, monkeypatch):
    """Its address whole, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "40")
    told = shown("info", "mobilefacenet")
    (url,) = describe("mobilefacenet")["source"]
    assert all(word in told for word in (url, "mit", "CASIA", "98.78", "221 M", "4.16 MB"))
    assert json.loads(shown("info", "mobilefacenet", "--json"))["parameters"] == 1_003_136
    assert "weights        none" in shown("info", "bicubic")
    folder = zoo_folder() / "edsr16_64"
    assert "where it was published" in shown("info", f"local-dir:{folder}")


def test_fetch_prints_files_and_every_failure(shown, command, monkeypatch, capsys):
    own = str(zoo_folder() / "edsr16_64" / "model.safetensors")
    assert own in shown("fetch", "edsr16_64").splitlines()[0]

    def fail(name):
        if name.startswith("edsr16_64."):
            return own
        raise (NotFoundError if "celeba" in name else UnreachableError)(f"{name}: no")

    monkeypatch.setattr(catalogue, "fetch", fail)
    error = command("fetch", "edsr16_64.c*5", "sface", "edsr32*celeba")
    assert capsys.readouterr().out == f"{own}\n"
    assert error.splitlines()[1:] == ["  edsr32_256.celeba: no", "  edsr32_256_id.celeba: no"]
    assert "sface: no" in error.splitlines()[0]
    assert "no model with weights is called 'x*'" in command("fetch", "x*")
    assert "--file is of one model" in command("fetch", "a", "b", "--file", own)


@pytest.mark.parametrize("answer", ["y", "n", "--yes"])
def test_publish_shows_what_it_uploads_and_asks(monkeypatch, answer, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    uploaded = []

    def upload(publication):
        uploaded.append(sorted(path.name for path in publication.folder.iterdir()))
        return "c0ffee"

    monkeypatch.setattr(Publication, "upload", upload)
    words = ["publish", "edsr16_64_id", "--to", "me/net", *(["--yes"] * (answer == "--yes"))]
    done = CliRunner().invoke(app, words, input=answer)
    assert done.exception is None or answer == "n"
    for word in ("config.json", "bytes", "# net", "README.md", "model.safetensors", "LFW"):
        assert word in done.output
    assert ("that everybody can read?" in done.output) == (answer != "--yes")
    assert uploaded == [["README.md", "config.json", "model.safetensors"]] * (answer != "n")
    assert ("hf-hub:me/net@c0ffee" in done.output) == (answer != "n")
