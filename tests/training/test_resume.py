"""Killed, stopped, cut short or shared out: a run ends with the numbers of an plain one."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import WeakFileLock
from minilfw import photo_folder
from tinytraining import assert_same, launch, losses, tiny_faces, tiny_run, weights

from idloss.data import open_faces
from idloss.training import TrainingStoppedError, load_recipe
from idloss.training.engine import CsvTracker
from idloss.training.recipe import read_notes
from idloss.training.tasks import HallucinationTask
from idloss.weights.files import file_sha256

SCRIPT = Path(__file__).parents[1] / "tinytraining.py"


@pytest.mark.parametrize(
    ("death", "processes"),
    [("die_at", 1), ("die_writing", 1), ("die_writing", 2)],
)
def test_killed_and_resumed(plain, tmp_path, death, processes):
    """Two processes give the losses of one, too, and join without being told that there is no GPU.

    The log of a killed run is cut.
    """
    device = "cpu" if processes == 1 or torch.accelerator.is_available() else "auto"
    dying, again = (json.dumps({one: 6, "device": device}) for one in (death, "resume"))
    code, shown = launch(SCRIPT, tmp_path, dying, processes=processes)
    assert code != 0, shown
    assert max(losses(tmp_path)) in (5, 6)  # the checkpoint is of step 3
    there = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "step-000003" in there
    assert "step-000006" not in there
    assert ("step-000006.partial" in there) == (death == "die_writing")
    with (tmp_path / "training.csv").open("a") as log:
        log.write("7,0.1")  # half a row
    if processes == 1:
        tiny_run(tmp_path, resume=True)
    else:
        code, shown = launch(SCRIPT, tmp_path, again, processes=processes)
        assert code == 0, shown
    states = (tmp_path / "checkpoints" / "step-000008").glob("random_states_*")
    assert len(list(states)) == processes  # they were one run
    assert_same(tmp_path, plain, atol=0 if processes == 1 else 1e-5)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.glob("model.*"))


def test_asked_to_stop_it_finishes_the_step_and_keeps_it(tmp_path, monkeypatch):
    batch = HallucinationTask.batch

    def asking(task, draw, crops):
        if draw.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(task, draw, crops)

    monkeypatch.setattr(HallucinationTask, "batch", asking)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that it does not end the tests
    try:
        with pytest.raises(TrainingStoppedError, match=r"of 20, as asked; resume to go on"):
            tiny_run(tmp_path, iterations=20, checkpoint_every=20)
    finally:
        signal.signal(signal.SIGTERM, before)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert int(kept.name.removeprefix("step-")) == max(losses(tmp_path)) in (4, 5)


def test_resuming_a_finished_run_changes_nothing(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "run")
    trained = tiny_run(folder, resume=True)
    assert (folder / "training.csv").read_text() == (plain / "training.csv").read_text()
    state = weights(plain)
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())


def test_only_the_same_run_is_resumed(tmp_path):
    tiny_run(tmp_path, iterations=2)
    with pytest.raises(FileExistsError, match="holds a run: resume it, or choose another folder"):
        tiny_run(tmp_path, iterations=2)
    with pytest.raises(ValueError, match=r"another recipe: seed was 0 and is 1"):
        tiny_run(tmp_path, resume=True, iterations=2, seed=1)
    with pytest.raises(ValueError, match="on other faces than these"):
        tiny_run(tmp_path, resume=True, iterations=2, faces=tiny_faces(seed=1))
    with pytest.raises(ValueError, match="at step 2, beyond iterations=1: raise iterations"):
        tiny_run(tmp_path, resume=True, iterations=1)
    tiny_run(tmp_path, resume=True, iterations=2, log_every=7)  # changes no number
    assert read_notes(tmp_path / "recipe.yaml") == []


def test_what_advice_names_may_change_on_resuming_and_is_recorded(tmp_path):
    """As every message says: a lower rate, clipping, another precision; and a longer run."""
    tiny_run(tmp_path, iterations=4, schedule="constant", weight_decay=0.1)
    fields = {"learning_rate": 1e-4, "clip_norm": 1.0, "precision": "bf16", "iterations": 6}
    tiny_run(tmp_path, resume=True, schedule="constant", weight_decay=0.0, **fields)
    assert losses(tmp_path)[4][-1] == 1e-3
    assert losses(tmp_path)[5][-1] == 1e-4
    recorded = read_notes(tmp_path / "recipe.yaml")
    assert "from step 5 on: learning_rate was 0.001 and is 0.0001" in recorded
    assert len(recorded) == 5
    assert load_recipe(tmp_path / "recipe.yaml").learning_rate == 1e-4
    told = json.loads((tmp_path / "model" / "config.json").read_text())["idloss"]
    assert told["changes"] == recorded


@pytest.mark.parametrize(
    ("harm", "steps"),
    [("", [3]), ("step,lo", [3]), ("{}\0\0\0,1\n", [1, 2, 3]), ("{}3,0.1", [1, 2, 3])],
    ids=["empty", "half a head", "garbage", "half a row"],
)
def test_a_log_that_a_kill_cut_short_is_mended(tmp_path, harm, steps):
    fields = {"identity_weight": 0, "checkpoint_every": 1}
    tiny_run(tmp_path, iterations=2, **fields)
    log = tmp_path / "training.csv"
    log.write_text(harm.format(log.read_text()))
    tiny_run(tmp_path, iterations=3, resume=True, **fields)
    assert list(losses(tmp_path)) == steps


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    tiny_run(tmp_path, iterations=1)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path}/recipe.yaml: a recipe is a list"):
        tiny_run(tmp_path, iterations=2, resume=True)


def test_a_checkpoint_that_fails_on_one_process_fails_on_all(tmp_path):
    """Nobody waits for a process that has given up; training goes on, and keeps later ones."""
    code, shown = launch(SCRIPT, tmp_path, '{"fail_on_main": 3}', processes=2)
    assert code == 0, shown
    assert "the checkpoint of step 3 could not be written" in shown
    assert "(another process failed and says why)" in shown
    assert "thread left" in shown or not Path("/proc/self/task").exists()
    assert "gloo" not in shown.partition("thread left")[2]
    assert list(losses(tmp_path)) == list(range(1, 9))
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"step-000006", "step-000008"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("harm", ["cut", "a bit", "gone"])
def test_a_damaged_checkpoint_is_passed_over(plain, tmp_path, name, harm, capsys):
    folder = shutil.copytree(plain, tmp_path / "run")
    file = folder / "checkpoints" / "step-000008" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if harm == "a bit" else data[:100])
    if harm == "gone":
        file.unlink()
    tiny_run(folder, resume=True)
    shown = capsys.readouterr().out
    assert "step-000008: " in shown
    assert name in shown
    assert "Going on from step 6" in shown
    assert_same(folder, plain, atol=0)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-000006", "step-000008"}


def test_no_whole_checkpoint_is_said(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "run")
    for file in folder.glob("checkpoints/*/optimizer.bin"):
        file.unlink()
    with pytest.raises(OSError, match=r"no checkpoint in .* is whole.*optimizer\.bin.*train anew"):
        tiny_run(folder, resume=True)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt"]
)
def test_no_file_of_a_checkpoint_runs_code(plain, tmp_path, name):
    """Whoever writes a checkpoint may write its hashes too."""
    folder, planted = shutil.copytree(plain, tmp_path / "run"), tmp_path / "planted"
    checkpoint = folder / "checkpoints" / "step-000008"
    (checkpoint / name).write_bytes(pickle.dumps(Payload(planted)))
    hashes = json.loads((checkpoint / "sha256.json").read_text())
    hashes[name] = file_sha256(checkpoint / name)
    (checkpoint / "sha256.json").write_text(json.dumps(hashes))
    with suppress(OSError):
        tiny_run(folder, resume=True)
    assert not planted.exists()


def test_a_full_disk_is_found_out_before_training(tmp_path, monkeypatch):
    full = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match=r"has 1 MiB free and \d+ are needed: make room"):
        tiny_run(tmp_path)


def test_a_disk_that_fills_up_costs_no_step(tmp_path, monkeypatch, capfd):
    """Checkpoints that do not fit are put off; the run goes on and ends whole."""
    free = iter([1 << 40, 1 << 40, 0, 0, 0])  # at the start, step 3, then full for a while
    usage = lambda _: type("Usage", (), {"free": next(free, 1 << 40)})  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", usage)
    tiny_run(tmp_path, iterations=12)
    assert "the checkpoint of step 6 could not be written" in capfd.readouterr().out
    assert list(losses(tmp_path)) == list(range(1, 13))
    assert (tmp_path / "checkpoints" / "step-000012").is_dir()


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch, capfd):
    """The rows wait until there is room again."""
    real = Path.open

    def full(path, *args, **options):
        if path.name == "training.csv" and 3 <= steps[0] <= 6:
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **options)

    steps, log = [0], CsvTracker.log

    def counted(tracker, values, step=None, **options):
        steps[0] = step
        log(tracker, values, step, **options)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(CsvTracker, "log", counted)
    tiny_run(tmp_path)
    assert list(losses(tmp_path)) == list(range(1, 9))
    assert re.search(r"training\.csv cannot be written .*Make room.*--out", capfd.readouterr().out)
    assert weights(tmp_path)


def test_half_of_a_row_is_taken_back(tmp_path, capsys):
    """A real limit on file size."""
    tracker = CsvTracker(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, limit in enumerate((soft, 40, 40, soft), start=1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            tracker.log({"loss": 0.123456789, "rate": step}, step=step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = (tmp_path / "training.csv").read_text().splitlines()
    assert lines == ["step,loss,rate", *(f"{step},0.123456789,{step}" for step in range(1, 5))]
    assert capsys.readouterr().out.count("cannot be written") == 2


def test_a_photo_that_is_gone_names_the_way_out(tmp_path):
    root = tmp_path / "photos"
    photo_folder(root)
    root /= "lfw"
    run = {"data": str(root), "workers": 0, "batch_size": 4}
    photo = next(iter(sorted(root.rglob("*.jpg"))))
    tiny_run(tmp_path / "run", faces=open_faces(root), iterations=2, **run)
    photo.unlink()
    with pytest.warns(UserWarning, match="left out"):
        fewer = open_faces(root, skip_missing=True)
    said = rf"on other faces.*12 then, 11 now \(left out: .*{photo.name} is not in.*put back"
    with pytest.raises(ValueError, match=said):
        tiny_run(tmp_path / "run", faces=fewer, iterations=4, resume=True, **run)


def test_a_disk_that_is_full_after_the_last_step_costs_no_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("idloss.training.runs.save_network", full)
        with pytest.raises(OSError, match=r"cannot be written to .*No space.*make room and resume"):
            tiny_run(tmp_path, iterations=2)
    tiny_run(tmp_path, iterations=2, resume=True)
    assert weights(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    """As processes that something else than torchrun starts would."""
    message = r"another process trains in .*torchrun"
    with WeakFileLock(tmp_path / ".lock"), pytest.raises(FileExistsError, match=message):
        tiny_run(tmp_path, iterations=1)
    tiny_run(tmp_path, iterations=1)


def test_a_write_that_fails_leaves_earlier_checkpoints_whole(tmp_path):
    """A real limit on file size stands in for a real full disk."""
    tiny_run(tmp_path, iterations=4)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")  # what a full disk would have cut
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="could not be written"):
            tiny_run(tmp_path, iterations=4, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    tiny_run(tmp_path, iterations=4, resume=True)


def test_weights_that_are_not_finite_are_never_kept(tmp_path, monkeypatch):
    def ruin(optimizer, *_, **__):
        for group in optimizer.param_groups:
            group["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.Adam, "step", ruin)
    with pytest.raises(TrainingStoppedError, match="not finite"):
        tiny_run(tmp_path, iterations=1)
    assert not (tmp_path / "checkpoints").exists()
