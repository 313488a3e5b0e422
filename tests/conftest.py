"""Fixtures every test may ask for: the golden arrays and the real faces, where they are at hand."""

import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one core for each worker
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from idloss import create_fnet
from idloss.fnets.sphereface import sface_released
from idloss.weights.loading import reverse_input

ROOT = Path(__file__).resolve().parent.parent
HANGS = 3600
"""Seconds after which what a test waits for will not come, however slow or paused the machine."""
SHARED = Path(os.environ.get("IDLOSS_SHARED", ROOT.parent / "shared"))


def shared_file(name: str) -> Path:
    """Path of a file of the shared data; skips the test, saying so, where it is not at hand."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared data not at hand: {name} (set IDLOSS_SHARED to its folder)")
    return path


@pytest.fixture(scope="session")
def golden():
    """What the paper's released code computes, as a mapping of arrays."""
    with np.load(shared_file("golden/reference.npz")) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def shared():
    """`shared("data/pairs.txt")` is a path, or a skip that names what is missing."""
    return shared_file


@pytest.fixture
def seeded():
    """Deterministic random numbers for one test."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture
def sface_seeded(shared):
    """SFace with the weights of golden/README.md, drawn in the order of the authors' keys."""
    keys = json.loads(shared("golden/sface_keys.json").read_text())
    released = {}
    for index, (key, shape) in enumerate(keys.items()):
        random = np.random.RandomState(5000 + index)
        if len(shape) > 1:
            value = random.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
        elif "bias" in key:
            value = random.standard_normal(shape) * 0.01
        else:
            value = np.full(shape, 0.25)
        released[key] = torch.from_numpy(value.astype(np.float32))
    model = create_fnet("sface")
    model.load_state_dict(reverse_input(sface_released(released), "stages.0.conv"))
    return model.eval()


@pytest.fixture
def released_edsr(golden):
    """`released_edsr("edsr_2_16")` is a golden EDSR's state dict under the authors' names."""

    def state_dict(prefix):
        names = [key for key in golden if key.startswith(f"{prefix}/")]
        return {key.removeprefix(f"{prefix}/"): torch.from_numpy(golden[key]) for key in names}

    return state_dict
