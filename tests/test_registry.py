"""Names, kinds and plug-ins: what idloss knows beyond timm's registry."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT
from nets import TinyFNet, faces, tiny_fnet
from torch import nn

from idloss import (
    create_fnet,
    create_srnet,
    list_fnets,
    list_srnets,
    register_fnet,
    register_srnet,
)
from idloss.weights import WeightsError


def run(code, cwd):
    """A fresh interpreter: plug-ins are looked for once in a process."""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(cwd), str(ROOT)))},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


# --- lists ---------------------------------------------------------------------------------------


def test_kinds_and_wildcards():
    assert {"sface", "vgg_face", "mobilefacenet"} <= set(list_fnets())
    assert {"edsr16_64", "edsr32_256_id", "bicubic", "bilinear"} <= set(list_srnets())
    assert not set(list_fnets()) & set(list_srnets())
    assert "resnet18" not in list_fnets()
    assert list_fnets("mobile*") == ["mobilefacenet", "mobilefacenet_relu6"]
    assert list_srnets("*_id") == ["edsr16_64_id", "edsr32_256_id"]
    assert list_fnets(["sface", "vgg*"]) == ["sface", "vgg_face"]
    assert list_fnets("edsr*") == []


def test_pretrained_names_have_tags():
    names = list_fnets(pretrained=True)
    assert "sface.casia_webface" in names
    assert "mobilefacenet.casia_webface" in names
    assert set(names) <= set(timm.list_models(pretrained=True))
    assert "edsr32_256.celeba" in list_srnets(pretrained=True)
    assert "bicubic" not in list_srnets(pretrained=True)
    assert list_fnets("sface.clcarwin*", pretrained=True) == ["sface.clcarwin_casia_webface"]


@pytest.mark.parametrize(
    ("name", "crop"),
    [
        ("sface", "sphereface"),
        ("sface.casia_webface", "sphereface"),
        ("mobilefacenet", "arcface"),
        ("vgg_face", None),
        ("iresnet50", "arcface"),
        ("ir_se50.arcface_ms1mv2", "arcface"),
        ("arcface_resnet18", "ffhq"),
        ("inception_resnet_v1", "facenet"),
        ("edgeface_xxs", "arcface"),
    ],
)
def test_crops(name, crop):
    with torch.device("meta"):
        assert create_fnet(name).crop == crop


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


@pytest.mark.parametrize("spoil", ["cut", "header", "dtype", "shape", "key", "text"])
def test_damaged_weights_in_a_folder_are_named(tmp_path, spoil):
    timm.models.save_for_hf(create_fnet("mobilefacenet"), tmp_path, safe_serialization=True)
    path = tmp_path / "model.safetensors"
    body = path.read_bytes()
    tensors = safetensors.torch.load_file(path)
    name = next(iter(tensors))
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


# --- plug-ins ------------------------------------------------------------------------------------

PLUGIN = """
import torch
from torch import nn
from idloss import register_fnet, register_srnet

print("imported")

class Tiny(nn.Module):
    num_classes, num_features = 0, 12
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)

@register_fnet(crop="arcface")
def tiny_plugin_fnet(pretrained=False, **kwargs):
    model = Tiny()
    model.pretrained_cfg = {
        "architecture": "tiny_plugin_fnet", "input_size": (3, 16, 16),
        "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }
    return model

@register_srnet(crop="arcface")
def tiny_plugin_srnet(pretrained=False, **kwargs):
    return nn.Upsample(scale_factor=2)
"""


@pytest.fixture
def site(tmp_path):
    """An installed distribution with three plug-ins: a good, a broken, and one that quits."""
    (tmp_path / "good_plugin.py").write_text(PLUGIN)
    (tmp_path / "broken_plugin.py").write_text(
        "from torchvision.transforms.functional_tensor import rgb_to_grayscale"  # as basicsr does
    )
    (tmp_path / "quitting_plugin.py").write_text("import sys; sys.exit(3)")
    info = tmp_path / "face_zoo-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: face-zoo\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[idloss.plugins]\nbad = broken_plugin\nquits = quitting_plugin\ngood = good_plugin\n"
    )
    return tmp_path


def test_plugins(site):
    done = run(
        """
        import idloss, sys
        print("good_plugin" in sys.modules)
        crop = idloss.registry.srnet_crop("tiny_plugin_srnet")  # as a recipe does
        print(crop, idloss.create_srnet("tiny_plugin_srnet").crop)
        print(idloss.list_fnets("tiny*"), idloss.list_srnets("tiny*"))
        fnet = idloss.create_fnet("tiny_plugin_fnet")
        print(fnet.crop, fnet.num_features, idloss.FaceEncoder(fnet).num_features)
        idloss.list_fnets()
        """,
        site,
    )
    lines = done.stdout.splitlines()
    assert lines == [
        "False",
        "imported",
        "arcface arcface",
        "['tiny_plugin_fnet'] ['tiny_plugin_srnet']",
        "arcface 12 12",
    ]
    # one warning for each, at the caller's line
    warnings = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 2
    assert all(warning.startswith("<string>:4: UserWarning") for warning in warnings)
    assert "'bad' (broken_plugin) of face-zoo 1.2 could not be loaded" in warnings[0]
    assert "ModuleNotFoundError: No module named" in warnings[0]
    assert "torchvision.transforms.functional is the place today" in done.stderr
    assert "'quits' (quitting_plugin) of face-zoo 1.2 could not be loaded" in warnings[1]
    assert "SystemExit: 3" in warnings[1]


class Plain(nn.Module):
    """A network of one's own, whose constructor knows nothing of timm."""

    num_features = 12

    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.num_classes = 0
        self.pretrained_cfg = {
            "architecture": "plain_fnet",
            "input_size": (3, 112, 112),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        }

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(self.conv(x), 2).flatten(1)


@register_fnet(crop="sphereface")
def plain_fnet(pretrained=False, **kwargs):
    return Plain(**kwargs)


@register_fnet(crop="sphereface")
def plain_constant(pretrained=False, **kwargs):
    model = Plain(**kwargs)
    if pretrained:
        nn.init.ones_(model.conv.weight)
        nn.init.ones_(model.conv.bias)
    return model


@register_fnet(crop="arcface")
def plain_mistaken(pretrained=False, **kwargs):
    model = Plain()
    model.crop = "sphereface"
    return model


default_cfgs = {
    name: timm.models.DefaultCfg(
        deque(["a"]), {"a": timm.models.PretrainedCfg(url="https://host.invalid/f.pth", tag="a")}
    )
    for name in ("plain_deaf", "plain_deafer")
}


@register_fnet
def plain_deaf(pretrained=False, **kwargs):
    return Plain()


@register_fnet
def plain_deafer(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None
):
    return Plain()


@register_fnet
def plain_quitter(pretrained=False, **kwargs):
    sys.exit(3)


@pytest.mark.parametrize("create", [create_fnet, timm.create_model])
def test_the_signature_of_the_readme_works(create):
    """`my_fnet(pretrained=False, **kwargs)` with **kwargs for a class that knows no timm."""
    assert create("plain_fnet", width=5).conv.out_channels == 5


def test_crop_is_what_a_plugin_was_registered_with():
    """Its input of 112x112 is that of arcface, too."""
    assert create_fnet("plain_fnet").crop == "sphereface"
    with pytest.raises(ValueError, match="crop='arcface', and what it builds says 'sphereface'"):
        create_fnet("plain_mistaken")
    module = Plain()
    module.crop = "no_such_template"
    with pytest.raises(ValueError, match="no_such_template"):
        create_fnet(module)


def test_weights_of_a_plugin_are_loaded_or_missed(tmp_path):
    for name in ("plain_fnet", "plain_deaf", "plain_deaf.a", "plain_deafer", "plain_deafer.a"):
        with pytest.raises(WeightsError, match=r"plain_\w+ has no weights: .* conv\.weight"):
            create_fnet(name, pretrained=True)
    ones = create_fnet("plain_constant", pretrained=True)
    assert ones.conv.weight.eq(1).all()
    model = create_fnet("plain_fnet", width=5)
    timm.models.save_for_hf(model, tmp_path, model_args={"width": 5})
    again = create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(again.conv.weight, model.conv.weight)
    assert again.crop == "sphereface"


@register_fnet(crop="sphereface", channel_order="bgr")
def plain_bgr(pretrained=False, **kwargs):
    return ordered()


def test_a_plugin_says_once_that_it_takes_bgr(tmp_path):
    """Its own weights are reversed when they are loaded, and not again when they come back."""
    x = torch.randn(2, 3, 28, 24)
    model = create_fnet("plain_bgr", pretrained=True)
    assert torch.allclose(model(x), ordered()(x.flip(1)), rtol=1e-5, atol=1e-4)
    timm.models.save_for_hf(model, tmp_path)
    again = create_fnet(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(again.conv.weight, model.conv.weight)
    with pytest.raises(ValueError, match="weights of plain_bgr take RGB already"):
        create_fnet("plain_bgr", pretrained=True, channel_order="bgr")
    with pytest.raises(ValueError, match="must be 'rgb' or 'bgr', got 'gbr'"):
        register_fnet(channel_order="gbr")


def ordered():
    """A network whose output tells the channels apart."""
    net = Plain().eval()
    with torch.no_grad():
        net.conv.weight.copy_(torch.arange(net.conv.weight.numel()).view(net.conv.weight.shape))
        net.conv.bias.zero_()
    net.pretrained_cfg["architecture"] = "plain_bgr"
    return net


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
    with pytest.raises(TypeError, match="keys in a checkpoint=, and none is given"):
        create_fnet("mobilefacenet", keys={"a.": "b."})


def test_sys_exit_of_a_plugin_ends_nothing():
    with pytest.raises(RuntimeError, match=r"plain_quitter called sys\.exit\(3\)"):
        create_fnet("plain_quitter")

    class Quitter(Plain):
        num_features = 0

        def forward(self, x):
            sys.exit(4)

    with pytest.raises(ValueError, match=r"Quitter cannot take images .*: 4"):
        create_fnet(Quitter())


@pytest.mark.parametrize("register", [register_fnet, register_srnet])
@pytest.mark.parametrize("name", ["sface", "edsr16_64", "resnet18"])
def test_a_plugin_does_not_replace_a_model(register, name):
    def entry_point(pretrained=False, **kwargs): ...

    before = timm.models.model_entrypoint(name)
    entry_point.__name__ = name
    with pytest.raises(ValueError, match=f"registers '{name}', which is a model of .*: rename"):
        register(entry_point)
    assert timm.models.model_entrypoint(name) is before
