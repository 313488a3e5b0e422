"""IResNets and their relatives against the released files: every key and shape, and the numbers."""

import pytest
import timm
import torch
from released import conv, norm, overhead, random_weights, run, shapes

from idloss import create_fnet
from idloss.fnets.arcface_resnet import arcface_resnet_gfpgan
from idloss.fnets.ir_se import ir_released, ir_se_released
from idloss.fnets.iresnet import DEPTHS, iresnet_insightface
from idloss.weights.loading import get_weights

WIDTHS = (64, 128, 256, 512)
SMALL = (16, 32, 48, 64)


def prelu(key, width):
    return "prelu", key, (width,)


def places(depths, widths, first_stride=2):
    """`stage, index in it, number, inputs, width, stride` of each block."""
    number, channels = 0, widths[0]
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        for index in range(depth):
            stride = 1 if index else first_stride if stage == 1 else 2
            yield stage, index, number, channels, width, stride
            number, channels = number + 1, width


def insightface(depths, widths=WIDTHS, pixels=49):
    """deepinsight/insightface, recognition/arcface_torch/backbones/iresnet.py."""
    steps = [conv("conv1", 3, widths[0]), norm("bn1", widths[0]), prelu("prelu", widths[0])]
    for stage, index, _, inputs, width, stride in places(depths, widths):
        key = f"layer{stage}.{index}"
        residual = [norm(f"{key}.bn1", inputs), conv(f"{key}.conv1", inputs, width)]
        residual += [norm(f"{key}.bn2", width), prelu(f"{key}.prelu", width)]
        residual += [conv(f"{key}.conv2", width, width, 3, stride), norm(f"{key}.bn3", width)]
        down = f"{key}.downsample"
        shortcut = [conv(f"{down}.0", inputs, width, 1, stride), norm(f"{down}.1", width)]
        steps.append(("add", (residual, shortcut if index == 0 else []), 1))
    linear = ("linear", "fc", (512, widths[-1] * pixels), True)
    return [*steps, norm("bn2", widths[-1]), linear, norm("features", 512)]


def ir(depths, widths=WIDTHS, pixels=49, se=False):
    """mk-minchul/AdaFace, net.py; with `se` TreB1eN/InsightFace_Pytorch, model.py."""
    steps = [conv("input_layer.0", 3, widths[0]), norm("input_layer.1", widths[0])]
    steps.append(prelu("input_layer.2", widths[0]))
    for _, _, number, inputs, width, stride in places(depths, widths):
        key = f"body.{number}.res_layer"
        residual = [norm(f"{key}.0", inputs), conv(f"{key}.1", inputs, width)]
        residual += [] if se else [norm(f"{key}.2", width)]
        i = len(residual)
        residual += [prelu(f"{key}.{i}", width), conv(f"{key}.{i + 1}", width, width, 3, stride)]
        residual.append(norm(f"{key}.{i + 2}", width))
        residual += [("se", f"{key}.{i + 3}", width)] if se else []
        short = f"body.{number}.shortcut_layer"
        shortcut = [("call", lambda x, stride=stride: x[..., ::stride, ::stride])]
        if inputs != width:
            shortcut = [conv(f"{short}.0", inputs, width, 1, stride), norm(f"{short}.1", width)]
        steps.append(("add", (residual, shortcut), 1))
    linear = ("linear", "output_layer.3", (512, widths[-1] * pixels), True)
    last = norm("output_layer.4", 512, affine=se)
    return [*steps, norm("output_layer.0", widths[-1]), linear, last]


def gfpgan(depths, widths=WIDTHS, pixels=64):
    """TencentARC/GFPGAN, gfpgan/archs/arcface_arch.py, use_se=False as in its training options."""
    grey = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    steps = [("call", lambda x: (x * grey).sum(1, keepdim=True))]
    steps += [conv("conv1", 1, widths[0]), norm("bn1", widths[0]), prelu("prelu", 1)]
    steps.append(("call", lambda x: torch.nn.functional.max_pool2d(x, 2)))
    for stage, index, _, inputs, width, stride in places(depths, widths, first_stride=1):
        key = f"layer{stage}.{index}"
        residual = [norm(f"{key}.bn0", inputs), conv(f"{key}.conv1", inputs, inputs)]
        residual += [norm(f"{key}.bn1", inputs), prelu(f"{key}.prelu", 1)]
        residual += [conv(f"{key}.conv2", inputs, width, 3, stride), norm(f"{key}.bn2", width)]
        down = f"{key}.downsample"
        shortcut = [conv(f"{down}.0", inputs, width, 1, stride), norm(f"{down}.1", width)]
        steps.append(("add", (residual, shortcut if stride == 2 else []), 1))
        steps.append(prelu(f"{key}.prelu", 1))
    linear = ("linear", "fc5", (512, widths[-1] * pixels), True)
    return [*steps, norm("bn4", widths[-1]), linear, norm("bn5", 512)]


def ir_se(*about):
    return ir(*about, se=True)


@pytest.mark.parametrize(
    ("name", "network", "layers", "adapter"),
    [
        ("iresnet18", insightface, 18, iresnet_insightface),
        ("iresnet34", insightface, 34, iresnet_insightface),
        ("iresnet50", insightface, 50, iresnet_insightface),
        ("iresnet100", insightface, 100, iresnet_insightface),
        ("ir18", ir, 18, ir_released),
        ("ir50", ir, 50, ir_released),
        ("ir101", ir, 100, ir_released),
        ("ir_se50", ir_se, 50, ir_se_released),
        ("arcface_resnet18", gfpgan, 18, arcface_resnet_gfpgan),
    ],
)
def test_keys_of_the_released_file(name, network, layers, adapter):
    steps = network(DEPTHS[layers])
    # the file of IR-SE50 was written by torch 0.4.0: it holds no whole numbers
    counters = name != "ir_se50"
    with torch.device("meta"):
        released = {key: torch.empty(shape) for key, shape in shapes(steps, counters).items()}
        model = create_fnet(name)
    model.load_state_dict(adapter(released), assign=True)
    assert adapter is get_weights(name).adapter
    size = get_weights(name).size
    assert size is None or 150 < overhead(steps, size, counters) < 400
    for key in (min(released), max(released)):
        cut = {other: value for other, value in released.items() if other != key}
        with pytest.raises(ValueError, match=f"missing keys: {key}$"):
            adapter(cut)
    with pytest.raises(ValueError, match=r"unknown keys: extra\.weight$"):
        adapter({**released, "extra.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "network", "layers", "adapter"),
    [
        ("iresnet50", insightface, (1, 2, 1, 1), iresnet_insightface),
        ("ir18", ir, DEPTHS[18], ir_released),
        ("ir_se50", ir_se, DEPTHS[18], ir_se_released),
        ("arcface_resnet18", gfpgan, DEPTHS[18], arcface_resnet_gfpgan),
    ],
)
def test_computes_what_the_released_network_does(name, network, layers, adapter):
    side = 64 if name == "arcface_resnet18" else 32
    steps = network(layers, SMALL, (side // 16) ** 2)
    released = random_weights(steps)
    model = create_fnet(name, img_size=(side, side), depths=layers, widths=SMALL).eval()
    model.load_state_dict(adapter(released))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run(steps, released, x)
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("tag", "prefix"),
    [("adaface_webface4m", "model."), ("cvlface_adaface_webface4m", "model.net.")],
)
def test_adafaces_own_files_take_bgr(tmp_path, tag, prefix):
    """AdaFace's Lightning checkpoints hold a head besides, and take BGR; CVLface's take RGB."""
    steps = ir(DEPTHS[18], SMALL, 4)
    released = random_weights(steps)
    file = {f"{prefix}{key}": value for key, value in released.items()}
    bgr = prefix == "model."
    if bgr:
        file |= {"head.kernel": torch.zeros(512, 3), "head.t": torch.zeros(1)}
    path = tmp_path / "weights.ckpt"
    torch.save({"epoch": 3, "state_dict": file}, path)
    small = {"img_size": (32, 32), "widths": SMALL}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    own = {"checkpoint": path, "channel_order": "bgr" if bgr else "rgb"}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    with torch.no_grad():
        expected = run(steps, released, x.flip(1) if bgr else x)
        for name, options in (("ir18", own), (f"ir18.{tag}", overlay)):
            model = create_fnet(name, **options, **small).eval()
            assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes RGB or BGR.* Say which, channel_order="):
        create_fnet("ir18", checkpoint=path, **small)


def test_grey_or_rgb():
    with pytest.raises(ValueError, match="RGB or grey images, got in_chans=4"):
        create_fnet("arcface_resnet18", in_chans=4)
    grey = {"in_chans": 1, "img_size": (64, 64), "widths": SMALL}
    model = timm.create_model("arcface_resnet18", **grey).eval()
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 512)
