"""A training run small enough for a test; as a script, one to be launched, killed and resumed.

python tests/tinytraining.py FOLDER '{"die_writing": STEP, "die_at": STEP, "resume": true, ...}'
"""

import atexit
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import HANGS
from nets import tiny_fnet
from safetensors.torch import load_file

import idloss.training.saving
from idloss import HallucinationLoss, create_srnet
from idloss.data import AlignedFaces
from idloss.training import Recipe, train
from idloss.training.tasks import HallucinationTask

FIELDS = {
    "iterations": 8,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "log_every": 1,
    "checkpoint_every": 3,
    "device": "cpu",
    "trackers": (),
    "workers": 0,
}


def tiny_faces(count=20, seed=0):
    """Smooth random crops, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 7, 6, generator=generator)
    crops = torch.nn.functional.interpolate(coarse, (112, 96), mode="bilinear")
    labels = torch.arange(count) // 2
    return AlignedFaces(
        crops=(crops * 255).to(torch.uint8),
        names=tuple(f"{i}.jpg" for i in range(count)),
        labels=labels,
        identities=tuple(str(i) for i in range(int(labels.max()) + 1)),
        crop="sphereface",
    )


def tiny_edsr(**options):
    """The smallest EDSR there is, seeded."""
    torch.manual_seed(0)
    return create_srnet("edsr16_64", **{"depth": 1, "width": 8, **options})


def tiny_run(folder, *, resume=False, faces=None, fnet=None, srnet=None, criterion=None, **fields):
    """Train a very small EDSR; gives the network. `fnets` is the recipe's field."""
    weight = fields.setdefault("identity_weight", 0.5)
    if "fnets" in fields:
        fields["fnet"] = fields.pop("fnets")
    srnet = tiny_edsr() if srnet is None else srnet
    if criterion is None:
        criterion = HallucinationLoss(fnet or tiny_fnet(), weight=weight, crop="sphereface")
    return train(
        Recipe(**{**FIELDS, **fields}),
        folder,
        resume=resume,
        faces=tiny_faces() if faces is None else faces,
        srnet=srnet,
        criterion=criterion,
    )


def assert_same(folder, expected, atol=0.0, rtol=0.0):
    """Two runs went the same way and ended alike; their weights may differ ten times as much."""
    assert list(losses(folder)) == list(losses(expected))
    found, wanted = (list(losses(one).values()) for one in (folder, expected))
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=rtol)
    state = weights(folder)
    for key, value in weights(expected).items():
        torch.testing.assert_close(state[key], value, atol=10 * atol, rtol=10 * rtol)


def launch(script, *arguments, processes=1):
    """Run a script, alone or under torchrun; gives its exit status and what it printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        command += [f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, *(str(one) for one in (script, *arguments))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS,
        check=False,
    )
    return done.returncode, done.stdout


def losses(folder):
    """Loss columns of a run's log, by step."""
    with (Path(folder) / "training.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "faces_per_second")]
    return {int(row["step"]): [float(row[name]) for name in names] for row in rows}


def weights(folder):
    """Weights that a run saved at its end."""
    return load_file(Path(folder) / "model" / "model.safetensors")


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(step):
    """Be killed when half of a checkpoint is on the disk."""
    save = torch.save
    saved = idloss.training.saving.Checkpoints.save

    def dying(checkpoints, at, *rest):
        if at == step:

            def half(value, place, *rest, **more):
                save(value, place, *rest, **more)
                _die()

            torch.save = half
        saved(checkpoints, at, *rest)

    idloss.training.saving.Checkpoints.save = dying


def die_at(step):
    """Be killed between the batch of a step and its end."""
    batch = HallucinationTask.batch

    def dying(task, draw, crops):
        if draw.step == step:
            _die()
        return batch(task, draw, crops)

    HallucinationTask.batch = dying


def _tell_threads():
    for name in Path("/proc/self/task").glob("*/comm"):
        print("thread left:", name.read_text().strip())


def fail_on_main(step):
    """Find the disk full on the main process alone, when the parts of a checkpoint are there.

    At the end, say which threads are left: gloo's abort a process that ends before them.
    """
    atexit.register(_tell_threads)
    sync = idloss.training.saving.sync

    def failing(path):
        if f"step-{step:06d}" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    idloss.training.saving.sync = failing


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for harm in (die_writing, die_at, fail_on_main):
        if harm.__name__ in options:
            harm(options.pop(harm.__name__))
    tiny_run(sys.argv[1], **options)
