"""Fixtures every test may ask for: the golden arrays and the real faces, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
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
