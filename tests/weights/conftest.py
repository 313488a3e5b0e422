"""Servers on loopback, an empty cache, and weights that are registered for one test."""

import functools
import socket
import time

import pytest
from huggingface_hub import constants
from servers import FileServer
from tinyweights import COMMIT, HUB_REPO, NAME, RELEASED, TINY, TINY_PATH, sha256, strip_prefix

from idloss import weights
from idloss.weights import loading, sources


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """Whatever a test or a client does wrong, no name but this machine's is ever looked up."""
    look_up = socket.getaddrinfo

    def guarded(host, *args, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            raise AssertionError(f"a test tried to reach {host!r}")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", guarded)


@pytest.fixture
def server():
    with FileServer() as running:
        yield running


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty HF_HOME."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home"


@pytest.fixture
def register(monkeypatch):
    """Register weights for one test: `register(source, adapter=...)` returns their name."""
    monkeypatch.setattr(loading, "_registered", {NAME: TINY})

    def _register(source, name="net.tag", adapter=strip_prefix, **kwargs):
        kwargs = {"licence": "mit", "training_data": "nothing", **kwargs}
        weights.register_weights({name: weights.Weights(source, adapter=adapter, **kwargs)})
        return name

    return _register


@pytest.fixture
def naps(monkeypatch):
    """Nobody sleeps; how long they would have."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def github(server, home, register, naps, monkeypatch):
    """GitHub's stand-in, with nothing on it."""
    monkeypatch.setenv("IDLOSS_GITHUB_RAW", server.url)
    return server


@pytest.fixture
def web(github):
    """A released checkpoint on GitHub's stand-in: the server, its path there, and its name."""
    github.files[TINY_PATH] = RELEASED
    return github, TINY_PATH, NAME


@pytest.fixture
def hub(server, home, register, naps, monkeypatch):
    """A released checkpoint on the stand-in of the Hub: the server, its path there, the name."""
    for function in ("hf_hub_download", "hf_hub_url"):
        client = functools.partial(getattr(sources, function), endpoint=server.url)
        monkeypatch.setattr(sources, function, client)
    path = server.add_hub_file(HUB_REPO, COMMIT, "sub/tiny.pth", RELEASED)
    source = weights.HubFile(HUB_REPO, "sub/tiny.pth", COMMIT, sha256(RELEASED))
    return server, path, register(source)
