"""Kinds and plug-ins: what idloss knows beyond timm's registry."""

import os
import subprocess
import sys
import textwrap
from collections import deque

import pytest
import timm
import torch
from conftest import HANGS, ROOT
from torch import nn

from idloss import (
    create_fnet,
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
        timeout=HANGS,
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

    def __init__(self, width=3):
        super().__init__()
        self.num_features = 4 * width
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


def test_sys_exit_of_a_plugin_ends_nothing():
    with pytest.raises(RuntimeError, match=r"plain_quitter called sys\.exit\(3\)"):
        create_fnet("plain_quitter")

    class Quitter(Plain):
        def forward(self, x):
            sys.exit(4)

    quitter = Quitter()
    quitter.num_features = 0
    with pytest.raises(ValueError, match=r"Quitter cannot take images .*: 4"):
        create_fnet(quitter)


@pytest.mark.parametrize("register", [register_fnet, register_srnet])
@pytest.mark.parametrize("name", ["sface", "edsr16_64", "resnet18"])
def test_a_plugin_does_not_replace_a_model(register, name):
    def entry_point(pretrained=False, **kwargs): ...

    before = timm.models.model_entrypoint(name)
    entry_point.__name__ = name
    with pytest.raises(ValueError, match=f"registers '{name}', which is a model of .*: rename"):
        register(entry_point)
    assert timm.models.model_entrypoint(name) is before
