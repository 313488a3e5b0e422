"""`idloss train` and `idloss benchmark train`, as a person types them."""

import pytest
from minilfw import mini_lfw
from typer.testing import CliRunner

from idloss import create_fnet, create_srnet
from idloss.benchmark.training import PARTS, TrainingCase, benchmark_training, format_training
from idloss.cli import app, main

run = CliRunner().invoke
SMALL = ["srnet_options={depth: 1, width: 8}", "device=cpu", "trackers=[]", "log_every=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos with a `landmarks.csv`, as `open_faces` takes them."""
    root = mini_lfw(tmp_path_factory.mktemp("faces"), people=4, photos=3)
    rows = (root / "lfw_landmarks.csv").read_text().splitlines()
    points = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    header = ["image_id", *(f"{point}_{axis}" for point in points for axis in "xy"), "identity"]
    rows = [f"{row},{row.split('/')[0]}" for row in rows]
    (root / "lfw" / "landmarks.csv").write_text("\n".join([",".join(header), *rows]) + "\n")
    return root / "lfw"


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
def test_what_is_wrong_is_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["idloss", "train", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


def test_both_ways_of_training_are_measured(photos, monkeypatch):
    # in this process: what is looked at is the tables, not the memory
    monkeypatch.setattr("idloss.benchmark.training.in_own_process", lambda f, *rest: f(*rest))
    small = create_srnet("edsr16_64", depth=1, width=8)
    monkeypatch.setattr("idloss.benchmark.training.create_srnet", lambda _: small)
    case = TrainingCase(str(photos), batch=4, steps=8, warmup=1, precision="fp32")
    released, ours = benchmark_training(case)
    assert released.by_size.keys() == ours.by_size.keys() == {(28, 24), (14, 12), (7, 6)}
    assert ours.flops < released.flops  # no HR features in the step
    assert all(one.seconds > 0 and one.parts.keys() == set(PARTS) for one in (released, ours))
    table = format_training([released, ours])
    assert "ms at 28x24" in table
    assert table.count("| idloss |") == 2


def test_too_few_steps_are_refused(photos):
    with pytest.raises(ValueError, match="1 steps are too few to see every size: raise --steps"):
        benchmark_training(TrainingCase(str(photos), batch=4, steps=1, warmup=5))
