"""Networks made from names, published folders, modules and weights of one's own."""

import json
import re
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from nets import TinyFNet, faces, tiny_fnet
from torch import nn

from idloss import create_fnet, create_srnet, list_srnets, register_fnet
from idloss.fnets.mobilefacenet import MobileFaceNet
from idloss.registry import timms_name
from idloss.weights import WeightsError

# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("create", "name", "message"),
    [
        (create_fnet, "sfase", "unknown FNet 'sfase'. Did you mean 'sface'"),
        (create_fnet, "sface.casia", "Did you mean 'sface.casia_webface'"),
        (create_fnet, "edsr16_64", "'edsr16_64' is an SRNet"),
        (create_fnet, "resnet18", "asked for as 'timm/resnet18'"),
        (create_fnet, "timm/no_such_model", "bat_resnext26ts"),
        (create_fnet, "timm/resnet81", "unknown timm model 'resnet81'. Did you mean 'resnet18'"),
        (create_srnet, "esdr16_64", "unknown SRNet 'esdr16_64'. Did you mean 'edsr16_64'"),
        (create_srnet, "edsr32_256.celebb", "Did you mean 'edsr32_256.celeba'"),
        (create_srnet, "sface", "'sface' is an FNet"),
        (create_fnet, "mobilefacent", "Did you mean 'mobilefacenet'"),
        (create_fnet, "timm/edsr16_64", "this is no FNet. 'edsr16_64' is an SRNet"),
        (create_fnet, create_srnet("bicubic"), "this is no FNet. 'interpolation_bicubic' is an"),
        (
            create_srnet,
            create_fnet("mobilefacenet"),
            "this is no SRNet. 'mobilefacenet' is an FNet",
        ),
        (
            create_fnet,
            "adaface",
            "Known: ir101.adaface_webface12m, ir101.cvlface_adaface_webface12m",
        ),
        (create_fnet, "buffalo_l", "create_fnet(KNOWN, checkpoint=FILE)"),
        (create_fnet, "timm/iresnet50", "a model of idloss, not of timm: leave 'timm/' out"),
        (create_fnet, "timm/iresnet51", "'hf-hub:OWNER/NAME', 'timm/BACKBONE'"),
    ],
)
def test_unknown_names(create, name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        create(name)
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("create", [create_fnet, create_srnet])
def test_neither_name_nor_module(create):
    with pytest.raises(TypeError, match=r"must be a name or a torch\.nn\.Module, got int"):
        create(7)
    spandrels = SimpleNamespace(model=nn.Upsample(scale_factor=2))
    with pytest.raises(TypeError, match=r"got SimpleNamespace: pass its \.model"):
        create(spandrels)
    with pytest.raises(TypeError, match=r"already built, and there are options .* one: depth"):
        create(tiny_fnet(), depth=3)


def test_unknown_crop():
    with pytest.raises(ValueError, match="Did you mean 'arcface'"):
        create_fnet(tiny_fnet(), crop="arcfase")
    with pytest.raises(ValueError, match="Did you mean 'arcface'"):
        register_fnet(crop="arcfase")


# --- timm's models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "vgg11"])
def test_timm_backbones_lose_their_head(name):
    """num_features is the width of the embeddings, which timm's trunk width is not always."""
    with torch.device("meta"):
        model = create_fnet(f"timm/{name}").eval()
        logits = create_fnet(f"timm/{name}", num_classes=5).eval()(torch.rand(1, 3, 224, 224))
        embeddings = model(torch.rand(1, 3, 224, 224))
    assert embeddings.shape == (1, model.num_features)
    assert logits.shape == (1, 5)
    assert model.pretrained_cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert model.crop is None


def test_timm_backbones_without_weights():
    """timm draws them at random, and only its log says so."""
    with pytest.raises(WeightsError, match="timm/vovnet39a has no weights"):
        create_fnet("timm/vovnet39a", pretrained=True)


@pytest.fixture
def published(tmp_path):
    """A folder as face recognisers are published: a ViT whose last layer is the embedding.

    That is how gaunernst/vit_tiny_patch8_112.* are: 5,512,640 parameters, the 512 "classes" of
    their head included.
    """
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=112,
        patch_size=8,
        num_classes=512,
        depth=12,
        pretrained_cfg={
            "input_size": (3, 112, 112),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
            "classifier": "head",
        },
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_512_640
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    return model.eval(), f"local-dir:{tmp_path}"


def test_published_embeddings_are_kept(published):
    model, name = published
    fnet = create_fnet(name, pretrained=True).eval()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(fnet(x), model(x))
        assert fnet.num_features == 512
        assert fnet.crop == "arcface"
        assert fnet.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        trunk = create_fnet(name, pretrained=True, num_classes=0, crop=None).eval()
        assert trunk(x).shape == (2, trunk.num_features) == (2, 192)
        assert trunk.crop is None


@pytest.mark.parametrize("option", [{}, {"crop": "arcface"}], ids=["its own", "another"])
def test_srnets_and_fnets_are_not_taken_for_each_other(tmp_path, option):
    timm.models.save_for_hf(create_srnet("edsr16_64", depth=1, width=4), tmp_path)
    with pytest.raises(ValueError, match="'edsr16_64' is an SRNet"):
        create_fnet(f"local-dir:{tmp_path}", pretrained=True, **option)
    fnet = tmp_path / "fnet"
    timm.models.save_for_hf(create_fnet("mobilefacenet"), fnet)
    with pytest.raises(ValueError, match="'mobilefacenet' is an FNet"):
        create_srnet(f"local-dir:{fnet}", pretrained=True)


def test_crop_that_a_network_was_trained_with_is_kept(tmp_path):
    """A run says in config.json which crops its FNet took."""
    timm.models.save_for_hf(create_fnet("mobilefacenet"), tmp_path)
    config = tmp_path / "config.json"
    told = json.loads(config.read_text()) | {"idloss": {"registered": True, "crop": "sphereface"}}
    config.write_text(json.dumps(told))
    assert create_fnet(f"local-dir:{tmp_path}").crop == "sphereface"
    assert create_fnet(f"local-dir:{tmp_path}", crop="arcface").crop == "arcface"


GOOD = {"architecture": "mobilefacenet", "num_classes": 0, "pretrained_cfg": {}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
        ('"x"', "TypeError"),
        (json.dumps(GOOD | {"architecture": ["x"]}), "no installed package registers"),
        (json.dumps(GOOD | {"architecture": "no_such"}), "no installed package registers"),
        (json.dumps(GOOD | {"pretrained_cfg": 7}), "AttributeError"),
        (json.dumps(GOOD | {"pretrained_cfg": {"strange": 7}}), "TypeError"),
        (json.dumps(GOOD | {"model_args": {"act": "\x1b[31m"}}), "activation"),
        (json.dumps(GOOD | {"model_args": {"strange": 7}}), "TypeError"),
        (json.dumps(GOOD | {"model_args": {"\x1b[2Jx": 7}}), "TypeError"),
        (json.dumps(GOOD | {"model_args": {"in_chans": 1.5}}), "ValueError"),
        (json.dumps(GOOD | {"pretrained_cfg": {"mean": 7}}), "mean must be numbers"),
        (json.dumps(GOOD | {"pretrained_cfg": {"architecture": ["x"]}}), "TypeError"),
        (json.dumps(GOOD | {"idloss": "x"}), "ValueError"),
        (json.dumps(GOOD | {"idloss": {"crop": "\x1b[2J"}}), "unknown template"),
        (json.dumps(GOOD | {"idloss": {"registered": False, "class": "Own\x1b"}}), "open_trained"),
        (None, "no published network: there is no .*config.json"),
        (json.dumps(GOOD), "holds no weights"),
    ],
)
def test_hostile_or_damaged_folders_are_named(tmp_path, config, said):
    if said != "holds no weights":
        weights = {} if config is None else create_fnet("mobilefacenet").state_dict()
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises((WeightsError, ValueError), match=said) as caught:
        create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert str(tmp_path) in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("arch", "args", "said"),
    [
        ("mobilefacenet", {"num_features": 10**9}, "asks for more than .* bytes of weights"),
        ("mobilefacenet", {"num_features": 10**15}, "asks for more than .* bytes of weights"),
        ("iresnet18", {"widths": [64, 64, 64, 10**9]}, "asks for more than"),
        ("iresnet18", {"img_size": [10**6, 10**6]}, "asks for more than"),
        ("iresnet18", {"depths": [2, 2, 10**9, 2]}, "asks for more than"),
        ("vit_tiny_patch8_112", {"embed_dim": 3 * 10**8}, "asks for more than"),
        ("edsr16_64", {"width": 10**9}, "asks for more than"),
        ("edsr16_64", {"depth": 10**9}, "asks for more than"),
        ("bicubic", {"size": [10**6, 10**6]}, "at most 4096"),
        ("timm/resnet18", {"width": 10**9}, "asks for more than|unexpected keyword"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 3 * 10**8}, "asks for more than"),
    ],
)
def test_numbers_of_strangers_take_no_memory(tmp_path, arch, args, said, pretrained):
    config = {"architecture": timms_name(arch).removeprefix("timm/"), "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {}}))
    safetensors.torch.save_file({"weight": torch.ones(9)}, tmp_path / "model.safetensors")
    create = create_srnet if arch in list_srnets() else create_fnet
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((WeightsError, ValueError), match=said) as caught:
        create(f"local-dir:{tmp_path}", pretrained=pretrained)
    assert str(tmp_path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_folder_without_weights_is_bounded_too(tmp_path):
    config = {"architecture": "edsr16_64", "model_args": {"width": 20_000}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        create_srnet(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("name", ["sface", "iresnet18", "edgeface_xxs", "timm/test_resnet"])
def test_grey_networks_are_refused_when_they_are_made(name):
    with pytest.raises(ValueError, match="faces are RGB, leave in_chans out"):
        create_fnet(name, in_chans=1)
    with pytest.raises(ValueError, match="faces are RGB: leave in_chans=1 out"):
        create_srnet("edsr16_64", in_chans=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_resnet", {"global_pool": ""}),
        ("timm/test_resnet", {"features_only": True}),
        ("vit_tiny_patch8_112", {"global_pool": ""}),
        ("edgeface_xxs", {"global_pool": ""}),
        ("sface", {"num_features": 0}),
    ],
)
def test_options_that_leave_no_embedding_are_refused_at_once(name, options):
    with pytest.raises(ValueError, match=r"an FNet maps|cannot take images"):
        create_fnet(name, **options)


def test_networks_that_run_on_a_gpu_alone_are_tried_there(tmp_path, monkeypatch):
    """The meta device stands for the GPU."""
    timm.models.save_for_hf(create_fnet("mobilefacenet"), tmp_path, safe_serialization=True)
    forward = MobileFaceNet.forward

    def on_gpu(net, x):
        if x.device.type == "cpu":
            raise NotImplementedError("no kernel for the CPU")
        return forward(net, x)

    monkeypatch.setattr(MobileFaceNet, "forward", on_gpu)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(WeightsError, match="no kernel for the CPU"):
        create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    fnet = create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert {parameter.device.type for parameter in fnet.parameters()} == {"cpu"}


def test_only_what_may_change_a_network_is_tried_out(tmp_path, monkeypatch):
    """A forward pass takes three times as long as reading the weights."""
    path = tmp_path / "net.pth"
    torch.save(create_fnet("mobilefacenet").state_dict(), path)

    def probe(_):
        raise ValueError("tried")

    monkeypatch.setattr("idloss.create._probe_width", probe)
    given = {"file": str(path), "license": "mit"}
    create_fnet("mobilefacenet", pretrained=True, pretrained_cfg_overlay=given)
    with pytest.raises(ValueError, match="tried"):
        create_fnet("mobilefacenet", pretrained_cfg_overlay={"num_classes": 9})


@pytest.mark.parametrize("spoil", ["cut", "header", "dtype", "shape", "key", "text"])
def test_damaged_weights_in_a_folder_are_named(tmp_path, spoil):
    timm.models.save_for_hf(create_fnet("mobilefacenet"), tmp_path, safe_serialization=True)
    path = tmp_path / "model.safetensors"
    body = path.read_bytes()
    tensors = safetensors.torch.load_file(path)
    name = "embedding.weight"  # torch takes three numbers for one that has no dimension
    changed = {
        "cut": body[: len(body) // 2],
        "header": b"\xff" * 8 + body[8:],
        "dtype": body.replace(b'"F32"', b'"F99"', 1),
        "shape": safetensors.torch.save(tensors | {name: torch.ones(3)}),
        "key": safetensors.torch.save(tensors | {"\x1b[2J": torch.ones(3)}),
        "text": b"<!doctype html>",
    }
    path.write_bytes(changed[spoil])
    with pytest.raises(WeightsError, match="mobilefacenet") as caught:
        create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert "\x1b" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "prefix"),
    [("params_ema", ""), ("net", "module."), (None, "model."), ("state_dict", "")],
)
def test_checkpoints_of_the_field_for_networks_of_timms(tmp_path, entry, prefix, caplog):
    """timm itself opens few of them."""
    model = timm.create_model("test_resnet", num_classes=0)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").unlink()
    tensors = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save({entry: tensors} if entry else tensors, tmp_path / "pytorch_model.bin")
    again = create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    assert repr(entry or prefix) in caplog.text
    assert "state_dict" not in again.pretrained_cfg


def test_published_models_that_are_no_srnets(published):
    with pytest.raises(ValueError, match="vit_tiny_patch16_224', which is not a registered SRNet"):
        create_srnet(published[1])


# --- modules -------------------------------------------------------------------------------------


def test_modules_that_describe_themselves():
    module = tiny_fnet()
    fnet = create_fnet(module)
    assert fnet is module
    assert fnet.num_features == 16
    assert fnet.crop == "sphereface"
    assert create_fnet(module, crop=None).crop is None


def stranger():
    layers = nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Dropout(), nn.LazyLinear(9)
    module = nn.Sequential(*layers).eval()
    module(torch.zeros(1, 3, 14, 12))
    return module.train()


def test_modules_with_their_input_given():
    module = stranger()
    fnet = create_fnet(module, input_size=(3, 14, 12), mean=(0.5,) * 3, std=[0.25] * 3)
    assert fnet is module
    assert fnet.num_features == 9
    assert fnet.crop is None
    assert fnet.pretrained_cfg["std"] == (0.25, 0.25, 0.25)
    assert all(child.training for child in fnet.modules())


@pytest.mark.parametrize(
    ("size", "crop"),
    [((112, 96), "sphereface"), ((112, 112), "arcface"), ((224, 224), None), ((160, 160), None)],
)
def test_crop_by_input_size(size, crop):
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    fnet = create_fnet(module, input_size=(3, *size), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert fnet.crop == crop
    assert fnet.num_features == 12


def test_modules_that_do_not_embed():
    module = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"Conv2d gave \[2, 4, 14, 12\] for images"):
        create_fnet(module, input_size=(3, 14, 12), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_given_input_replaces_the_models_own():
    module = TinyFNet()
    fnet = create_fnet(module, mean=(0.1, 0.2, 0.3))
    assert fnet.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert fnet.pretrained_cfg["std"] == (0.5, 0.25, 0.3)
    given = {"mean": np.full(3, 0.25), "std": torch.full((3,), 0.5)}
    cfg = create_fnet(TinyFNet(), **given).pretrained_cfg
    assert (cfg["mean"], cfg["std"]) == ((0.25,) * 3, (0.5,) * 3)
    assert TinyFNet().pretrained_cfg["mean"] == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        (stranger, {}, "says nothing of its input_size, mean, std: pass input_"),
        (stranger, {"input_size": (3, 112, 112), "mean": (0.5,) * 3}, "of its std: pass std= to"),
        (TinyFNet, {"input_size": (14, 12)}, r"input_size must be \(3, H, W\), got \(14, 12\)"),
        (TinyFNet, {"mean": (0.5,)}, "mean must be 3 numbers"),
        (TinyFNet, {"mean": (127.5,) * 3}, r"numbers in \[0, 1\], as images are"),
        (TinyFNet, {"mean": (float("nan"),) * 3}, "mean must be 3 numbers"),
        (TinyFNet, {"mean": "abc"}, "mean must be numbers"),
        (TinyFNet, {"std": 0.5}, "std must be numbers"),
        (TinyFNet, {"std": (0.5, 0, 0.5)}, "std must be 3 positive"),
        (TinyFNet, {"input_size": (3, 0, 5)}, "input_size must be"),
        (TinyFNet, {"input_size": (3, 10**6, 10**6)}, "no side has more than 768 pixels"),
        (TinyFNet, {"input_size": 112}, "input_size must be numbers"),
    ],
)
def test_input_that_cannot_be(module, given, said):
    with pytest.raises(ValueError, match=said):
        create_fnet(module(), **given)


@pytest.mark.parametrize("name", ["sface", "mobilefacenet", "vgg_face"])
def test_img_size_may_be_one_number(name):
    """As for timm's own."""
    with torch.device("meta"):
        fnet = create_fnet(name, img_size=64).eval()
        assert fnet.pretrained_cfg["input_size"] == (3, 64, 64)
        assert fnet(torch.rand(1, 3, 64, 64)).shape == (1, fnet.num_features)


def test_srnets_may_be_modules():
    module = nn.Upsample(scale_factor=2)
    assert create_srnet(module) is module
    assert create_srnet(module)(faces()).shape[-2:] == (56, 48)


# --- weights of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("kind", ["file", "folder", "prefixes", "function", "module"])
def test_ones_own_weights(tmp_path, kind, order):
    torch.manual_seed(0)
    net = create_fnet("mobilefacenet", img_size=(32, 32)).eval()
    tensors, name, options = net.state_dict(), "mobilefacenet", {"img_size": (32, 32)}
    path = tmp_path / "mine.pth"
    if kind == "prefixes":
        tensors = {f"backbone.{key}": value for key, value in tensors.items()}
        tensors |= {"margin.weight": torch.zeros(3)}
        options["keys"] = {"backbone.": "", "margin": None}
    if kind == "function":
        tensors = {key.upper(): value for key, value in tensors.items()}
        options["keys"] = lambda mine: {key.lower(): value for key, value in mine.items()}
    if kind == "module":
        name, options = net, {}
    else:
        torch.save({"state_dict": tensors}, path)
        options["checkpoint"] = tmp_path if kind == "folder" else path
    model = create_fnet(name, channel_order=order, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x.flip(1) if order == "bgr" else x)
        for again in (model, create_fnet(model)):
            assert (again(x) - expected).norm() < 1e-5 * expected.norm()
    assert (model.num_features, model.crop) == (128, "arcface")


def test_ones_own_weights_of_another_layout(tmp_path):
    """Every tensor must fit; nothing is reversed that takes RGB already."""
    small = {"img_size": (32, 32)}
    tensors = create_fnet("mobilefacenet", **small).state_dict()
    path = tmp_path / "mine.pth"

    def opened(**changed):
        torch.save(
            {key: value for key, value in (tensors | changed).items() if value.numel()}, path
        )
        return create_fnet("mobilefacenet", checkpoint=path, **small)

    with pytest.raises(WeightsError, match=r"unexpected: extra\. .*create_fnet\(checkpoint="):
        opened(extra=torch.zeros(3))
    with pytest.raises(WeightsError, match=r"missing: embedding\.weight"):
        opened(**{"embedding.weight": torch.zeros(0)})
    with pytest.raises(WeightsError, match=r"does not fit mobilefacenet: .*embedding\.weight"):
        opened(**{"embedding.weight": torch.zeros(3, 512)})
    with pytest.raises(ValueError, match="take RGB already"):
        create_fnet("mobilefacenet", channel_order="bgr")
    with pytest.raises(FileNotFoundError):
        create_fnet("mobilefacenet", checkpoint=tmp_path / "no.pth")
    torch.save({"a.x": torch.zeros(1), "b.x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"two keys of the checkpoint 'x', 'b\.x' the second"):
        create_fnet("mobilefacenet", checkpoint=path, keys={"a.": "", "b.": ""})
    with pytest.raises(TypeError, match="keys in a checkpoint=, and none is given"):
        create_fnet("mobilefacenet", keys={"a.": "b."})
