"""Fixtures of a small evaluation; its cache lies in a folder of the test's own."""

import pytest
import torch
from nets import TinySRNet, tiny_fnet
from tinybench import drawn_pairs

from idloss import create_fnet, create_srnet


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Where embeddings are kept."""
    monkeypatch.setattr("idloss.evaluation.run.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "idloss" / "embeddings"


@pytest.fixture(scope="session")
def data():
    """Sixteen pairs."""
    return drawn_pairs()


@pytest.fixture
def fnet():
    """An FNet for `sphereface` crops."""
    return create_fnet(tiny_fnet(size=(112, 96)))


@pytest.fixture
def srnets():
    """Two interpolations and a network."""
    torch.manual_seed(3)
    nets = {name: create_srnet(name) for name in ("bilinear", "bicubic")}
    return nets | {"tiny": TinySRNet().eval()}


@pytest.fixture
def threads():
    """`threads(3)` sets how many threads torch has, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
