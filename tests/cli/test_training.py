"""`idloss train`, as a person types it."""

import pytest
from minilfw import photo_folder
from typer.testing import CliRunner

from idloss import create_fnet, create_srnet
from idloss.cli import app

run = CliRunner().invoke
SMALL = ["srnet_options={depth: 1, width: 8}", "device=cpu", "trackers=[]", "log_every=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("faces"))


def test_prepare_train_resume(photos, tmp_path):
    faces, out = tmp_path / "faces", tmp_path / "run"
    shown = run(app, ["prepare", "folder", str(photos), str(faces)])
    assert shown.exit_code == 0, shown.output
    fields = [f"data={faces}", "iterations=2", "batch_size=4", *SMALL]
    command = ["train", "paper_edsr16_64", *fields, "--out", str(out)]
    shown = run(app, command)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert f"the network is in {out}/model" in shown.output
    assert {"recipe.yaml", "training.csv", "checkpoints", "model"} <= {
        path.name for path in out.iterdir()
    }
    assert create_srnet(f"local-dir:{out}/model", pretrained=True).scale == 4
    again = run(app, command)
    assert isinstance(again.exception, FileExistsError)
    assert run(app, [*command, "--resume"]).exit_code == 0


def test_train_fnet(photos, tmp_path):
    out = tmp_path / "run"
    fields = [f"data={photos}", "iterations=2", "batch_size=4", *SMALL[1:], "workers=0"]
    shown = run(
        app, ["train-fnet", "fnet_mobilefacenet", *fields, "crop=sphereface", "--out", str(out)]
    )
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert create_fnet(f"local-dir:{out}/model", pretrained=True).num_features == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper_edsr16"], "unknown recipe 'paper_edsr16'"),
        (["paper_edsr16_64", "batch=3"], "unknown field 'batch'"),
        (["paper_edsr16_64"], "set data=FOLDER"),
        (["paper_edsr16_64", "data=nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = command("train", *arguments)
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())
