"""Published checkpoints: the released arithmetic, and forwards written on their own keys."""

import json
import math
from functools import partial

import pytest
import torch
from released import conv, norm, random_weights, run, shapes
from torch.nn import functional as F

from idloss.fnets import MobileFaceNet, SphereFace, VGGFace
from idloss.fnets.mobilefacenet import RELU6 as FOAMLIU
from idloss.fnets.mobilefacenet import mobilefacenet_bubbliiiing, mobilefacenet_foamliu
from idloss.fnets.sphereface import sface_released, sphereface_clcarwin
from idloss.fnets.vggface import vgg_face_dag, vgg_face_prlz77
from idloss.geometry import align
from idloss.srnets.edsr import EDSR, OFFICIAL, edsr_official, edsr_released

ADAPTERS = [
    edsr_official,
    edsr_released,
    mobilefacenet_bubbliiiing,
    mobilefacenet_foamliu,
    sface_released,
    sphereface_clcarwin,
    vgg_face_dag,
    vgg_face_prlz77,
]

RELU, RELU6 = ("call", torch.relu), ("call", F.relu6)


def meta(cls, **options):
    with torch.device("meta"):
        return cls(**options)


def shapes_of(state_dict):
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "adapter", "build", "count"),
    [
        ("sface", sface_released, lambda: meta(SphereFace), 22_670_656),
        ("edsr16_64", edsr_released, lambda: meta(EDSR), 1_517_571),
        (
            "edsr32_256",
            edsr_released,
            lambda: meta(EDSR, depth=32, width=256),
            43_089_923,
        ),
    ],
)
def test_released_layout(shared, name, adapter, build, count):
    """Keys, shapes and parameter counts of the released files, without their weights."""
    keys = json.loads(shared(f"golden/{name}_keys.json").read_text())
    released = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    model = build()
    assert shapes_of(adapter(released)) == shapes_of(model.state_dict())
    assert parameters(model) == count


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_checkpoints_are_refused(adapter):
    with pytest.raises(ValueError, match=r"not a checkpoint of .*unknown keys: encoder\.weight"):
        adapter({"encoder.weight": torch.zeros(1)})


def test_missing_keys_are_named(released_edsr):
    released = released_edsr("edsr_2_16")
    del released["res_blocks.1.residual.2.bias"]
    with pytest.raises(ValueError, match=r"missing keys: res_blocks\.1\.residual\.2\.bias$"):
        edsr_released(released)


def test_empty_checkpoints_are_refused():
    with pytest.raises(ValueError, match=r"missing keys: conv1\.bias"):
        edsr_released({})


def test_the_checkpoint_is_left_alone(released_edsr):
    released = released_edsr("edsr_2_16")
    before = {key: value.clone() for key, value in released.items()}
    edsr_released(released)
    assert released.keys() == before.keys()
    assert all(torch.equal(released[key], value) for key, value in before.items())


def test_released_edsr_arithmetic(golden, released_edsr):
    """The authors' network takes and gives BGR in [-1, 1]; ours RGB in [0, 1]."""
    model = EDSR(depth=2, width=16).eval()
    model.load_state_dict(edsr_released(released_edsr("edsr_2_16")))
    low = torch.from_numpy(golden["edsr_in"])
    with torch.no_grad():
        ours = model((low.flip(1) + 1) / 2)
    theirs = torch.from_numpy(golden["edsr_out"])
    assert (2 * ours.flip(1) - 1 - theirs).abs().max() < 1e-5


def test_released_sface_arithmetic(golden, sface_seeded):
    """Features of the crops, of their mirror images, and the cosines of both together."""
    crops = torch.from_numpy(golden["aligned_bgr"]).permute(0, 3, 1, 2).flip(1) / 255
    inputs = (crops - 0.5) / (128 / 255)
    with torch.no_grad():
        features, mirrored = sface_seeded(inputs), sface_seeded(inputs.flip(-1))
    assert (features - torch.from_numpy(golden["sface_feat"])).abs().max() < 1e-5
    assert (mirrored - torch.from_numpy(golden["sface_feat_flip"])).abs().max() < 1e-5
    both = torch.cat((features, mirrored), 1)
    cosine = torch.cosine_similarity(both[:4], both[4:])
    assert (cosine - torch.from_numpy(golden["pair_cosine"])).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_official_edsr_arithmetic(scale):
    """RGB on 0-255, DIV2K's mean taken off and put back, residuals scaled, no tanh."""
    wide = partial(conv, bias=True)
    body = []
    for block in range(3):
        inner = [wide(f"body.{block}.body.0", 8, 8), RELU, wide(f"body.{block}.body.2", 8, 8)]
        body.append(("add", (inner, []), 0.1))
    steps = [wide("sub_mean", 3, 3, 1), wide("head.0", 3, 8)]
    steps.append(("add", ([*body, wide("body.3", 8, 8)], []), 1))
    for stage in range(int(math.log2(scale))):
        steps += [wide(f"tail.0.{2 * stage}", 8, 32), ("call", lambda x: F.pixel_shuffle(x, 2))]
    steps += [wide("tail.1", 8, 3), wide("add_mean", 3, 3, 1)]
    released = random_weights(steps)
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
        released[f"{layer}.weight"] = torch.eye(3).view(3, 3, 1, 1)
        released[f"{layer}.bias"] = sign * mean
    image = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    model = EDSR(depth=3, width=8, scale=scale, res_scale=0.1, **OFFICIAL)
    model.load_state_dict(edsr_official(released))
    with torch.no_grad():
        assert torch.allclose(model(image), run(steps, released, 255 * image) / 255, atol=1e-5)


def test_clcarwin_sphereface():
    """Written on its own keys, classifier left out."""
    steps, channels = [], 3
    for stage, (depth, width) in enumerate(((1, 64), (2, 128), (4, 256), (1, 512)), start=1):
        layers = []
        for index in range(1, 2 * depth + 2):
            step = conv(f"conv{stage}_{index}", channels, width, stride=1 + (index == 1), bias=True)
            layers.append([step, ("prelu", f"relu{stage}_{index}", (width,))])
            channels = width
        steps += layers[0]
        for first, second in zip(layers[1::2], layers[2::2], strict=True):
            steps.append(("add", (first + second, []), 1))
    steps.append(("linear", "fc5", (512, 512 * 2 * 2), True))
    released = random_weights(steps)
    model = SphereFace(img_size=(32, 32))
    model.load_state_dict(sphereface_clcarwin(released | {"fc6.weight": torch.zeros(512, 10574)}))
    bgr = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model(bgr), run(steps, released, bgr), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "pattern"), [(vgg_face_dag, "conv{}_{}"), (vgg_face_prlz77, "conv_{}_{}")]
)
def test_vgg_face(adapter, pattern):
    """fc6, fc7 and fc8 before their ReLU, by a forward on the checkpoint's own keys."""
    steps, channels = [], 3
    for block, (width, count) in enumerate(
        ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1
    ):
        for index in range(1, count + 1):
            steps += [conv(pattern.format(block, index), channels, width, bias=True), RELU]
            channels = width
        steps.append(("call", lambda x: F.max_pool2d(x, 2)))
    for layer, shape in (("fc6", (4096, 512)), ("fc7", (4096, 4096)), ("fc8", (2622, 4096))):
        steps += [("linear", layer, shape, True), RELU]
    released = random_weights(steps)
    adapted = adapter(released)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for layer, end in (("fc6", -5), ("fc7", -3), ("fc8", -1)):
        model = meta(VGGFace, img_size=(32, 32), layer=layer)
        wanted = {key: adapted[key] for key in model.state_dict()}
        model.load_state_dict(wanted, assign=True)
        with torch.no_grad():
            ours, theirs = model.eval()(image), run(steps[:end], released, image)
        assert ours.min() < 0  # not what a ReLU leaves
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_vgg_face_of_full_size():
    layers = {"fc6": (4096, 512 * 7 * 7), "fc7": (4096, 4096), "fc8": (2622, 4096)}
    model = meta(VGGFace, layer="fc8")
    assert {name: tuple(model.embedding.get_submodule(name).weight.shape) for name in layers} == (
        layers
    )
    assert parameters(model) == 145_002_878  # vgg_face_dag.pth: 580 MB of float32


# --- MobileFaceNet -------------------------------------------------------------------------------


def bubbliiiing():
    """The network of bubbliiiing/arcface-pytorch on its own keys."""

    def layer(name, norm_name, inputs, outputs, kernel=1, act=None, **options):
        steps = [conv(f"arcface.{name}", inputs, outputs, kernel, **options)]
        steps.append(norm(f"arcface.{norm_name}", outputs))
        return steps + ([("prelu", f"arcface.{act}", (outputs,))] if act else [])

    def three(name, *sizes, **options):
        return layer(f"{name}.conv", f"{name}.bn", *sizes, act=f"{name}.prelu", **options)

    def block(name, inputs, inner, outputs, stride=1):
        steps = three(f"{name}.conv", inputs, inner)
        steps += three(f"{name}.conv_dw", inner, inner, 3, stride=stride, groups=inner)
        return steps + layer(f"{name}.project.conv", f"{name}.project.bn", inner, outputs)

    steps = three("conv1", 3, 64, 3, stride=2) + three("conv2_dw", 64, 64, 3, groups=64)
    channels = 64
    for opening, rest, repeats, inner, width in (
        ("conv_23", "conv_3", 4, 128, 64),
        ("conv_34", "conv_4", 6, 256, 128),
        ("conv_45", "conv_5", 2, 512, 128),
    ):
        steps += block(opening, channels, inner, width, stride=2)
        for index in range(repeats):
            again = block(f"{rest}.model.{index}", width, 2 * width, width)
            steps.append(("add", (again, []), 1))
        channels = width
    steps += layer("sep", "sep_bn", 128, 512, act="prelu")
    steps += layer("GDC_dw", "GDC_bn", 512, 512, 7, padding=0, groups=512)
    return steps + layer("features", "last_bn", 512, 128)


def foamliu():
    """The network of foamliu/MobileFaceNet on its own keys."""

    def layer(name, norm_name, inputs, outputs, kernel=1, act=RELU6, **options):
        step = conv(name, inputs, outputs, kernel, **options)
        return [step, norm(norm_name, outputs), *([act] if act else [])]

    steps = layer("conv1.0", "conv1.1", 3, 64, 3, stride=2)
    steps += layer("dw_conv.depthwise", "dw_conv.bn1", 64, 64, 3, RELU, groups=64)
    steps += layer("dw_conv.pointwise", "dw_conv.bn2", 64, 64, act=RELU)
    inners, channels = [128] * 5 + [256] * 7 + [512] + [256] * 2, 64
    for index, inner in enumerate(inners):
        name, width = f"features.{index}.conv", 64 if index < 5 else 128
        stride = 2 if index in (0, 5, 12) else 1
        block = layer(f"{name}.0.0", f"{name}.0.1", channels, inner)
        block += layer(f"{name}.1.0", f"{name}.1.1", inner, inner, 3, stride=stride, groups=inner)
        block += layer(f"{name}.2", f"{name}.3", inner, width, act=None)
        steps += [("add", (block, []), 1)] if stride == 1 else block
        channels = width
    steps += layer("conv2.0", "conv2.1", 128, 512)
    steps += layer("gdconv.depthwise", "gdconv.bn", 512, 512, 7, None, padding=0, groups=512)
    return steps + layer("conv3", "bn", 512, 128, act=None, bias=True)


MOBILEFACENETS = {
    "arcface_mobilefacenet.pth": (mobilefacenet_bubbliiiing, bubbliiiing, {}),
    "foamliu_mobilefacenet.pt": (mobilefacenet_foamliu, foamliu, FOAMLIU),
}


@pytest.mark.parametrize("name", MOBILEFACENETS)
def test_mobilefacenet_arithmetic(name):
    adapter, steps, options = MOBILEFACENETS[name]
    released = random_weights(steps())
    model = MobileFaceNet(**options).eval()
    model.load_state_dict(adapter(released))
    image = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = run(steps(), released, image).flatten(1)
        assert (model(image) - expected).norm() < 1e-5 * expected.norm()


def test_mobilefacenets_know_people(shared, golden):
    """The two pairs of one person among the golden photos stand out from all other pairs."""
    photos = torch.from_numpy(golden["raw_bgr"]).permute(0, 3, 1, 2).flip(1) / 255
    faces = align(photos, torch.from_numpy(golden["landmarks"]), "arcface").clamp(0, 1)
    people = [str(name).split("/")[0] for name in golden["names"]]
    same = torch.tensor([[first == second for second in people] for first in people])
    pairs = torch.ones(8, 8).triu(1).bool()
    normalisations = [
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    for name, (mean, std) in zip(MOBILEFACENETS, normalisations, strict=True):
        adapter, steps, options = MOBILEFACENETS[name]
        released = torch.load(shared(f"weights/{name}"), map_location="cpu", weights_only=True)
        assert shapes(steps()).items() <= shapes_of(released).items()
        model = MobileFaceNet(**options).eval()
        model.load_state_dict(adapter(released))
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        with torch.no_grad():
            features = F.normalize(model((faces - mean) / std))
        cosine = features @ features.T
        assert same[pairs].sum() == 2
        assert cosine[pairs & same].min() > cosine[pairs & ~same].max() + 0.2
