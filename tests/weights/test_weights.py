"""Weights: from every kind of source, over a real network stack that misbehaves, to a model."""

import email.utils
import functools
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from servers import Fault, FileServer
from timm.models import generate_default_cfgs, register_model
from torch import nn

from idloss import weights
from idloss.weights import catalogue, http
from idloss.weights import hub as hub_module
from idloss.weights.files import file_git_sha1
from idloss.weights.sources import GITHUB_RAW

COMMIT = "c0ffee" * 6 + "c0ff"
REPO = "somebody/something"
NAME = "idloss_tiny.a"


def _state_dict(prefix=""):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        f"{prefix}conv.weight": normal(128, 3, 16, 16),
        f"{prefix}conv.bias": normal(128),
        f"{prefix}fc.weight": normal(5, 128),
        f"{prefix}fc.bias": normal(5),
    }


def _saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _git_sha1(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _sha256(body):
    return hashlib.sha256(body).hexdigest()


def strip_prefix(state_dict):
    """Adapter of the tests: a released layout has `net.` before every key."""
    if not all(key.startswith("net.") for key in state_dict):
        raise ValueError(f"unknown keys: {sorted(state_dict)}")
    return {key.removeprefix("net."): value for key, value in state_dict.items()}


RELEASED = _saved(_state_dict("net."))  # about 400 kB
TINY = weights.Weights(
    weights.GitHubBlob(REPO, COMMIT, (("models/tiny.pth", _git_sha1(RELEASED)),)),
    licence="mit",
    training_data="nothing at all",
    adapter=strip_prefix,
)
TINY_PATH = f"/{REPO}/{COMMIT}/models/tiny.pth"

default_cfgs = generate_default_cfgs(
    {
        NAME: {"num_classes": 5, "classifier": "fc", **TINY.cfg()},
        "idloss_tiny.untrained": {"num_classes": 5, "classifier": "fc"},
    }
)


class Tiny(nn.Module):
    def __init__(self, num_classes=5, in_chans=3, global_pool="avg"):
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 128
        self.conv = nn.Conv2d(in_chans, 128, 16)
        self.fc = nn.Linear(128, num_classes)


@register_model
def idloss_tiny(pretrained=False, **kwargs):
    return weights.build_model(Tiny, "idloss_tiny", pretrained, **kwargs)


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
    monkeypatch.setattr(catalogue, "_registered", {NAME: TINY})

    def _register(source, name="net.tag", adapter=strip_prefix, **kwargs):
        kwargs = {"licence": "mit", "training_data": "nothing", **kwargs}
        weights.register_weights(name, weights.Weights(source, adapter=adapter, **kwargs))
        return name

    return _register


@pytest.fixture
def naps(monkeypatch):
    """Nobody sleeps; how long they would have."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def web(server, home, register, naps):
    """A released checkpoint at a URL: the server, its path there, and the weights' name."""
    server.files["/f.pth"] = RELEASED
    return server, "/f.pth", register(weights.UrlFile(f"{server.url}/f.pth", _sha256(RELEASED)))


def assert_tiny(path):
    loaded = safetensors.torch.load_file(path)
    expected = _state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def files_under(folder):
    """Everything but locks."""
    if not folder.exists():
        return []
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    )


class TestPlainHttp:
    def test_download_convert_once(self, web, home):
        server, url_path, name = web
        path = weights.fetch(name)
        assert_tiny(path)
        assert path.is_relative_to(home / "idloss")
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
        assert about["source"] == f"{server.url}/f.pth"
        assert about["source_hash"] == f"sha256:{_sha256(RELEASED)}"
        assert (about["licence"], about["training_data"]) == ("mit", "nothing")
        assert "strip_prefix" in about["adapter"]
        assert weights.fetch(name) == path
        assert len(server.gets(url_path)) == 1
        kept = files_under(home / "idloss")
        assert len(kept) == 2
        assert not [file for file in kept if file.endswith((".partial", ".etag", ".tmp"))]

    def test_converted_is_enough(self, web, home):
        server, url_path, name = web
        weights.fetch(name)
        for file in (home / "idloss" / "downloads").iterdir():
            file.unlink()
        assert_tiny(weights.fetch(name))
        assert len(server.gets(url_path)) == 1

    def test_cache_is_readable_by_the_group_as_the_umask_says(self, web):
        _, _, name = web
        old = os.umask(0o027)
        try:
            path = weights.fetch(name)
        finally:
            os.umask(old)
        assert path.stat().st_mode & 0o777 == 0o640

    def test_force(self, web):
        server, url_path, name = web
        weights.fetch(name)
        weights.fetch(name, force=True)
        assert [seen.range for seen in server.gets(url_path)] == [None, None]

    def test_cache_dir(self, web, home, tmp_path):
        _, _, name = web
        path = weights.fetch(name, cache_dir=tmp_path / "mine")
        assert path.is_relative_to(tmp_path / "mine")
        assert not home.exists()

    @pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed early"])
    def test_interrupted_resumes_where_it_was(self, web, reset):
        server, url_path, name = web
        server.faults[url_path] = [Fault(cut=100_000, reset=reset), Fault(cut=50_000, reset=reset)]
        assert_tiny(weights.fetch(name))
        first, second, third = server.gets(url_path)
        assert first.range is None
        starts = [int(seen.range.removeprefix("bytes=").rstrip("-")) for seen in (second, third)]
        assert 0 < starts[0] <= 100_000
        assert starts[0] < starts[1] <= starts[0] + 50_000
        assert second.if_range == f'"{_sha256(RELEASED)}"'

    def test_always_truncated(self, web, home, naps):
        server, url_path, name = web
        server.faults[url_path] = Fault(cut=100_000, ignore_range=True)
        with pytest.raises(weights.TruncatedError, match=rf"announced {len(RELEASED):,} bytes"):
            weights.fetch(name)
        # the first attempt made progress; after it, every pause is used and no more
        assert len(server.gets(url_path)) == 2 + len(http.BACKOFF)
        assert naps[1:] == list(http.BACKOFF)
        assert not [file for file in files_under(home) if not file.endswith((".partial", ".etag"))]

    def test_wrong_hash(self, web, home):
        server, url_path, name = web
        server.faults[url_path] = Fault(body=b"<html>not found, but 200</html>")
        with pytest.raises(weights.HashMismatchError) as caught:
            weights.fetch(name)
        message = str(caught.value)
        assert _sha256(RELEASED) in message
        assert _sha256(b"<html>not found, but 200</html>") in message
        assert "31 bytes" in message
        assert files_under(home) == []
        assert len(server.gets(url_path)) == 1

    def partial(self, home, name, body):
        (piece,) = weights.get_weights(name).source.pieces
        path = home / "idloss" / "downloads" / f"sha256-{piece.sha256}-{piece.filename}.partial"
        path.parent.mkdir(parents=True)
        path.write_bytes(body)
        return path

    def test_wrong_partial_is_discarded_once(self, web, home):
        server, url_path, name = web
        self.partial(home, name, b"x" * 1000)
        assert_tiny(weights.fetch(name))
        assert [seen.range for seen in server.gets(url_path)] == ["bytes=1000-", None]

    def test_right_partial_is_resumed(self, web, home):
        server, url_path, name = web
        self.partial(home, name, RELEASED[:1000])
        assert_tiny(weights.fetch(name))
        assert [seen.range for seen in server.gets(url_path)] == ["bytes=1000-"]

    def test_complete_partial_is_taken(self, web, home):
        server, url_path, name = web
        self.partial(home, name, RELEASED)
        assert_tiny(weights.fetch(name))
        assert len(server.gets(url_path)) == 1  # answered with 416

    def test_server_without_range_restarts(self, web, home):
        server, url_path, name = web
        partial = self.partial(home, name, RELEASED[:1000])
        server.faults[url_path] = Fault(ignore_range=True)
        assert_tiny(weights.fetch(name))
        assert len(server.gets(url_path)) == 1
        assert not partial.exists()

    def test_file_replaced_between_attempts(self, web):
        server, url_path, name = web
        server.faults[url_path] = [Fault(body=bytes(len(RELEASED)), cut=100_000)]
        assert_tiny(weights.fetch(name))
        # the second request's If-Range no longer holds, and its answer is the whole file
        assert len(server.gets(url_path)) == 2

    def test_without_content_length(self, web):
        server, url_path, name = web
        server.faults[url_path] = [Fault(no_length=True)]
        assert_tiny(weights.fetch(name))

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (401, weights.AccessDeniedError),
            (403, weights.AccessDeniedError),
            (404, weights.NotFoundError),
            (410, weights.NotFoundError),
            (418, weights.ServerError),
        ],
    )
    def test_refused(self, web, home, status, error):
        server, url_path, name = web
        server.faults[url_path] = Fault(status=status)
        with pytest.raises(error, match=f"{status} ") as caught:
            weights.fetch(name)
        self.assert_tells_the_way_out(str(caught.value), server, name)
        assert len(server.gets(url_path)) == 1
        assert files_under(home) == []

    def assert_tells_the_way_out(self, message, server, name):
        assert f"{server.url}/f.pth" in message
        assert _sha256(RELEASED) in message
        assert f"weights.add('{name}', 'f.pth')" in message

    def test_429_waits_as_told(self, web, naps):
        server, url_path, name = web
        date = email.utils.formatdate(time.time() + 50, usegmt=True)
        server.faults[url_path] = [
            Fault(status=429, headers={"Retry-After": "7"}),
            Fault(status=429, headers={"Retry-After": date}),
            Fault(status=429),
        ]
        assert_tiny(weights.fetch(name))
        assert naps[0] == 7
        assert 40 < naps[1] <= 50
        assert naps[2] == http.BACKOFF[2]

    def test_429_for_ever(self, web, naps):
        server, url_path, name = web
        server.faults[url_path] = Fault(status=429)
        with pytest.raises(weights.RateLimitedError, match="429"):
            weights.fetch(name)
        assert naps == list(http.BACKOFF)

    def test_429_for_hours(self, web, naps):
        server, url_path, name = web
        server.faults[url_path] = Fault(status=429, headers={"Retry-After": "86400"})
        with pytest.raises(weights.RateLimitedError, match="pause of 86400 s"):
            weights.fetch(name)
        assert naps == []

    @pytest.mark.parametrize("status", [500, 502, 503])
    def test_5xx_then_well(self, web, naps, status):
        server, url_path, name = web
        server.faults[url_path] = [Fault(status=status), Fault(status=status)]
        assert_tiny(weights.fetch(name))
        assert naps == list(http.BACKOFF[:2])

    def test_500_for_ever(self, web):
        server, url_path, name = web
        server.faults[url_path] = Fault(status=500)
        with pytest.raises(weights.ServerError, match="500"):
            weights.fetch(name)
        assert len(server.gets(url_path)) == 1 + len(http.BACKOFF)

    def test_nobody_there(self, web, naps):
        server, _, name = web
        server.httpd.server_close()
        with pytest.raises(weights.OfflineError, match="refused") as caught:
            weights.fetch(name)
        self.assert_tells_the_way_out(str(caught.value), server, name)
        assert len(naps) == 1

    def test_proxy_of_the_environment(self, server, home, register, monkeypatch):
        server.files["/weights.invalid/f.pth"] = RELEASED
        name = register(weights.UrlFile("http://weights.invalid/f.pth", _sha256(RELEASED)))
        monkeypatch.setenv("http_proxy", server.url)
        assert_tiny(weights.fetch(name))

    @pytest.mark.parametrize("terminal", [True, False])
    def test_progress_only_on_a_terminal(self, web, monkeypatch, terminal):
        _, _, name = web
        shown = io.StringIO()
        shown.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", shown)
        weights.fetch(name)
        assert ("f.pth" in shown.getvalue()) == terminal

    def test_damaged_files_in_the_cache_are_replaced(self, web, home):
        server, url_path, name = web
        path = weights.fetch(name)
        (kept,) = (home / "idloss" / "downloads").iterdir()
        path.write_bytes(path.read_bytes()[:1000])
        kept.write_bytes(b"damaged")
        assert_tiny(weights.fetch(name))
        assert len(server.gets(url_path)) == 2


@pytest.fixture
def github(server, home, register, naps, monkeypatch):
    monkeypatch.setenv("IDLOSS_GITHUB_RAW", server.url)
    return server


def seven_zip(folder, body, member="tiny.pth"):
    py7zr = pytest.importorskip("py7zr")
    archive = folder / "made.7z"
    with py7zr.SevenZipFile(archive, "w") as opened:
        opened.writestr(body, member)
    return archive.read_bytes()


class TestGitHub:
    def source(self, server, *bodies, member=None):
        parts = []
        for index, body in enumerate(bodies, start=1):
            path = f"dir with space/f.00{index}"
            server.files[f"/{REPO}/{COMMIT}/dir%20with%20space/f.00{index}"] = body
            parts.append((path, _git_sha1(body)))
        return weights.GitHubBlob(REPO, COMMIT, tuple(parts), member=member)

    def test_git_agrees_on_the_blob_hash(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(RELEASED)
        command = ["git", "hash-object", "--no-filters", str(path)]
        git = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert file_git_sha1(path) == git

    def test_addresses(self):
        (piece,) = TINY.source.pieces
        assert piece.url == f"{GITHUB_RAW}{TINY_PATH}"
        assert GITHUB_RAW == "https://raw.githubusercontent.com"

    def test_one_blob(self, github):
        github.files[TINY_PATH] = RELEASED
        assert_tiny(weights.fetch(NAME))

    def test_wrong_blob(self, github):
        github.files[TINY_PATH] = RELEASED + b"\0"
        with pytest.raises(weights.HashMismatchError, match=_git_sha1(RELEASED)):
            weights.fetch(NAME)

    def test_parts_are_joined(self, github, register):
        half = len(RELEASED) // 2
        assert_tiny(weights.fetch(register(self.source(github, RELEASED[:half], RELEASED[half:]))))

    def test_split_7z(self, github, register, tmp_path, home):
        archive = seven_zip(tmp_path, RELEASED)
        cut = len(archive) // 3
        source = self.source(github, archive[:cut], archive[cut:], member="tiny.pth")
        assert_tiny(weights.fetch(register(source)))
        assert len(files_under(home)) == 3  # two parts and the converted file, nothing unpacked

    def test_7z_without_the_member(self, github, register, tmp_path):
        source = self.source(github, seven_zip(tmp_path, RELEASED), member="other.pth")
        with pytest.raises(weights.ArchiveError, match=r"no 'other.pth'.*tiny.pth"):
            weights.fetch(register(source))

    @pytest.mark.parametrize("broken", ["no archive", "flipped bit"])
    def test_broken_7z(self, github, register, tmp_path, home, broken):
        body = bytearray(seven_zip(tmp_path, RELEASED))
        if broken == "flipped bit":
            body[len(body) // 2] ^= 1
        else:
            body = b"not an archive"
        source = self.source(github, bytes(body), member="tiny.pth")
        with pytest.raises(weights.ArchiveError, match="broken"):
            weights.fetch(register(source))
        assert not [file for file in files_under(home) if "downloads" not in file]

    def test_without_py7zr(self, github, register, tmp_path, monkeypatch):
        source = self.source(github, seven_zip(tmp_path, RELEASED), member="tiny.pth")
        name = register(source)
        monkeypatch.setitem(sys.modules, "py7zr", None)
        with pytest.raises(ImportError, match=r'pip install "idloss\[released\]"'):
            weights.fetch(name)


HUB_REPO = "someone/some-model"


@pytest.fixture
def hub(server, home, register, naps, monkeypatch):
    """A released checkpoint on the stand-in of the Hub: the server, its path there, the name."""
    client = functools.partial(hub_module.hf_hub_download, endpoint=server.url)
    monkeypatch.setattr(hub_module, "hf_hub_download", client)
    path = server.add_hub_file(HUB_REPO, COMMIT, "sub/tiny.pth", RELEASED)
    source = weights.HubFile(HUB_REPO, "sub/tiny.pth", COMMIT, _sha256(RELEASED))
    return server, path, register(source)


class TestHub:
    """The real huggingface_hub client does the talking."""

    def test_download_convert_once(self, hub, home):
        server, path, name = hub
        converted = weights.fetch(name)
        assert_tiny(converted)
        assert converted.is_relative_to(home / "idloss")
        blobs = list((home / "hub" / "models--someone--some-model" / "blobs").iterdir())
        assert [blob.read_bytes() for blob in blobs] == [RELEASED]
        weights.fetch(name)
        assert len(server.gets(path)) == 1

    def test_safetensors_of_our_own_layout_stay_in_the_hub_cache(self, hub, register, home):
        server, _, _ = hub
        body = safetensors.torch.save(_state_dict())
        server.add_hub_file(HUB_REPO, COMMIT, "model.safetensors", body)
        source = weights.HubFile(HUB_REPO, "model.safetensors", COMMIT, _sha256(body))
        path = weights.fetch(register(source, "ours.tag", adapter=None))
        assert path.is_relative_to(home / "hub")
        assert_tiny(path)
        path.resolve().write_bytes(body[:-4] + b"\1\2\3\4")  # damaged on disk
        assert_tiny(weights.fetch("ours.tag"))

    def test_cache_dir_is_the_clients_too(self, hub, home, tmp_path):
        _, _, name = hub
        weights.fetch(name, cache_dir=tmp_path / "mine")
        assert (tmp_path / "mine" / "models--someone--some-model").is_dir()
        assert not home.exists()

    def test_interrupted_resumes(self, hub):
        server, path, name = hub
        server.faults[path] = [Fault(cut=100_000)]
        assert_tiny(weights.fetch(name))
        assert len(server.gets(path)) == 2

    def test_always_truncated(self, hub):
        server, path, name = hub
        server.faults[path] = Fault(cut=100_000, ignore_range=True)
        with pytest.raises(weights.TruncatedError):
            weights.fetch(name)

    def test_wrong_hash_is_tried_once_more(self, hub, home):
        server, path, name = hub
        server.faults[path] = [Fault(body=bytes(len(RELEASED)))]
        assert_tiny(weights.fetch(name))
        assert len(server.gets(path)) == 2

    def test_wrong_hash(self, hub, home):
        server, path, name = hub
        server.files[path] = b"something else"
        with pytest.raises(weights.HashMismatchError, match=_sha256(b"something else")):
            weights.fetch(name)
        assert not (home / "idloss" / "converted").exists()

    @pytest.mark.parametrize("status", [401, 403])
    def test_gated(self, hub, status):
        server, path, name = hub
        fault = Fault(status=status, headers={"X-Error-Code": "GatedRepo"})
        server.faults[f"HEAD {path}"] = fault
        with pytest.raises(weights.AccessDeniedError, match=f"answered {status}") as caught:
            weights.fetch(name)
        assert "hf auth login" in str(caught.value)
        assert f"https://huggingface.co/{HUB_REPO}" in str(caught.value)

    @pytest.mark.parametrize("status", [401, 403])
    def test_forbidden_without_a_code(self, hub, status):
        server, path, name = hub
        server.faults[f"HEAD {path}"] = Fault(status=status)
        with pytest.raises(weights.AccessDeniedError, match="HF_TOKEN"):
            weights.fetch(name)

    @pytest.mark.parametrize(
        ("code", "gone"),
        [
            ("RevisionNotFound", "the revision is gone"),
            ("EntryNotFound", "the file is gone"),
            ("RepoNotFound", "the repository is gone"),
        ],
    )
    def test_gone(self, hub, code, gone):
        server, path, name = hub
        server.faults[f"HEAD {path}"] = Fault(status=404, headers={"X-Error-Code": code})
        with pytest.raises(weights.NotFoundError, match=gone) as caught:
            weights.fetch(name)
        assert COMMIT in str(caught.value)

    def test_429_waits_as_told(self, hub, naps):
        server, path, name = hub
        server.faults[path] = [Fault(status=429, headers={"Retry-After": "7"})]
        assert_tiny(weights.fetch(name))
        assert max(naps) >= 7

    def test_429_for_ever(self, hub):
        server, path, name = hub
        server.faults[path] = Fault(status=429)
        with pytest.raises(weights.RateLimitedError):
            weights.fetch(name)
        assert len(server.gets(path)) < 10

    @pytest.mark.parametrize("method", ["HEAD ", ""])
    def test_500_then_well(self, hub, method):
        server, path, name = hub
        server.faults[method + path] = [Fault(status=500)]
        assert_tiny(weights.fetch(name))

    @pytest.mark.parametrize("method", ["HEAD ", ""])
    def test_500_for_ever(self, hub, method):
        server, path, name = hub
        server.faults[method + path] = Fault(status=500)
        with pytest.raises(weights.ServerError, match="500"):
            weights.fetch(name)
        assert len(server.seen) < 20

    def test_nobody_there(self, hub):
        server, _, name = hub
        server.httpd.server_close()
        with pytest.raises(weights.OfflineError, match="not reached") as caught:
            weights.fetch(name)
        assert f"https://huggingface.co/{HUB_REPO}/resolve/{COMMIT}/sub/tiny.pth" in str(
            caught.value
        )
        assert "weights.add(" in str(caught.value)


@pytest.fixture(params=["environment", "at import"])
def go_offline(request, monkeypatch):
    def _go():
        if request.param == "environment":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return _go


class TestOffline:
    @pytest.mark.parametrize("kind", ["web", "hub", "github"])
    def test_without_and_with_a_cache(self, request, kind, go_offline, monkeypatch):
        fixture = request.getfixturevalue(kind)
        server, name = (fixture, NAME) if kind == "github" else (fixture[0], fixture[2])
        server.files[TINY_PATH] = RELEASED
        with monkeypatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            with pytest.raises(weights.OfflineError) as caught:
                weights.fetch(name)
        assert server.seen == []
        message = str(caught.value)
        (piece,) = weights.get_weights(name).source.pieces
        for told in (name, piece.filename, piece.url, piece.digest, "HF_HUB_OFFLINE", "add("):
            assert told in message
        path = weights.fetch(name)
        asked = len(server.seen)
        go_offline()
        assert weights.fetch(name) == path
        path.unlink()  # what was downloaded is still there
        assert_tiny(weights.fetch(name))
        assert len(server.seen) == asked

    @pytest.mark.parametrize("kind", ["web", "hub", "github"])
    def test_file_brought_by_hand(self, request, kind, go_offline, tmp_path):
        fixture = request.getfixturevalue(kind)
        name = NAME if kind == "github" else fixture[2]
        go_offline()
        path = tmp_path / "downloaded (1).pth"
        path.write_bytes(RELEASED)
        assert_tiny(weights.add(name, path))
        path.unlink()
        assert_tiny(weights.fetch(name))

    def test_two_parts_brought_in_any_order(self, github, register, go_offline, tmp_path):
        half = len(RELEASED) // 2
        source = TestGitHub().source(github, RELEASED[:half], RELEASED[half:])
        name = register(source)
        go_offline()
        first, second = tmp_path / "a", tmp_path / "b"
        first.write_bytes(RELEASED[:half])
        second.write_bytes(RELEASED[half:])
        with pytest.raises(weights.OfflineError, match=r"f\.001"):
            weights.add(name, second)
        assert_tiny(weights.add(name, second, first))

    def test_wrong_file_brought(self, web, tmp_path, home):
        _, _, name = web
        path = tmp_path / "f.pth"
        path.write_bytes(b"wrong")
        with pytest.raises(weights.HashMismatchError, match=_sha256(RELEASED)):
            weights.add(name, path)
        assert files_under(home) == []
        with pytest.raises(FileNotFoundError, match="nowhere"):
            weights.add(name, tmp_path / "nowhere")


class TestFilesOnDisk:
    def test_local_file(self, register, home, tmp_path):
        path = tmp_path / "own.pth"
        path.write_bytes(RELEASED)
        name = register(weights.LocalFile(path))
        assert_tiny(weights.fetch(name))
        other = {**_state_dict("net."), "net.fc.bias": torch.zeros(5)}
        path.write_bytes(_saved(other))  # trained further: another content, another file
        assert not safetensors.torch.load_file(weights.fetch(name))["fc.bias"].any()

    def test_local_safetensors_are_used_where_they_lie(self, register, home, tmp_path):
        path = tmp_path / "own.safetensors"
        safetensors.torch.save_file(_state_dict(), path)
        digest = _sha256(path.read_bytes())
        name = register(weights.LocalFile(path, digest), adapter=None)
        assert weights.fetch(name) == path
        path.write_bytes(b"x" + path.read_bytes()[1:])
        with pytest.raises(weights.HashMismatchError, match=digest):
            weights.fetch(name)
        path.unlink()
        with pytest.raises(weights.NotFoundError, match=r"own\.safetensors"):
            weights.fetch(name)

    def test_zoo(self, register, home, monkeypatch, tmp_path):
        package = tmp_path / "site" / "idloss"
        (package / "weights").mkdir(parents=True)
        monkeypatch.setattr("idloss.weights.zoo.__file__", str(package / "weights" / "z.py"))
        body = safetensors.torch.save(_state_dict())
        name = register(weights.ZooFile("tiny", _sha256(body)), adapter=None)
        with pytest.raises(weights.NotFoundError, match=r"zoo.tiny.model\.safetensors"):
            weights.fetch(name)
        for zoo in (package.parent / "zoo", package / "zoo"):  # of a checkout, of an install
            (zoo / "tiny").mkdir(parents=True)
            (zoo / "tiny" / "model.safetensors").write_bytes(body)
            assert weights.fetch(name) == zoo / "tiny" / "model.safetensors"

    @pytest.mark.parametrize("digest", [_sha256(RELEASED), None], ids=["pinned", "unpinned"])
    def test_manual(self, register, home, tmp_path, digest):
        source = weights.ManualFile("f.pth", "https://host.invalid/f", "Fill in the form.", digest)
        name = register(source)
        with pytest.raises(weights.ManualDownloadError, match=r"Fill in the form\.") as caught:
            weights.fetch(name)
        assert "https://host.invalid/f" in str(caught.value)
        assert weights.describe(name)["hash"] == [f"sha256:{digest}" if digest else "unpinned"]
        path = tmp_path / "f.pth"
        path.write_bytes(RELEASED)
        assert_tiny(weights.add(name, path))


class TestReading:
    """What may be in a file, and how it becomes ours."""

    @pytest.fixture
    def fetch_body(self, register, home, tmp_path):
        def _fetch(body, adapter=None):
            path = tmp_path / "file.pth"
            path.write_bytes(body)
            return weights.fetch(register(weights.LocalFile(path), adapter=adapter))

        return _fetch

    @pytest.mark.parametrize("zipped", [True, False])
    def test_code_in_a_pickle_is_not_run(self, fetch_body, tmp_path, zipped):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        evil = {"weight": torch.ones(1), "payload": Evil()}
        body = _saved(evil, _use_new_zipfile_serialization=zipped)
        with pytest.raises(weights.UnsafePickleError, match="refused"):
            fetch_body(body)
        assert not marker.exists()

    def test_plain_pickle_with_code(self, fetch_body):
        with pytest.raises(weights.UnsafePickleError):
            fetch_body(pickle.dumps(OrderedDict(a=Path("x")), protocol=2))

    @pytest.mark.parametrize(
        "body",
        [
            b"<!DOCTYPE html><html>sign in</html>",
            b"",
            RELEASED[: len(RELEASED) // 2],
            safetensors.torch.save(_state_dict())[:-100],
        ],
        ids=["html", "empty", "half a zip", "half a safetensors"],
    )
    def test_no_checkpoint(self, fetch_body, home, body):
        with pytest.raises(weights.UnreadableFileError, match=r"file\.pth"):
            fetch_body(body)
        assert not [file for file in files_under(home) if "converted" in file]

    @pytest.mark.parametrize(
        "value", [[torch.ones(1)], {"epoch": 3}, {}], ids=["list", "number", "empty"]
    )
    def test_no_state_dict(self, fetch_body, value):
        with pytest.raises(weights.UnreadableFileError, match="state dict"):
            fetch_body(_saved(value))

    @pytest.mark.parametrize("wrapping", ["state_dict", "model"])
    def test_training_checkpoint(self, fetch_body, wrapping):
        assert_tiny(fetch_body(_saved({"epoch": 3, wrapping: _state_dict()})))

    def test_old_torch_format(self, fetch_body):
        assert_tiny(fetch_body(_saved(_state_dict(), _use_new_zipfile_serialization=False)))

    def test_shared_and_strided_tensors(self, fetch_body):
        def views(state_dict):
            base = state_dict["base"]
            return {"a": base, "b": base, "t": base.t(), "flipped": base.flip(1)}

        base = torch.arange(6.0).reshape(2, 3)
        loaded = safetensors.torch.load_file(fetch_body(_saved({"base": base}), views))
        assert torch.equal(loaded["a"], loaded["b"])
        assert torch.equal(loaded["t"], base.t())
        assert torch.equal(loaded["flipped"], base.flip(1))

    def test_foreign_layout(self, fetch_body):
        with pytest.raises(weights.AdapterError, match=r"unknown keys: \['conv.bias'"):
            fetch_body(_saved(_state_dict()), strip_prefix)

    def test_missing_key_in_an_adapter(self, fetch_body):
        with pytest.raises(weights.AdapterError, match="absent"):
            fetch_body(RELEASED, lambda state_dict: {"x": state_dict["absent"]})

    def test_changed_adapter_reconverts_without_a_download(self, github, register, monkeypatch):
        github.files[TINY_PATH] = RELEASED
        before = weights.fetch(NAME)
        changed = "# a changed module\n"
        monkeypatch.setattr(catalogue.inspect, "getsource", lambda _: changed)
        after = weights.fetch(NAME)
        assert after != before
        assert_tiny(after)
        assert len(github.gets(TINY_PATH)) == 1

    def test_convert_own_checkpoint(self, home, register, tmp_path):
        own = tmp_path / "retrained.pth"
        own.write_bytes(_saved({**_state_dict("net."), "net.fc.bias": torch.zeros(5)}))
        target = tmp_path / "ours" / "model.safetensors"
        assert weights.convert(NAME, own, target) == target
        overlay = {"file": str(target)}
        model = timm.create_model("idloss_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
        assert not model.fc.bias.any()
        assert not home.exists()


class TestBuildModel:
    @pytest.fixture
    def served(self, github):
        github.files[TINY_PATH] = RELEASED
        return github

    @pytest.mark.parametrize("name", ["idloss_tiny", NAME])
    def test_through_timm(self, served, home, name):
        model = timm.create_model(name, pretrained=True)
        expected = _state_dict()
        state_dict = model.state_dict()
        assert state_dict.keys() == expected.keys()
        assert all(torch.equal(state_dict[key], expected[key]) for key in expected)
        assert model.pretrained_cfg["license"] == "mit"
        assert "nothing at all" in model.pretrained_cfg["description"]
        assert files_under(home)

    def test_timm_lists_it(self):
        assert timm.list_models("idloss_tiny", pretrained=True) == [NAME]

    def test_cache_dir(self, served, home, tmp_path):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
        assert files_under(tmp_path / "mine")
        assert not home.exists()

    def test_not_pretrained_asks_nobody(self, served):
        timm.create_model(NAME)
        assert served.seen == []

    def test_never_random_in_silence(self, github):
        with pytest.raises(weights.NotFoundError):
            timm.create_model(NAME, pretrained=True)
        with pytest.raises(weights.UnknownWeightsError, match=r"idloss_tiny\.untrained"):
            timm.create_model("idloss_tiny.untrained", pretrained=True)

    def test_other_number_of_classes(self, served):
        model = timm.create_model(NAME, pretrained=True, num_classes=9)
        assert model.fc.weight.shape == (9, 128)
        assert torch.equal(model.conv.weight, _state_dict()["conv.weight"])

    @pytest.mark.parametrize("num_classes", [5, 9])
    @pytest.mark.parametrize("spoil", ["missing", "unexpected"])
    def test_strict(self, home, num_classes, spoil):
        state_dict = _state_dict()
        if spoil == "missing":
            del state_dict["conv.bias"]
        else:
            state_dict["conv.extra"] = torch.ones(1)
        key = "conv.bias" if spoil == "missing" else "conv.extra"
        with pytest.raises(weights.MissingKeysError, match=rf"{spoil}: {key}"):
            timm.create_model(
                NAME,
                pretrained=True,
                num_classes=num_classes,
                pretrained_cfg_overlay={"state_dict": state_dict},
            )

    def test_released_layout_in_an_overlay_says_what_to_do(self, home, tmp_path):
        path = tmp_path / "released.pth"
        path.write_bytes(RELEASED)
        with pytest.raises(weights.MissingKeysError, match=r"weights\.convert\('idloss_tiny\.a'"):
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})

    def test_local_dir(self, served, home, tmp_path):
        from timm.models import save_for_hf

        model = timm.create_model(NAME, pretrained=True)
        asked = len(served.seen)
        nn.init.zeros_(model.fc.bias)
        save_for_hf(model, tmp_path / "saved")
        again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
        assert not again.fc.bias.any()
        assert len(served.seen) == asked
        config = (tmp_path / "saved" / "config.json").read_text()
        assert str(home) not in config


class TestCatalogue:
    def test_describe(self, github):
        github.files[TINY_PATH] = RELEASED
        before = weights.describe("idloss_tiny")
        assert before["name"] == NAME
        assert before["source"] == [f"{GITHUB_RAW}{TINY_PATH}"]
        assert before["hash"] == [f"git-sha1:{_git_sha1(RELEASED)}"]
        assert (before["licence"], before["training data"]) == ("mit", "nothing at all")
        assert (before["cached"], before["size"]) == (None, None)
        path = weights.fetch(NAME)
        after = weights.describe(NAME)
        assert (after["cached"], after["size"]) == (path, path.stat().st_size)

    def test_unknown(self, register):
        with pytest.raises(weights.UnknownWeightsError, match=r"mean 'idloss_tiny\.a'"):
            weights.get_weights("idloss_tiny.b")

    def test_loaders_run_before_a_name_is_unknown(self, register, monkeypatch):
        monkeypatch.setattr(catalogue, "_loaders", [])
        late = weights.LocalFile("late")
        weights.load_before_lookup(lambda: register(late, "late.tag"))
        assert weights.get_weights("late.tag").source == late

    def test_one_name_one_source(self, register):
        register(weights.LocalFile("a"))
        register(weights.LocalFile("a"))
        with pytest.raises(ValueError, match="registered already"):
            register(weights.LocalFile("b"))

    @pytest.mark.parametrize(
        "make",
        [
            lambda: weights.HubFile(HUB_REPO, "f", "main", "0" * 64),
            lambda: weights.HubFile(HUB_REPO, "f", COMMIT, "abc"),
            lambda: weights.UrlFile("http://host/f", "0" * 63),
            lambda: weights.UrlFile("ftp://host/f", "0" * 64),
            lambda: weights.GitHubBlob(REPO, "v1.0", (("f", "0" * 40),)),
            lambda: weights.GitHubBlob(REPO, COMMIT, (("f", "0" * 39),)),
            lambda: weights.GitHubBlob(REPO, COMMIT, ()),
        ],
    )
    def test_every_entry_is_pinned(self, make):
        with pytest.raises(ValueError, match="must"):
            make()


WORKER = """
import json, os, sys, time
from idloss import weights
url, digest, commit = sys.argv[1:]
kw = {"licence": "mit", "training_data": "nothing"}
hub = weights.HubFile("a/b", "g.pth", commit, digest)
weights.register_weights("net.hub", weights.Weights(hub, **kw))
for line in sys.stdin:
    name, count, stagger = json.loads(line)
    if name != "net.hub":
        web = weights.UrlFile(f"{url}/{name}", digest)
        weights.register_weights(name, weights.Weights(web, **kw))
    pids = []
    for index in range(count):
        pids.append(os.fork())
        if not pids[-1]:
            code = 1
            try:
                time.sleep(index * stagger)
                weights.fetch(name)
                code = 0
            finally:
                os._exit(code)
    print(json.dumps(pids), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Runs `fetch(name)` in `count` processes at once; reads their ids, then exit codes."""
    home = tmp_path_factory.mktemp("home")
    with FileServer() as server:
        server.hub_path = server.add_hub_file("a/b", COMMIT, "g.pth", RELEASED)
        for name in ("both", "killed", "heir"):
            server.files[f"/{name}"] = RELEASED
        environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": server.url,
            "PYTHONPATH": str(Path(weights.__file__).parents[2]),
        }
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, server.url, _sha256(RELEASED), COMMIT],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            yield process, server, home
            process.stdin.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
class TestProcesses:
    """Processes of their own, told where things are by nothing but the environment."""

    def start(self, process, name, count, stagger=0):
        process.stdin.write(json.dumps([name, count, stagger]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def kill_half_way(self, pid, home):
        downloads = home / "idloss" / "downloads"
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size > 50_000 for path in downloads.glob("*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)

    def converted(self, home, name):
        return list((home / "idloss" / "converted").glob(f"{name}-*"))

    def assert_converted(self, home, name):
        (path,) = self.converted(home, name)
        loaded = safetensors.torch.load_file(path)
        assert torch.equal(loaded["net.conv.weight"], _state_dict()["conv.weight"])

    @pytest.mark.parametrize("name", ["both", "net.hub"])
    def test_two_at_once_download_once(self, worker, name):
        process, server, home = worker
        url_path = server.hub_path if name == "net.hub" else f"/{name}"
        server.faults[url_path] = Fault(pause=0.01)
        self.start(process, name, 2)
        assert json.loads(process.stdout.readline()) == [0, 0]
        self.assert_converted(home, name)
        assert len(server.gets(url_path)) == 1

    def test_killed_in_the_middle_resumes(self, worker):
        process, server, home = worker
        server.faults["/killed"] = [Fault(pause=0.05)]
        (pid,) = self.start(process, "killed", 1)
        self.kill_half_way(pid, home)
        assert json.loads(process.stdout.readline()) == [-signal.SIGKILL]
        assert [
            file for file in files_under(home) if "killed" in file and "partial" not in file
        ] == []
        self.start(process, "killed", 1)
        assert json.loads(process.stdout.readline()) == [0]
        self.assert_converted(home, "killed")
        (_, resumed) = server.gets("/killed")
        assert int(resumed.range.removeprefix("bytes=").rstrip("-")) > 50_000
        assert not list(home.rglob("*.partial*"))

    def test_one_killed_the_other_takes_over(self, worker):
        process, server, home = worker
        server.faults["/heir"] = Fault(pause=0.02)
        pids = self.start(process, "heir", 2, stagger=0.1)  # the first one gets the lock
        self.kill_half_way(pids[0], home)
        codes = json.loads(process.stdout.readline())
        assert codes == [-signal.SIGKILL, 0]
        self.assert_converted(home, "heir")
        first, second = server.gets("/heir")
        assert first.range is None
        assert second.range is not None


def test_real_mobilefacenet(shared, server, home, naps, monkeypatch):
    """The authors' file, from its pinned address to a model that has every one of its tensors."""
    from idloss import list_fnets

    body = shared("weights/arcface_mobilefacenet.pth").read_bytes()
    assert _sha256(body) == "4c08e11a0a2bbf299910210da647c7d8105c348f4c533868e1710dbcf7b22480"
    assert "mobilefacenet.casia_webface" in list_fnets(pretrained=True)
    (piece,) = weights.get_weights("mobilefacenet.casia_webface").source.pieces
    url_path = piece.url.removeprefix(GITHUB_RAW)
    assert "bubbliiiing/arcface-pytorch/0faafe28eba416738893f1426b15774cdaa6d3ab" in url_path
    server.files[url_path] = body
    server.faults[url_path] = [Fault(status=500), Fault(cut=1_000_000)]
    monkeypatch.setenv("IDLOSS_GITHUB_RAW", server.url)
    model = timm.create_model("mobilefacenet", pretrained=True)
    assert len(server.gets(url_path)) == 3
    released = torch.load(io.BytesIO(body), weights_only=True)
    theirs = sorted(
        float(value.double().sum()) for key, value in released.items() if "head" not in key
    )
    ours = sorted(float(value.double().sum()) for value in model.state_dict().values())
    assert theirs == pytest.approx(ours, abs=1e-9)
