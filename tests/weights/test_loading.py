"""From a name to weights and a model that has every one of them."""

import functools
import io
import re

import pytest
import safetensors.torch
import timm
import torch
from servers import Fault
from tinyweights import (
    COMMIT,
    NAME,
    RELEASED,
    TINY_PATH,
    blob,
    files_under,
    git_sha1,
    saved,
    sha256,
    state_dict,
)
from torch import nn

from idloss import create_fnet, list_fnets, list_srnets, weights
from idloss.weights import loading, sources
from idloss.weights.files import load_checkpoint
from idloss.weights.loading import get_weights
from idloss.weights.placing import without_numbers
from idloss.weights.sources import GITHUB_RAW, HubFile, ZooFile


class TestBuildModel:
    @pytest.fixture
    def served(self, web):
        return web[0]

    @pytest.mark.parametrize("name", ["idloss_tiny", NAME])
    def test_through_timm(self, served, home, name):
        model = timm.create_model(name, pretrained=True)
        expected = state_dict()
        loaded = model.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
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
        with pytest.raises(weights.NotFoundError, match=r"idloss_tiny\.untrained"):
            timm.create_model("idloss_tiny.untrained", pretrained=True)

    def test_other_number_of_classes(self, served):
        model = timm.create_model(NAME, pretrained=True, num_classes=9)
        assert model.fc.weight.shape == (9, 128)
        assert torch.equal(model.conv.weight, state_dict()["conv.weight"])

    @pytest.mark.parametrize("num_classes", [5, 9])
    @pytest.mark.parametrize("spoil", ["missing", "unexpected"])
    def test_strict(self, home, num_classes, spoil):
        spoiled = state_dict()
        if spoil == "missing":
            del spoiled["conv.bias"]
        else:
            spoiled["conv.extra"] = torch.ones(1)
        key = "conv.bias" if spoil == "missing" else "conv.extra"
        with pytest.raises(weights.NotAsPromisedError, match=rf"{spoil}: {key}"):
            timm.create_model(
                NAME,
                pretrained=True,
                num_classes=num_classes,
                pretrained_cfg_overlay={"state_dict": spoiled},
            )

    def test_an_overlay_may_have_the_released_layout(self, home, tmp_path):
        path = tmp_path / "retrained.pth"
        path.write_bytes(saved({**state_dict("net."), "net.fc.bias": torch.zeros(5)}))
        model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
        assert not model.fc.bias.any()
        assert not home.exists()

    def test_overlay_of_the_hub(self, hub, home, monkeypatch):
        """Read as any other checkpoint: out of its entry, its prefix off, safetensors first."""
        server, _, _ = hub
        body = saved({"params_ema": state_dict("module.")})
        server.add_hub_file("a/b", COMMIT, "pytorch_model.bin", body)
        overlay = {"hf_hub_id": f"a/b@{COMMIT}"}
        options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
        model = timm.create_model("idloss_tiny.untrained", **options)
        assert torch.equal(model.conv.bias, state_dict()["conv.bias"])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = timm.create_model("idloss_tiny.untrained", **options)
        assert torch.equal(model.conv.bias, state_dict()["conv.bias"])

    def test_overlay_of_an_address(self, served, home, monkeypatch):
        options = {"pretrained": True, "pretrained_cfg_overlay": {"url": f"{served.url}/f.pth"}}
        served.files["/f.pth"] = saved({"state_dict": state_dict()})
        for _ in range(2):
            model = timm.create_model("idloss_tiny.untrained", **options)
            assert torch.equal(model.conv.bias, state_dict()["conv.bias"])
        assert len(served.gets("/f.pth")) == 1
        monkeypatch.setattr(loading, "URL_LIMIT", 500_000)
        served.faults["/g.pth"] = Fault(no_length=True, body=bytes(4 << 20))
        options["pretrained_cfg_overlay"] = {"url": f"{served.url}/g.pth"}
        with pytest.raises(weights.NotAsPromisedError, match="more than the 500,000"):
            timm.create_model("idloss_tiny.untrained", **options)

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
        assert before["hash"] == [f"git-sha1:{git_sha1(RELEASED)}"]
        assert (before["licence"], before["training data"]) == ("mit", "nothing at all")
        assert (before["cached"], before["size"]) == (None, None)
        path = weights.fetch(NAME)
        after = weights.describe(NAME)
        assert (after["cached"], after["size"]) == (path, path.stat().st_size)

    def test_unknown(self, register):
        with pytest.raises(weights.NotFoundError, match=r"mean 'idloss_tiny\.a'"):
            get_weights("idloss_tiny.b")

    def test_plugins_are_loaded_before_a_name_is_unknown(self, register, monkeypatch):
        late = blob("late", b"")
        monkeypatch.setattr(loading, "load_plugins", lambda: register(late, "late.tag"))
        assert get_weights("late.tag").source == late

    def test_one_name_one_source(self, register):
        register(blob("a", b""))
        register(blob("a", b""))
        with pytest.raises(ValueError, match="registered already"):
            register(blob("b", b""))


REFUSED = "http://127.0.0.1:9"  # where nobody listens
NAMES = [*list_fnets(pretrained=True), *list_srnets(pretrained=True)]


@pytest.mark.parametrize("name", [name for name in NAMES if name in loading._registered])
def test_without_a_network_one_error_tells_all(name, home, naps, monkeypatch):
    """Which source was tried, why it gave nothing, and what to do, in five lines at most."""
    for function in ("hf_hub_download", "hf_hub_url"):
        client = functools.partial(getattr(sources, function), endpoint=REFUSED)
        monkeypatch.setattr(sources, function, client)
    source = get_weights(name).source
    if not isinstance(source, HubFile):  # whose client would keep them for the tests after this
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, REFUSED)
    if isinstance(source, ZooFile):  # which comes with the package
        assert weights.fetch(name).is_file()
        return
    with pytest.raises(weights.WeightsError) as caught:
        weights.fetch(name)
    told = str(caught.value)
    assert told.count("\n") < 5
    assert f"{name}: {source.pieces[0].filename}" in told
    assert source.pieces[0].url in told
    by_hand = isinstance(source, weights.ManualFile)
    assert re.search("by hand" if by_hand else "no connection|not reached", told)
    assert f"idloss fetch {name} --file" in told


@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize("way", ["checkpoint", "pretrained"])
def test_what_was_read_is_not_copied_nor_drawn_before(form, way, tmp_path, monkeypatch):
    """Half precision becomes float32, tensors that share memory part, and it can be trained."""
    few = {"depths": (0, 0, 0, 0), "img_size": (32, 32)}
    net = create_fnet("sface", **few)
    tensors = net.state_dict() | {"stages.0.act.weight": net.state_dict()["stages.0.conv.bias"]}
    tensors["embedding.weight"] = tensors["embedding.weight"].half()
    path = tmp_path / f"net.{form}"
    if form == "pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file({key: value.clone() for key, value in tensors.items()}, path)
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    options = {"checkpoint": path} if way == "checkpoint" else given
    kept = []
    read = lambda *words: kept.append(load_checkpoint(*words)) or kept[0]  # noqa: E731
    monkeypatch.setattr(loading, "load_checkpoint", read)
    again = create_fnet("sface", **few, **options)
    assert again.embedding.bias.data_ptr() == kept[0]["embedding.bias"].data_ptr()
    assert all(value.dtype == torch.float32 for value in again.state_dict().values())
    assert all(torch.equal(value, tensors[k].float()) for k, value in again.state_dict().items())
    places = {value.untyped_storage().data_ptr() for value in again.state_dict().values()}
    assert len(places) == len(tensors)
    assert all(parameter.requires_grad for parameter in again.parameters())
    path.write_bytes(b"")  # as who trains into the same file does
    assert torch.equal(again.state_dict()["embedding.weight"], tensors["embedding.weight"].float())


def test_only_shapes_are_not_drawn():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.noise = nn.Linear(9, 9), torch.zeros(9, device="cpu").normal_()

    net = without_numbers(Net)
    assert net.linear.weight.is_meta
    assert net.noise.std() > 0


def test_real_mobilefacenet(shared, server, home, naps, monkeypatch):
    """The authors' file, from its pinned address to a model that has every one of its tensors."""
    from idloss import list_fnets

    body = shared("weights/arcface_mobilefacenet.pth").read_bytes()
    assert sha256(body) == "4c08e11a0a2bbf299910210da647c7d8105c348f4c533868e1710dbcf7b22480"
    assert "mobilefacenet.casia_webface" in list_fnets(pretrained=True)
    (piece,) = get_weights("mobilefacenet.casia_webface").source.pieces
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
