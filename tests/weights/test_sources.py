"""Every kind of source, with the real Hub client and with a host that misbehaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import HANGS
from huggingface_hub import constants
from nets import tiny_fnet
from servers import Fault, FileServer
from tinyweights import (
    COMMIT,
    HUB_REPO,
    RELEASED,
    REPO,
    TINY,
    TINY_PATH,
    assert_tiny,
    files_under,
    git_sha1,
    sha256,
    state_dict,
)

from idloss import create_fnet, weights
from idloss.weights.files import file_git_sha1
from idloss.weights.loading import get_weights
from idloss.weights.sources import ZooFile


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
            parts.append((path, git_sha1(body)))
        return weights.GitHubBlob(REPO, COMMIT, tuple(parts), member=member)

    def test_git_agrees_on_the_blob_hash(self, tmp_path):
        path = tmp_path / "f"
        path.write_bytes(RELEASED)
        command = ["git", "hash-object", "--no-filters", str(path)]
        git = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        assert file_git_sha1(path) == git
        assert TINY.source.pieces[0].url == f"https://raw.githubusercontent.com{TINY_PATH}"

    def test_parts_are_joined(self, github, register):
        half = len(RELEASED) // 2
        assert_tiny(weights.fetch(register(self.source(github, RELEASED[:half], RELEASED[half:]))))

    def test_split_7z(self, github, register, tmp_path, home):
        archive = seven_zip(tmp_path, RELEASED)
        cut = len(archive) // 3
        source = self.source(github, archive[:cut], archive[cut:], member="tiny.pth")
        assert_tiny(weights.fetch(register(source)))
        assert len(files_under(home)) == 3  # two parts and the converted file, nothing unpacked

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda body: b"not an archive", "broken"),
            (lambda body: body[:99] + bytes([body[99] ^ 1]) + body[100:], "broken"),
            (lambda body: body, r"no 'other.pth'.*tiny.pth"),
        ],
    )
    def test_broken_7z(self, github, register, tmp_path, home, spoil, said):
        member = "tiny.pth" if said == "broken" else "other.pth"
        source = self.source(github, spoil(seven_zip(tmp_path, RELEASED)), member=member)
        with pytest.raises(weights.NotAsPromisedError, match=said):
            weights.fetch(register(source))
        assert not [file for file in files_under(home) if "downloads" not in file]

    def test_without_py7zr(self, github, register, tmp_path, monkeypatch):
        source = self.source(github, seven_zip(tmp_path, RELEASED), member="tiny.pth")
        name = register(source)
        monkeypatch.setitem(sys.modules, "py7zr", None)
        with pytest.raises(ImportError, match=r"pip install 'idloss\[released\]'"):
            weights.fetch(name)


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
        body = safetensors.torch.save(state_dict())
        server.add_hub_file(HUB_REPO, COMMIT, "model.safetensors", body)
        source = weights.HubFile(HUB_REPO, "model.safetensors", COMMIT, sha256(body))
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

    @pytest.mark.parametrize(
        ("method", "fault"),
        [
            ("", Fault(cut=100_000)),
            ("", Fault(body=bytes(len(RELEASED)))),  # of a wrong hash, which is tried once more
            ("", Fault(status=429, headers={"Retry-After": "7"})),
            ("", Fault(status=500)),
            ("HEAD ", Fault(status=500)),
        ],
    )
    def test_well_again(self, hub, naps, method, fault):
        server, path, name = hub
        server.faults[method + path] = [fault]
        assert_tiny(weights.fetch(name))
        assert len([seen for seen in server.seen if seen.path == path]) >= 3
        assert len(server.gets(path)) == (1 if method else 2)
        assert max(naps, default=0) >= float(fault.headers.get("Retry-After", 0))

    @pytest.mark.parametrize(
        ("method", "fault", "error", "said"),
        [
            ("", Fault(cut=100_000, ignore_range=True), weights.UnreachableError, HUB_REPO),
            ("", Fault(status=429), weights.UnreachableError, "429"),
            ("", Fault(status=500), weights.UnreachableError, "500"),
            ("HEAD ", Fault(status=500), weights.UnreachableError, "500"),
            ("", Fault(body=b"else"), weights.NotAsPromisedError, sha256(b"else")),
        ],
    )
    def test_wrong_for_ever(self, hub, home, method, fault, error, said):
        server, path, name = hub
        server.faults[method + path] = fault
        server.files[path] = fault.body or RELEASED
        with pytest.raises(error, match=said):
            weights.fetch(name)
        assert len(server.seen) < 20
        assert not (home / "idloss" / "converted").exists()

    @pytest.mark.parametrize(
        ("status", "code", "error", "told"),
        [
            *((401, code, weights.NotAllowedError, "answered 401") for code in ("GatedRepo", "")),
            *((403, code, weights.NotAllowedError, "answered 403") for code in ("GatedRepo", "")),
            (404, "RevisionNotFound", weights.NotFoundError, "the revision is gone"),
            (404, "EntryNotFound", weights.NotFoundError, "the file is gone"),
            (404, "RepoNotFound", weights.NotFoundError, "the repository is gone"),
        ],
    )
    def test_refused(self, hub, status, code, error, told):
        server, path, name = hub
        headers = {"X-Error-Code": code} if code else {}
        server.faults[f"HEAD {path}"] = Fault(status=status, headers=headers)
        with pytest.raises(error, match=told) as caught:
            weights.fetch(name)
        for way in ("hf auth login", "HF_TOKEN", f"https://huggingface.co/{HUB_REPO}"):
            assert way in str(caught.value) or status == 404
        assert COMMIT in str(caught.value)

    def test_nobody_there(self, hub):
        server, _, name = hub
        server.httpd.server_close()
        with pytest.raises(weights.UnreachableError, match="not reached") as caught:
            weights.fetch(name)
        assert f"https://huggingface.co/{HUB_REPO}/resolve/{COMMIT}/sub/tiny.pth" in str(
            caught.value
        )
        assert "idloss fetch net.tag --file tiny.pth" in str(caught.value)

    @pytest.mark.parametrize("published", ["hf-hub:someone/net", "timm/resnet18"])
    @pytest.mark.parametrize("offline", [True, False])
    def test_published_networks_fail_at_once(self, hub, naps, monkeypatch, offline, published):
        server, _, _ = hub
        server.httpd.server_close()
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        with pytest.raises(weights.UnreachableError, match=f"{published}: the Hub was not"):
            create_fnet(published, pretrained=True)
        assert sum(naps) < 5

    def test_weights_of_timms_that_are_here_need_no_hub(self, hub, home, monkeypatch):
        server, _, _ = hub
        server.httpd.server_close()
        folder = home / "hub" / "models--timm--resnet18.a1_in1k"
        for path, body in (("refs/main", COMMIT), (f"snapshots/{COMMIT}/odd_name.bin", "")):
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text(body)
        fnet = tiny_fnet()
        monkeypatch.setattr("timm.create_model", lambda name, **options: fnet)
        assert create_fnet("timm/resnet18", pretrained=True) is fnet


@pytest.fixture(params=["environment", "at import"])
def go_offline(request, monkeypatch):
    def _go():
        if request.param == "environment":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return _go


class TestOffline:
    @pytest.mark.parametrize("kind", ["web", "hub"])
    def test_without_and_with_a_cache(self, request, kind, go_offline, monkeypatch):
        server, _, name = request.getfixturevalue(kind)
        with monkeypatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            with pytest.raises(weights.UnreachableError) as caught:
                weights.fetch(name)
        assert server.seen == []
        message = str(caught.value)
        (piece,) = get_weights(name).source.pieces
        for told in (name, piece.filename, piece.url, piece.digest, "HF_HUB_OFFLINE", "--file"):
            assert told in message
        path = weights.fetch(name)
        asked = len(server.seen)
        go_offline()
        assert weights.fetch(name) == path
        path.unlink()  # what was downloaded is still there
        assert_tiny(weights.fetch(name))
        assert len(server.seen) == asked

    @pytest.mark.parametrize("kind", ["web", "hub"])
    def test_file_brought_by_hand(self, request, kind, go_offline, tmp_path):
        _, _, name = request.getfixturevalue(kind)
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
        with pytest.raises(weights.UnreachableError, match=r"f\.001"):
            weights.add(name, second)
        assert_tiny(weights.add(name, second, first))

    def test_wrong_file_brought(self, web, tmp_path, home):
        _, _, name = web
        path = tmp_path / "f.pth"
        path.write_bytes(b"wrong")
        with pytest.raises(weights.NotAsPromisedError, match=git_sha1(RELEASED)):
            weights.add(name, path)
        assert files_under(home) == []
        with pytest.raises(FileNotFoundError, match="nowhere"):
            weights.add(name, tmp_path / "nowhere")


class TestFilesOnDisk:
    def test_zoo(self, register, home, monkeypatch, tmp_path):
        home.write_text("no folder")  # nothing of what comes with the package is kept there
        package = tmp_path / "site" / "idloss"
        (package / "weights").mkdir(parents=True)
        monkeypatch.setattr("idloss.weights.sources.__file__", str(package / "weights" / "s.py"))
        body = safetensors.torch.save(state_dict())
        name = register(ZooFile("tiny", sha256(body)), adapter=None)
        with pytest.raises(weights.NotFoundError, match=r"zoo.tiny.model\.safetensors"):
            weights.fetch(name)
        for zoo in (package.parent / "zoo", package / "zoo"):  # of a checkout, of an install
            (zoo / "tiny").mkdir(parents=True)
            (zoo / "tiny" / "model.safetensors").write_bytes(body)
            assert weights.fetch(name) == zoo / "tiny" / "model.safetensors"

    @pytest.mark.parametrize("digest", [sha256(RELEASED), None], ids=["pinned", "unpinned"])
    def test_manual(self, register, home, tmp_path, digest):
        source = weights.ManualFile("f.pth", "https://host.invalid/f", "Fill in the form.", digest)
        name = register(source)
        with pytest.raises(weights.NotFoundError, match=r"Fill in the form\.") as caught:
            weights.fetch(name)
        assert "https://host.invalid/f" in str(caught.value)
        assert weights.describe(name)["hash"] == [f"sha256:{digest}" if digest else "unpinned"]
        path = tmp_path / "f.pth"
        path.write_bytes(RELEASED)
        assert_tiny(weights.add(name, path))


class TestWebFile:
    def test_a_file_of_a_release(self, github, register):
        github.files["/releases/v1/tiny.pth"] = RELEASED
        url = f"{github.url}/releases/v1/tiny.pth"
        name = register(weights.WebFile(url, sha256(RELEASED), page="https://host/releases"))
        about = weights.describe(name)
        assert (about["source"], about["origin"]) == ([url], "https://host/releases")
        assert_tiny(weights.fetch(name))
        github.files.clear()
        assert_tiny(weights.fetch(name))

    def test_another_file(self, github, register):
        github.files["/tiny.pth"] = RELEASED + b"\0"
        name = register(weights.WebFile(f"{github.url}/tiny.pth", sha256(RELEASED)))
        with pytest.raises(weights.NotAsPromisedError, match=sha256(RELEASED)):
            weights.fetch(name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: weights.WebFile("http://host/f", "0" * 63),
        lambda: weights.HubFile(HUB_REPO, "f", "main", "0" * 64),
        lambda: weights.HubFile(HUB_REPO, "f", COMMIT, "abc"),
        lambda: weights.ManualFile("f", "http://host/f", "Ask.", "0" * 63),
        lambda: ZooFile("f", "0" * 63),
        lambda: weights.GitHubBlob(REPO, "v1.0", (("f", "0" * 40),)),
        lambda: weights.GitHubBlob(REPO, COMMIT, (("f", "0" * 39),)),
        lambda: weights.GitHubBlob(REPO, COMMIT, ()),
    ],
)
def test_every_entry_is_pinned(make):
    with pytest.raises(ValueError, match="must"):
        make()


WORKER = """


import json, os, sys, time
from idloss import weights
digest, blob, commit = sys.argv[1:]
kw = {"licence": "mit", "training_data": "nothing"}
hub = weights.HubFile("a/b", "g.pth", commit, digest)
weights.register_weights({"net.hub": weights.Weights(hub, **kw)})
for line in sys.stdin:
    name, count, stagger = json.loads(line)
    if name != "net.hub":
        web = weights.GitHubBlob("r", commit, ((name, blob),))
        weights.register_weights({name: weights.Weights(web, **kw)})
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
            server.files[f"/r/{COMMIT}/{name}"] = RELEASED
        environment = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": server.url,
            "IDLOSS_GITHUB_RAW": server.url,
            "PYTHONPATH": str(Path(weights.__file__).parents[2]),
        }
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, sha256(RELEASED), git_sha1(RELEASED), COMMIT],
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
        deadline = time.monotonic() + HANGS
        while not any(path.stat().st_size > 50_000 for path in downloads.glob("*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)

    def converted(self, home, name):
        return list((home / "idloss" / "converted").glob(f"{name}-*"))

    def assert_converted(self, home, name):
        (path,) = self.converted(home, name)
        loaded = safetensors.torch.load_file(path)
        assert torch.equal(loaded["net.conv.weight"], state_dict()["conv.weight"])

    @pytest.mark.parametrize("name", ["both", "net.hub"])
    def test_two_at_once_download_once(self, worker, name):
        process, server, home = worker
        url_path = server.hub_path if name == "net.hub" else f"/r/{COMMIT}/{name}"
        server.faults[url_path] = Fault(pause=0.01)
        self.start(process, name, 2)
        assert json.loads(process.stdout.readline()) == [0, 0]
        self.assert_converted(home, name)
        assert len(server.gets(url_path)) == 1

    def test_killed_in_the_middle_resumes(self, worker):
        process, server, home = worker
        server.faults[f"/r/{COMMIT}/killed"] = [Fault(pause=0.05)]
        (pid,) = self.start(process, "killed", 1)
        self.kill_half_way(pid, home)
        assert json.loads(process.stdout.readline()) == [-signal.SIGKILL]
        assert [
            file for file in files_under(home) if "killed" in file and "partial" not in file
        ] == []
        self.start(process, "killed", 1)
        assert json.loads(process.stdout.readline()) == [0]
        self.assert_converted(home, "killed")
        (_, resumed) = server.gets(f"/r/{COMMIT}/killed")
        assert int(resumed.range.removeprefix("bytes=").rstrip("-")) > 50_000
        assert not list(home.rglob("*.partial*"))

    def test_one_killed_the_other_takes_over(self, worker):
        process, server, home = worker
        server.faults[f"/r/{COMMIT}/heir"] = Fault(pause=0.02)
        pids = self.start(process, "heir", 2, stagger=0.1)  # the first one gets the lock
        self.kill_half_way(pids[0], home)
        codes = json.loads(process.stdout.readline())
        assert codes == [-signal.SIGKILL, 0]
        self.assert_converted(home, "heir")
        first, second = server.gets(f"/r/{COMMIT}/heir")
        assert first.range is None
        assert second.range is not None
