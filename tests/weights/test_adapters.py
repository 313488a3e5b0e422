"""Published checkpoints: the released arithmetic, and forwards written on their own keys."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from idloss.fnets import MobileFaceNet, SphereFace, VGGFace
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


def meta(cls, **options):
    with torch.device("meta"):
        return cls(**options)


def shapes(state_dict):
    return {key: tuple(value.shape) for key, value in state_dict.items()}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def random_weights(layers, seed=0):
    """A random state dict: `layers` gives the weight's shape by layer; `.bias` goes with it."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for layer, shape in layers.items():
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.0
        state_dict[f"{layer}.weight"] = 0.25 + torch.zeros(shape)
        if len(shape) > 1:
            state_dict[f"{layer}.weight"] = scale * torch.randn(shape, generator=generator)
            state_dict[f"{layer}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state_dict


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
    assert shapes(adapter(released)) == shapes(model.state_dict())
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
    layers = {"head.0": (8, 3, 3, 3)}
    for block in range(3):
        layers |= {f"body.{block}.body.{index}": (8, 8, 3, 3) for index in (0, 2)}
    layers["body.3"] = (8, 8, 3, 3)
    stages = int(math.log2(scale))
    layers |= {f"tail.0.{2 * stage}": (32, 8, 3, 3) for stage in range(stages)}
    layers["tail.1"] = (3, 8, 3, 3)
    released = random_weights(layers)
    mean = 255 * torch.tensor([0.4488, 0.4371, 0.4040])
    for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
        released[f"{layer}.weight"] = torch.eye(3).view(3, 3, 1, 1)
        released[f"{layer}.bias"] = sign * mean

    def conv(x, layer):
        padding = 0 if layer.endswith("mean") else 1
        return F.conv2d(x, released[f"{layer}.weight"], released[f"{layer}.bias"], padding=padding)

    image = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    shallow = conv(conv(255 * image, "sub_mean"), "head.0")
    deep = shallow
    for block in range(3):
        inner = conv(F.relu(conv(deep, f"body.{block}.body.0")), f"body.{block}.body.2")
        deep = deep + 0.1 * inner
    x = conv(deep, "body.3") + shallow
    for stage in range(stages):
        x = F.pixel_shuffle(conv(x, f"tail.0.{2 * stage}"), 2)
    expected = conv(conv(x, "tail.1"), "add_mean") / 255

    model = EDSR(depth=3, width=8, scale=scale, res_scale=0.1, **OFFICIAL)
    model.load_state_dict(edsr_official(released))
    with torch.no_grad():
        assert torch.allclose(model(image), expected, atol=1e-5)


def test_clcarwin_sphereface():
    """Written on its own keys, classifier left out."""
    depths, widths = (1, 2, 4, 1), (64, 128, 256, 512)
    layers, channels = {}, 3
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
        for index in range(1, 2 * depth + 2):
            layers[f"conv{stage}_{index}"] = (width, channels, 3, 3)
            layers[f"relu{stage}_{index}"] = (width,)
            channels = width
    layers["fc5"] = (512, 512 * 2 * 2)
    released = random_weights(layers)
    for stage, depth in enumerate(depths, start=1):
        for index in range(1, 2 * depth + 2):  # a swapped PReLU must show
            released[f"relu{stage}_{index}.weight"] += 0.01 * (10 * stage + index)
    released["fc6.weight"] = torch.zeros(512, 10574)

    def layer(x, name, stride=1):
        weight, bias = released[f"conv{name}.weight"], released[f"conv{name}.bias"]
        return F.prelu(F.conv2d(x, weight, bias, stride, 1), released[f"relu{name}.weight"])

    x = bgr = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for stage, depth in enumerate(depths, start=1):
        x = layer(x, f"{stage}_1", stride=2)
        for unit in range(depth):
            inner = layer(x, f"{stage}_{2 * unit + 2}")
            x = x + layer(inner, f"{stage}_{2 * unit + 3}")
    expected = F.linear(x.flatten(1), released["fc5.weight"], released["fc5.bias"])

    model = SphereFace(img_size=(32, 32))
    model.load_state_dict(sphereface_clcarwin(released))
    with torch.no_grad():
        assert torch.allclose(model(bgr), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "pattern"), [(vgg_face_dag, "conv{}_{}"), (vgg_face_prlz77, "conv_{}_{}")]
)
def test_vgg_face(adapter, pattern):
    """fc6, fc7 and fc8 before their ReLU, by a forward on the checkpoint's own keys."""
    layers, names, channels = {}, [], 3
    for block, width in enumerate((64, 128, 256, 512, 512), start=1):
        for index in range(1, (2, 2, 3, 3, 3)[block - 1] + 1):
            names.append(pattern.format(block, index))
            layers[names[-1]] = (width, channels, 3, 3)
            channels = width
        names.append("pool")
    layers |= {"fc6": (4096, 512), "fc7": (4096, 4096), "fc8": (2622, 4096)}
    released = random_weights(layers)

    x = image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for name in names:
        if name == "pool":
            x = F.max_pool2d(x, 2)
        else:
            weight, bias = released[f"{name}.weight"], released[f"{name}.bias"]
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
    x = x.flatten(1)
    adapted = adapter(released)
    for layer in ("fc6", "fc7", "fc8"):
        x = F.linear(x, released[f"{layer}.weight"], released[f"{layer}.bias"])
        model = meta(VGGFace, img_size=(32, 32), layer=layer)
        wanted = {key: adapted[key] for key in model.state_dict()}
        model.load_state_dict(wanted, assign=True)
        with torch.no_grad():
            ours = model.eval()(image)
        assert ours.min() < 0  # not what a ReLU leaves
        assert torch.allclose(ours, x, rtol=1e-4, atol=1e-4)
        x = F.relu(x)


def test_vgg_face_of_full_size():
    layers = {"fc6": (4096, 512 * 7 * 7), "fc7": (4096, 4096), "fc8": (2622, 4096)}
    model = meta(VGGFace, layer="fc8")
    assert {name: tuple(model.embedding.get_submodule(name).weight.shape) for name in layers} == (
        layers
    )
    assert parameters(model) == 145_002_878  # vgg_face_dag.pth: 580 MB of float32


# --- MobileFaceNet: the two real files -----------------------------------------------------------


def mobilefacenets(shared):
    """`(released state dict, our network with it)` of both published files."""
    for name, adapter, options in (
        ("arcface_mobilefacenet.pth", mobilefacenet_bubbliiiing, {}),
        (
            "foamliu_mobilefacenet.pt",
            mobilefacenet_foamliu,
            {"act": "relu6", "separable_stem": True, "embedding_bias": True},
        ),
    ):
        path = shared(f"weights/{name}")
        released = torch.load(path, map_location="cpu", weights_only=True)
        model = MobileFaceNet(**options).eval()
        model.load_state_dict(adapter(released))
        yield released, model


def _bubbliiiing(x, weights):
    """The network of bubbliiiing/arcface-pytorch on its own keys."""

    def conv(x, name, norm, stride=1):
        weight = weights[f"arcface.{name}.weight"]
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        padding = 1 if weight.shape[-1] == 3 else 0
        x = F.conv2d(x, weight, None, stride, padding, groups=groups)
        return _norm(x, weights, f"arcface.{norm}")

    def act(x, name):
        return F.prelu(x, weights[f"arcface.{name}.weight"])

    def block(x, name, stride=1):
        for inner, step in (("conv", 1), ("conv_dw", stride)):
            layer = f"{name}.{inner}"
            x = act(conv(x, f"{layer}.conv", f"{layer}.bn", step), f"{layer}.prelu")
        return conv(x, f"{name}.project.conv", f"{name}.project.bn")

    for name, stride in (("conv1", 2), ("conv2_dw", 1)):
        x = act(conv(x, f"{name}.conv", f"{name}.bn", stride), f"{name}.prelu")
    for opening, rest, repeats in (("23", "3", 4), ("34", "4", 6), ("45", "5", 2)):
        x = block(x, f"conv_{opening}", stride=2)
        for index in range(repeats):
            x = x + block(x, f"conv_{rest}.model.{index}")
    x = act(conv(x, "sep", "sep_bn"), "prelu")
    return conv(conv(x, "GDC_dw", "GDC_bn"), "features", "last_bn").flatten(1)


def _foamliu(x, weights):
    """The network of foamliu/MobileFaceNet on its own keys."""

    def conv(x, name, norm, stride=1):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        groups = weight.shape[0] if weight.shape[1] == 1 else 1
        padding = 1 if weight.shape[-1] == 3 else 0
        return _norm(F.conv2d(x, weight, bias, stride, padding, groups=groups), weights, norm)

    x = F.relu6(conv(x, "conv1.0", "conv1.1", 2))
    x = F.relu(conv(x, "dw_conv.depthwise", "dw_conv.bn1"))
    x = F.relu(conv(x, "dw_conv.pointwise", "dw_conv.bn2"))
    for index in range(15):
        name = f"features.{index}.conv"
        stride = 2 if index in (0, 5, 12) else 1
        y = F.relu6(conv(x, f"{name}.0.0", f"{name}.0.1"))
        y = F.relu6(conv(y, f"{name}.1.0", f"{name}.1.1", stride))
        y = conv(y, f"{name}.2", f"{name}.3")
        x = x + y if stride == 1 else y
    x = F.relu6(conv(x, "conv2.0", "conv2.1"))
    return conv(conv(x, "gdconv.depthwise", "gdconv.bn"), "conv3", "bn").flatten(1)


def _norm(x, weights, name):
    statistics = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
    return F.batch_norm(x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"])


def test_mobilefacenet_arithmetic(shared):
    image = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    references = (_bubbliiiing, _foamliu)
    with torch.no_grad():
        for (released, model), reference in zip(mobilefacenets(shared), references, strict=True):
            assert (model(image) - reference(image, released)).abs().max() < 1e-5


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
    for (_, model), (mean, std) in zip(mobilefacenets(shared), normalisations, strict=True):
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
        with torch.no_grad():
            features = F.normalize(model((faces - mean) / std))
        cosine = features @ features.T
        assert same[pairs].sum() == 2
        assert cosine[pairs & same].min() > cosine[pairs & ~same].max() + 0.2
