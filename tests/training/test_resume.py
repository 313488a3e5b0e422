"""Killed, stopped, cut short or shared out: a run ends with the numbers of an unbroken one."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tinytraining import losses, tiny_faces, tiny_run, weights

from idloss.training import TrainingStoppedError

SCRIPT = Path(__file__).parents[1] / "tinytraining.py"


def launch(folder, *options, processes=1, **popen):
    """Run the script, alone or under torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        command += [f"--nproc-per-node={processes}"]
    command += [str(SCRIPT), str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **popen)


def finished(process):
    shown = process.communicate(timeout=240)[0]
    return process.returncode, shown


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tiny_run(folder)
    torch.set_num_threads(threads)
    return folder


def assert_same(folder, unbroken, atol):
    expected, found = losses(unbroken), losses(folder)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=atol, rtol=0)
    state = weights(folder)
    for key, value in weights(unbroken).items():
        torch.testing.assert_close(state[key], value, atol=10 * atol, rtol=0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("death", [("--die-at", "5"), ("--die-writing", "6")], ids=lambda d: d[0])
def test_killed_and_resumed(unbroken, tmp_path, death, processes):
    code, shown = finished(launch(tmp_path, *death, processes=processes))
    assert code != 0, shown
    there = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert "step-000003" in there
    assert "step-000006" not in there
    if death[0] == "--die-writing":
        assert "step-000006.partial" in there
    code, shown = finished(launch(tmp_path, "--resume", processes=processes))
    assert code == 0, shown
    assert_same(tmp_path, unbroken, atol=0 if processes == 1 else 1e-5)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_two_processes_give_the_losses_of_one(unbroken, tmp_path):
    code, shown = finished(launch(tmp_path, processes=2))
    assert code == 0, shown
    assert_same(tmp_path, unbroken, atol=1e-5)


def test_asked_to_stop_it_finishes_the_step_and_keeps_it(unbroken, tmp_path):
    # slow enough to be caught: a batch of everything, many steps
    process = launch(tmp_path, "iterations=5000", "checkpoint_every=5000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "training.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, shown = finished(process)
    assert code != 0
    assert "of 5000, as asked; resume to go on" in shown
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert int(kept.name.removeprefix("step-")) == max(losses(tmp_path))


def test_a_log_is_cut_to_what_is_resumed(unbroken, tmp_path):
    """The log of a killed run reaches beyond its last checkpoint."""
    code, _ = finished(launch(tmp_path, "--die-at", "6"))
    assert code != 0
    assert max(losses(tmp_path)) == 5  # the checkpoint is of step 3
    with (tmp_path / "training.csv").open("a") as log:
        log.write("6,0.1")  # half a row
    torch.set_num_threads(1)
    tiny_run(tmp_path, resume=True)
    assert_same(tmp_path, unbroken, atol=0)


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    tiny_run(tmp_path)
    before = (tmp_path / "training.csv").read_text()
    trained = tiny_run(tmp_path, resume=True)
    assert (tmp_path / "training.csv").read_text() == before
    state = weights(tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())


def test_only_the_same_run_is_resumed(tmp_path):
    tiny_run(tmp_path, iterations=2)
    with pytest.raises(FileExistsError, match="holds a run: resume it, or choose another folder"):
        tiny_run(tmp_path, iterations=2)
    with pytest.raises(ValueError, match=r"another recipe: learning_rate was 0\.001 and is 0\.01"):
        tiny_run(tmp_path, resume=True, iterations=2, learning_rate=0.01)
    with pytest.raises(ValueError, match="on other faces than these"):
        tiny_run(tmp_path, resume=True, iterations=2, faces=tiny_faces(seed=1))
    tiny_run(tmp_path, resume=True, iterations=2, log_every=7)  # changes no number


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


def test_a_write_that_fails_leaves_earlier_checkpoints_whole(tmp_path):
    """A real limit on file size stands in for a real full disk."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    code, shown = finished(launch(tmp_path, "iterations=4"))
    assert code == 0, shown
    again = ["--resume", "iterations=4"]
    # shorten the finished run to what a full disk would have cut
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name == "step-000004":
            path.rename(tmp_path / "gone")
    code, shown = finished(launch(tmp_path, *again, preexec_fn=limited))
    assert code != 0
    assert "could not be written" in shown
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    code, shown = finished(launch(tmp_path, *again))
    assert code == 0, shown


def test_weights_that_are_not_finite_are_never_kept(tmp_path, monkeypatch):
    def ruin(optimizer, *_, **__):
        for group in optimizer.param_groups:
            group["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.Adam, "step", ruin)
    with pytest.raises(TrainingStoppedError, match="not finite"):
        tiny_run(tmp_path, iterations=1)
    assert not (tmp_path / "checkpoints").exists()
