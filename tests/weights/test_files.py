"""Files over a real network stack that misbehaves, and what may be in them."""

import errno
import functools
import io
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from servers import Fault
from tinyweights import (
    NAME,
    RELEASED,
    TINY,
    TINY_PATH,
    assert_tiny,
    blob,
    files_under,
    git_sha1,
    saved,
    state_dict,
    strip_prefix,
)

from idloss import weights
from idloss.weights import files, loading, sources
from idloss.weights.sources import GITHUB_RAW

old_saved = functools.partial(saved, _use_new_zipfile_serialization=False)
HOLDS_ITSELF = {}
HOLDS_ITSELF["model"] = HOLDS_ITSELF


class TestDownload:
    def test_download_convert_once(self, web, home):
        server, url_path, name = web
        path = weights.fetch(name)
        assert_tiny(path)
        assert path.is_relative_to(home / "idloss")
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
        assert about["source"] == f"{GITHUB_RAW}{url_path}"
        assert about["source_hash"] == f"git-sha1:{git_sha1(RELEASED)}"
        assert (about["licence"], about["training_data"]) == ("mit", "nothing at all")
        assert about["adapter"] == "strip_prefix, version 1"
        assert weights.fetch(name) == path
        kept = files_under(home / "idloss")
        assert len(kept) == 2
        assert not [file for file in kept if file.endswith((".partial", ".tmp"))]
        for file in (home / "idloss" / "downloads").iterdir():  # what was converted is enough
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

    def test_force_and_cache_dir(self, web, home, tmp_path):
        server, url_path, name = web
        for _ in range(2):
            path = weights.fetch(name, cache_dir=tmp_path / "mine", force=True)
        assert [seen.range for seen in server.gets(url_path)] == [None, None]
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

    def test_always_truncated(self, web, home, naps):
        server, url_path, name = web
        server.faults[url_path] = Fault(cut=100_000, ignore_range=True)
        with pytest.raises(weights.UnreachableError, match=rf"announced {len(RELEASED):,} bytes"):
            weights.fetch(name)
        # the first attempt made progress; after it, every pause is used and no more
        assert len(server.gets(url_path)) == 2 + len(files.PAUSES)
        assert naps[1:] == list(files.PAUSES)
        assert not [file for file in files_under(home) if not file.endswith(".partial")]

    def test_wrong_hash(self, web, home):
        server, url_path, name = web
        server.faults[url_path] = Fault(body=b"<html>not found, but 200</html>")
        with pytest.raises(weights.NotAsPromisedError) as caught:
            weights.fetch(name)
        message = str(caught.value)
        assert git_sha1(RELEASED) in message
        assert git_sha1(b"<html>not found, but 200</html>") in message
        assert "31 bytes" in message
        assert files_under(home) == []
        assert len(server.gets(url_path)) == 1

    @pytest.mark.parametrize(
        ("body", "fault", "ranges"),
        [
            (b"x" * 1000, Fault(), ["bytes=1000-", None]),  # wrong, and thrown away once
            (RELEASED[:1000], Fault(), ["bytes=1000-"]),
            (RELEASED, Fault(), [f"bytes={len(RELEASED)}-"]),  # answered with 416
            (RELEASED[:1000], Fault(ignore_range=True), ["bytes=1000-"]),  # begins again
        ],
    )
    def test_partial(self, web, home, body, fault, ranges):
        server, url_path, name = web
        filename = f"git-sha1-{git_sha1(RELEASED)}-tiny.pth.partial"
        partial = home / "idloss" / "downloads" / filename
        partial.parent.mkdir(parents=True)
        partial.write_bytes(body)
        server.faults[url_path] = fault
        assert_tiny(weights.fetch(name))
        assert [seen.range for seen in server.gets(url_path)] == ranges
        assert not partial.exists()

    def test_file_replaced_between_attempts(self, web):
        server, url_path, name = web
        server.faults[url_path] = [Fault(body=bytes(len(RELEASED)), cut=100_000)]
        assert_tiny(weights.fetch(name))
        # the two halves do not fit together, and the file is asked for from its first byte
        assert [seen.range is None for seen in server.gets(url_path)] == [True, False, True]

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (401, weights.NotAllowedError),
            (403, weights.NotAllowedError),
            (404, weights.NotFoundError),
            (410, weights.NotFoundError),
            (418, weights.UnreachableError),
        ],
    )
    def test_refused(self, web, home, status, error):
        server, url_path, name = web
        server.faults[url_path] = Fault(status=status)
        with pytest.raises(error, match=f"{status} ") as caught:
            weights.fetch(name)
        self.assert_tells_the_way_out(str(caught.value), name)
        assert len(server.gets(url_path)) == 1
        assert files_under(home) == []

    def assert_tells_the_way_out(self, message, name):
        assert f"{GITHUB_RAW}{TINY_PATH}" in message
        assert git_sha1(RELEASED) in message
        assert f"idloss fetch {name} --file tiny.pth" in message

    @pytest.mark.parametrize(
        ("faults", "pauses"),
        [
            (
                [
                    Fault(status=429, headers={"Retry-After": "7"}),
                    Fault(status=429, headers={"Retry-After": "tomorrow"}),
                    Fault(status=429),
                ],
                [7, *files.PAUSES[1:3]],
            ),
            *(([Fault(status=code)] * 2, list(files.PAUSES[:2])) for code in (500, 502, 503)),
            ([Fault(no_length=True)], []),
        ],
    )
    def test_well_again(self, web, naps, faults, pauses):
        server, url_path, name = web
        server.faults[url_path] = list(faults)
        assert_tiny(weights.fetch(name))
        assert naps == pauses

    @pytest.mark.parametrize(
        ("fault", "said", "pauses"),
        [
            (Fault(status=429), "429", list(files.PAUSES)),
            (Fault(status=429, headers={"Retry-After": "86400"}), "pause of 86400 s", []),
            (Fault(status=500), "500", list(files.PAUSES)),
        ],
    )
    def test_wrong_for_ever(self, web, naps, fault, said, pauses):
        server, url_path, name = web
        server.faults[url_path] = fault
        with pytest.raises(weights.UnreachableError, match=said):
            weights.fetch(name)
        assert naps == pauses
        assert len(server.gets(url_path)) == 1 + len(pauses)

    def test_nobody_there(self, web, naps):
        server, _, name = web
        server.httpd.server_close()
        with pytest.raises(weights.UnreachableError, match="refused") as caught:
            weights.fetch(name)
        self.assert_tells_the_way_out(str(caught.value), name)
        assert len(naps) == 1

    def test_proxy_of_the_environment(self, server, web, monkeypatch):
        _, url_path, name = web
        monkeypatch.setenv("IDLOSS_GITHUB_RAW", "http://weights.invalid")
        server.files[f"/weights.invalid{url_path}"] = RELEASED
        monkeypatch.setenv("http_proxy", server.url)
        assert_tiny(weights.fetch(name))

    @pytest.mark.parametrize("terminal", [True, False])
    def test_progress_only_on_a_terminal(self, web, monkeypatch, terminal):
        _, _, name = web
        shown = io.StringIO()
        shown.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", shown)
        weights.fetch(name)
        assert ("tiny.pth" in shown.getvalue()) == terminal

    def test_damaged_files_in_the_cache_are_replaced(self, web, home):
        server, url_path, name = web
        path = weights.fetch(name)
        (kept,) = (home / "idloss" / "downloads").iterdir()
        path.write_bytes(path.read_bytes()[:1000])
        kept.write_bytes(b"damaged")
        assert_tiny(weights.fetch(name))
        assert len(server.gets(url_path)) == 2


class TestKept:
    """What lies in the cache is what it says, and no more of it than need be."""

    def test_endless_body(self, web, home, monkeypatch):
        server, url_path, name = web
        monkeypatch.setattr(sources, "GITHUB_LIMIT", 500_000)
        server.faults[url_path] = Fault(no_length=True, body=bytes(4 << 20))
        with pytest.raises(
            weights.NotAsPromisedError, match=r"tiny\.pth has more than the 500,000"
        ):
            weights.fetch(name)
        assert files_under(home) == []

    @pytest.mark.parametrize("part", [("downloads",), ("converted",), ()], ids=str)
    def test_a_cache_that_cannot_be_written(self, web, home, naps, part):
        """Said to be the disk's fault at once, with the way out."""
        _, _, name = web
        path = home.joinpath("idloss", *part)
        path.parent.mkdir(parents=True)
        path.write_text("a file, where a folder is to be made")
        with pytest.raises(OSError, match="HF_HOME, or cache_dir=, names another folder") as caught:
            weights.fetch(name)
        assert str(path) in str(caught.value)
        assert naps == []

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
    def test_a_disk_that_is_full_in_the_middle(self, web, home, naps, monkeypatch, number):
        _, _, name = web

        def full(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files, "_receive", full)
        with pytest.raises(OSError, match="names another folder") as caught:
            weights.fetch(name)
        assert caught.value.errno == number
        assert naps == []
        monkeypatch.undo()

        def full_too(*_):
            raise safetensors.SafetensorError("No space left on device")

        monkeypatch.setattr(safetensors.torch, "save_file", full_too)
        with pytest.raises(OSError, match=r"not written: .*HF_HOME"), files.disk_advice():
            files.save_tensors({"a": torch.ones(1)}, home / "x" / "y", {})

    def test_converted_weights_with_a_layer_zeroed(self, web):
        _, _, name = web
        path = weights.fetch(name)
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata()
        zeroed = state_dict() | {"conv.bias": torch.zeros(128)}
        safetensors.torch.save_file(zeroed, path, about)
        assert weights.describe(name)["cached"] is None
        assert_tiny(weights.fetch(name))

    def test_unpinned_files_are_known_by_name_and_content(self, register, home, tmp_path):
        source = weights.ManualFile("f.pth", "https://host.invalid/f", "Ask.")
        first, second = register(source, "net.a"), register(source, "net.b")
        wrong, good, other = (tmp_path / name for name in ("wrong", "good", "other"))
        wrong.write_bytes(saved(state_dict()))
        good.write_bytes(RELEASED)
        doubled = {key: 2 * value for key, value in state_dict("net.").items()}
        other.write_bytes(saved(doubled))
        with pytest.raises(weights.NotAsPromisedError, match="unknown keys"):
            weights.add(first, wrong)
        for name, path, factor in ((first, good, 1), (second, other, 2), (first, other, 2)):
            assert weights.add(name, path) == weights.fetch(name)
            loaded = safetensors.torch.load_file(weights.fetch(name))
            assert torch.equal(loaded["conv.bias"], factor * state_dict()["conv.bias"])

    def test_leftovers_of_killed_runs_go(self, web, home):
        _, _, name = web
        path = weights.fetch(name)
        left = [path.with_name(f".{path.name}.{age}.tmp") for age in ("old", "new")]
        left += [home / "idloss" / ".scratch" / age for age in ("old", "new")]
        for item in left:
            item.mkdir() if item.parent.name == ".scratch" else item.touch()
            if "old" in item.name:
                os.utime(item, (0, 0))
        weights.fetch(name, force=True)
        assert [item.exists() for item in left] == [False, True] * 2


class TestReading:
    """What may be in a file, and how it becomes ours."""

    @pytest.fixture
    def fetch_body(self, github, register):
        def _fetch(body, adapter=None):
            source = blob("file.pth", body)
            github.files[source.pieces[0].url.removeprefix(GITHUB_RAW)] = body
            return weights.fetch(register(source, adapter=adapter))

        return _fetch

    @pytest.mark.parametrize("write", [saved, old_saved, pickle.dumps])
    def test_code_in_a_pickle_is_not_run(self, fetch_body, tmp_path, write):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        with pytest.raises(weights.NotAsPromisedError, match="refused"):
            fetch_body(write(OrderedDict(weight=torch.ones(1), payload=Evil())))
        assert not marker.exists()

    @pytest.mark.parametrize(
        "body",
        [
            b"<!DOCTYPE html><html>sign in</html>",
            b"",
            RELEASED[: len(RELEASED) // 2],
            safetensors.torch.save(state_dict())[:-100],
        ],
        ids=["html", "empty", "half a zip", "half a safetensors"],
    )
    def test_no_checkpoint(self, fetch_body, home, body):
        with pytest.raises(weights.NotAsPromisedError, match=r"file\.pth"):
            fetch_body(body)
        assert not [file for file in files_under(home) if "converted" in file]

    @pytest.mark.parametrize(
        "value",
        [
            [torch.ones(1)],
            {"epoch": 3},
            {},
            HOLDS_ITSELF,
            {"a": torch.eye(3).to_sparse()},
        ],
        ids=["list", "number", "empty", "itself", "sparse"],
    )
    def test_no_state_dict(self, fetch_body, value):
        with pytest.raises(weights.NotAsPromisedError, match="state dict"):
            fetch_body(saved(value))

    def test_terabytes_by_strides_of_0(self, fetch_body):
        with pytest.raises(weights.NotAsPromisedError, match=r"its tensors 4,000,000,000,000"):
            fetch_body(saved({"a": torch.zeros(1).expand(10**6, 10**6)}))

    def test_keys_that_read_alike(self, fetch_body):
        """The last of them took the others' place."""
        with pytest.raises(
            weights.NotAsPromisedError, match=r"two tensors .* 1 as a number and as"
        ):
            fetch_body(saved({1: torch.zeros(2), "1": torch.ones(2), "2": torch.ones(2)}))

    def test_what_zip_packed_to_a_thousandth(self, fetch_body):
        packed = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(10**6)}))) as plain,
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for entry in plain.namelist():
                bomb.writestr(entry, plain.read(entry))
        with pytest.raises(weights.NotAsPromisedError, match=r"would unpack to 4,\d+,\d+ bytes"):
            fetch_body(packed.getvalue())

    @pytest.mark.parametrize("entry", files.ENTRIES)
    @pytest.mark.parametrize("write", [saved, old_saved])
    def test_training_checkpoint(self, fetch_body, caplog, entry, write):
        """The weights that a framework's checkpoint holds are read, and the log says which."""
        assert_tiny(fetch_body(write({"epoch": 3, entry: state_dict()})))
        assert f"net.tag: took {entry!r} of " in caplog.text

    def test_averaged_weights_are_taken_before_others(self, fetch_body, caplog):
        others = {key: torch.zeros(1) for key in state_dict()}
        assert_tiny(fetch_body(saved({"params": others, "params_ema": state_dict()})))
        assert re.search(r"net\.tag: took 'params_ema' of .*file\.pth, not params\b", caplog.text)

    @pytest.mark.parametrize("prefix", [*files.PREFIXES, "module._orig_mod."])
    def test_prefix_of_a_wrapper(self, fetch_body, caplog, prefix):
        assert_tiny(fetch_body(saved(state_dict(f"{prefix}net.")), strip_prefix))
        assert f"took the prefix {prefix.split('.')[0]}." in caplog.text.replace("'", "")

    @pytest.mark.parametrize("prefix", files.PREFIXES)
    def test_prefix_of_ones_own_layout(self, home, tmp_path, caplog, prefix):
        """Taken off for a model that has no such keys, and for it alone."""
        path = tmp_path / "own.pth"
        torch.save({"net": state_dict(prefix)}, path)
        overlay = {"file": str(path)}
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.conv.bias, state_dict()["conv.bias"])
        tensors = {f"{prefix}a": torch.ones(1)}
        assert files.without_prefixes(tensors, "own", own=tensors.keys()) == tensors

    def test_shared_and_strided_tensors(self, fetch_body):
        def views(state_dict):
            base = state_dict["base"]
            return {"a": base, "b": base, "t": base.t(), "flipped": base.flip(1)}

        base = torch.arange(6.0).reshape(2, 3)
        loaded = safetensors.torch.load_file(fetch_body(saved({"base": base}), views))
        assert torch.equal(loaded["a"], loaded["b"])
        assert torch.equal(loaded["t"], base.t())
        assert torch.equal(loaded["flipped"], base.flip(1))

    @pytest.mark.parametrize(
        ("body", "adapter", "said"),
        [
            (saved(state_dict()), strip_prefix, r"unknown keys: \['conv.bias'"),
            (RELEASED, lambda state_dict: {"x": state_dict["absent"]}, "absent"),
        ],
    )
    def test_foreign_layout(self, fetch_body, body, adapter, said):
        with pytest.raises(weights.NotAsPromisedError, match=said):
            fetch_body(body, adapter)

    def test_safetensors_of_any_kind_are_read_and_verified(self, tmp_path):
        """Large ones, which are read straight into memory, others, and what is damaged."""
        kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
        tensors = {f"{kind}": torch.randn(3, 1 << 15).mul(9).to(kind) for kind in kinds}
        tensors |= {"one": torch.tensor(7.0), "none": torch.zeros(0, 1 << 17)}
        path = tmp_path / "net.safetensors"
        files.save_tensors(tensors, path, {"idloss.key": "a"})
        for read in (files.load_checkpoint(path, "net"), files.load_verified(path, "a")):
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[key], value) for key, value in tensors.items())
            assert all(read[key].dtype == value.dtype for key, value in tensors.items())
            assert all(read[k].untyped_storage().nbytes() == v.nbytes for k, v in tensors.items())
        assert files.load_verified(path, "b") is None
        body = path.read_bytes()
        for place in (1 << 17, len(body) // 2, len(body) - 1):
            path.write_bytes(body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
            assert files.load_verified(path, "a") is None
        path.write_bytes(body)
        reading = files._tensors_in(path)
        next(reading)
        os.truncate(path, len(body) // 2)  # while it is read
        with pytest.raises(EOFError, match="ends within torch"):
            list(reading)

    def test_new_version_of_an_adapter_converts_again_without_a_download(self, web, monkeypatch):
        server, url_path, name = web
        before = weights.fetch(name)
        monkeypatch.setitem(loading._registered, name, replace(TINY, version=2))
        after = weights.fetch(name)
        assert after != before
        assert_tiny(after)
        assert len(server.gets(url_path)) == 1
