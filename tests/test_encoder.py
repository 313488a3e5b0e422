import copy
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import faces, tiny_fnet
from torch import nn

from idloss import FaceEncoder, IdentityPreservedLoss, create_fnet
from idloss.encoder import resolve_device
from idloss.frozen import FrozenPReLU
from idloss.geometry import (
    TEMPLATES,
    Template,
    align,
    convert_crop,
    get_template,
    register_template,
)
from idloss.registry import register_fnet
from idloss.resample import to_float


class Parent(nn.Module):
    """A training loop's module: something to train beside the frozen network."""

    def __init__(self, encoder):
        super().__init__()
        self.srnet = nn.Conv2d(3, 3, 3, padding=1)
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(self.srnet(x))


@pytest.fixture
def net():
    return tiny_fnet()


@pytest.fixture
def encoder(net):
    return FaceEncoder(net)


def test_normalises_as_the_fnet_asks_and_concatenates_the_mirror_image(net, encoder):
    x, both = faces(), FaceEncoder(net, flip=True)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(encoder(x), net.eval()((x - mean) / std))
    assert both.num_features == 2 * encoder.num_features
    torch.testing.assert_close(both(x), torch.cat((encoder(x), encoder(x.flip(-1))), dim=1))


@pytest.mark.parametrize(
    ("options", "told", "plain"),
    [
        ({}, lambda x: x, lambda x: F.interpolate(x, (28, 24), mode="bilinear")),
        ({"value_range": (-1, 1)}, lambda x: x * 2 - 1, lambda x: x),
        ({"value_range": (0, 255)}, lambda x: x * 255, lambda x: x),
        ({"value_range": (-0.5, 0.5)}, lambda x: x - 0.5, lambda x: x),
        ({"channel_order": "bgr"}, lambda x: x.flip(1), lambda x: x),
    ],
)
def test_what_images_are_told_to_be(net, encoder, options, told, plain):
    x = faces(size=(14, 12))
    got = FaceEncoder(net, **options)(told(x))
    torch.testing.assert_close(got, encoder(plain(x)), atol=1e-5, rtol=1e-5)


def test_stays_frozen_under_a_training_parent_and_in_no_state_dict(net, encoder):
    parent = Parent(encoder)
    own = {"srnet.weight", "srnet.bias"}
    assert set(parent.state_dict()) == {name for name, _ in parent.named_parameters()} == own
    parent.load_state_dict(parent.state_dict(), strict=True)
    before, net = copy.deepcopy(net.state_dict()), encoder.fnet
    parent.train().requires_grad_(True)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parent(faces()).square().sum().backward()
        optimizer.step()
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert parent.srnet.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_keep_the_network_frozen(encoder, duplicate):
    parent = Parent(encoder)
    twin = duplicate(parent).train()
    assert twin.encoder.fnet is not encoder.fnet
    assert not twin.encoder.fnet.training
    assert set(twin.state_dict()) == {"srnet.weight", "srnet.bias"}
    torch.testing.assert_close(twin(faces()), parent(faces()))


def test_follows_to(encoder):
    assert "fnet=tiny" in repr(encoder)
    assert "frozen" in repr(encoder)
    parent = Parent(encoder).double()
    assert encoder.fnet.conv.weight.dtype == torch.float64
    assert parent(faces().double()).dtype == torch.float64
    meta = Parent(FaceEncoder(tiny_fnet())).to("meta")
    assert meta.encoder.fnet.conv.weight.device.type == "meta"


def test_device_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device() == (found or torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'gpu' cannot be used .*this machine has"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="'cuda:99' cannot be used"):
        resolve_device("cuda:99")


INPUT = {"input_size": (3, 28, 24), "mean": (0.5,) * 3, "std": (0.5,) * 3}


class Linear(nn.Sequential):
    """An FNet in two layers; `gives` makes something else of its embeddings."""

    def __init__(self, gives=lambda features: features, width=16):
        super().__init__(nn.Flatten(), nn.Linear(3 * 28 * 24, width))
        self.gives = gives

    def forward(self, x):
        return self.gives(super().forward(x))


def test_fnet_of_a_parent_stays_frozen_and_the_callers_own():
    net = tiny_fnet().train()
    described = dict(vars(net))
    parent = nn.ModuleDict({"fnet": net, "encoder": FaceEncoder(net)})
    x = faces()
    expected = parent["encoder"](x)
    parent.train().requires_grad_(True)
    net(x)  # batch-norm statistics of the caller's network move
    with torch.no_grad():
        net.head.weight.zero_()
    parent["encoder"].fnet.train()
    assert torch.equal(parent["encoder"](x), expected)
    assert not any(p.requires_grad for p in parent["encoder"].fnet.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert vars(net).keys() == described.keys()
    assert net.pretrained_cfg is described["pretrained_cfg"]


class Stubborn(nn.Sequential):
    def train(self, mode=True):
        return super().train(True)


REACHES = {
    "the network": lambda net: net.train().requires_grad_(True),
    "a part of it": lambda net: net.norm.train(),
    "weights alone": lambda net: net.requires_grad_(True),
}


@pytest.mark.parametrize(
    ("reach", "compiled"),  # before torch 2.9 a graph does not see that weights want a gradient
    [*((reach, False) for reach in REACHES), ("the network", True), ("a part of it", True)],
)
def test_whoever_reaches_into_the_fnet_finds_it_frozen_again(encoder, reach, compiled):
    x = faces().requires_grad_()
    expected = encoder(x)
    before = copy.deepcopy(encoder.fnet.state_dict())
    torch._dynamo.reset()
    call = torch.compile(encoder, backend="eager", fullgraph=True) if compiled else encoder
    for _ in range(2):  # before the first graph and after it
        REACHES[reach](encoder.fnet)
        got = call(x)
        got.sum().backward()
        torch.testing.assert_close(got, expected)
    state = encoder.fnet.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    assert not any(p.requires_grad or p.grad is not None for p in encoder.fnet.parameters())


def test_an_fnet_whose_eval_trains_is_frozen():
    net = Stubborn(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 28 * 24, 4))
    encoder = FaceEncoder(net, **INPUT)
    assert torch.equal(encoder(faces()), encoder(faces()))
    assert not encoder.fnet[0].running_mean.any()


def test_fnet_without_a_copy_is_used_itself_with_a_warning():
    class Bound(Linear):
        def __deepcopy__(self, memo):
            raise TypeError("holds a session")

    net = Bound()
    with pytest.warns(UserWarning, match="Bound cannot be copied .*holds a session"):
        encoder = FaceEncoder(net, **INPUT)
    assert encoder.fnet is net
    net.train()
    encoder(faces())
    assert not net.training


@pytest.mark.parametrize("kind", ["traced", "exported", "exported module", "compiled"])
def test_networks_that_are_graphs_serve_as_fnets(kind):
    net, x = Linear().eval(), faces()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if kind == "traced":
            graph = torch.jit.trace(net, x)
        elif kind == "compiled":
            graph = torch.compile(net, backend="eager")
        else:
            graph = torch.export.export(net, (x,), dynamic_shapes=dynamic)
            graph = graph.module() if kind == "exported module" else graph
        encoder = IdentityPreservedLoss(graph, **INPUT).encoders[0]
        twin = copy.deepcopy(nn.Sequential(encoder)).train()
    x.requires_grad_()
    assert encoder.num_features == 16
    torch.testing.assert_close(twin(x), FaceEncoder(net, **INPUT)(x))
    twin(x).sum().backward()
    assert x.grad.any()


def test_to_empty_keeps_the_weights():
    encoder, x = FaceEncoder(tiny_fnet()), faces()
    expected = encoder(x)
    parent = Parent(encoder)
    parent.srnet.to("meta")
    parent.to_empty(device="cpu")
    assert torch.equal(encoder(x), expected)
    with pytest.raises(RuntimeError, match=r"meta device.*to_empty"):
        Parent(FaceEncoder(tiny_fnet())).to("meta").to_empty(device="cpu")
    with torch.device("meta"):
        parent = Parent(FaceEncoder("mobilefacenet", pretrained=False))
    parent.to_empty(device="cpu")  # made under the meta device, the FNet has weights all the same
    assert parent.encoder(faces(2, (112, 112))).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fnets_and_images_of_any_precision(net, encoder, dtype):
    x = faces()
    got = FaceEncoder(net.to(dtype))(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), encoder(x), atol=0.05, rtol=0.05)
    torch.testing.assert_close(encoder(x.half()), encoder(x), atol=1e-2, rtol=1e-2)
    encoder.to(torch.bfloat16)  # FSDP2 casts parameters and inputs and leaves buffers as they are
    assert encoder.scale.dtype == torch.float32
    assert encoder(x.bfloat16()).dtype == torch.bfloat16


def test_default_precision_of_the_process():
    torch.set_default_dtype(torch.float64)
    try:
        assert FaceEncoder("mobilefacenet", pretrained=False)(faces().float()).shape == (4, 128)
    finally:
        torch.set_default_dtype(torch.float32)


def test_width_is_seen():
    net = Linear(width=24)
    assert FaceEncoder(net, **INPUT).num_features == 24
    vgg = timm.create_model("vgg11", num_classes=0)  # declares its trunk's 512
    assert FaceEncoder(vgg).num_features == 4096
    net.num_features = 512
    with pytest.raises(ValueError, match=r"gave \[4, 24\] for 4 images.*num_features is 512"):
        FaceEncoder(net, **INPUT)(faces())
    net = create_fnet("mobilefacenet", num_classes=7)
    with pytest.raises(ValueError, match=r"gave \[4, 7\] for 4 images.*num_features is 128"):
        FaceEncoder(net)(faces())


@pytest.mark.parametrize("name", ["mobilefacenet", "timm/vit_tiny_patch16_224"])
def test_img_size_reaches_the_encoder(name):
    encoder = FaceEncoder(name, pretrained=False, img_size=(64, 64))
    assert encoder.input_size == (64, 64)
    assert encoder(faces(2)).ndim == 2


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (lambda f: (f, f.norm(dim=1)), r"gave \(\[2, 16\], \[2\]\)"),
        (lambda f: {"embedding": f}, r"gave \{embedding: \[2, 16\]\}"),
        (lambda f: f[..., None, None], r"gave \[2, 16, 1, 1\]"),
        (lambda f: f @ f, "cannot take images"),
    ],
)
def test_names_what_is_no_embedding(gives, says):
    with pytest.raises(ValueError, match=says):
        FaceEncoder(Linear(gives), **INPUT)
    net = Linear(gives)
    net.num_features = 16
    with pytest.raises((ValueError, RuntimeError), match=says if "gave" in says else "shapes"):
        FaceEncoder(net, **INPUT)(faces(2))


GREY = nn.Sequential(nn.Flatten(), nn.Linear(28 * 24, 4))
GREYS = {"input_size": (1, 28, 24), "mean": (0.5,), "std": (0.5,)}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda f: f(faces().byte()), TypeError, "to_float"),
        (lambda f: f(faces().long()), TypeError, "int64"),
        (lambda f: f(faces()[0]), ValueError, r"\[B, 3, H, W\]"),
        (lambda f: f(faces(2)[:, :1]), ValueError, r"\[2, 1, 28, 24\]"),
        (lambda f: f([[0.0]]), TypeError, "list"),
        (lambda f: FaceEncoder(f.fnet, value_range=(1, 0)), ValueError, "value_range"),
        (lambda f: FaceEncoder(f.fnet, channel_order="gbr"), ValueError, "channel_order"),
        (lambda f: FaceEncoder(f.fnet, crop="arcfase"), ValueError, "arcface"),
        (lambda f: FaceEncoder(GREY, **GREYS), ValueError, "takes 1 channels and faces are RGB"),
        *(
            (
                lambda f, c=changed: FaceEncoder(Linear(), **INPUT | c),
                ValueError,
                "must be 3 .* as images",
            )
            for changed in (
                {"mean": (127.5,) * 3, "std": (128.0,) * 3},
                {"mean": (float("nan"),) * 3},
                {"mean": (0.5,)},
                {"std": (0.0,) * 3},
                {"std": (255.0,) * 3},
                {"std": (-0.5,) * 3},
            )
        ),
    ],
)
def test_names_what_is_bad(encoder, call, error, says):
    with pytest.raises(error, match=says):
        call(encoder)


def test_every_pixel_has_a_say_when_images_shrink(encoder):
    x = faces(1, (224, 192)).requires_grad_()
    encoder(x).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.95  # 0.11 without antialiasing
    small = F.interpolate(x, (28, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(x), encoder(small))


MINE = Template("mine", (64, 64), tuple((x / 2 + 8, y / 2 + 4) for x, y in [
    (30.3, 51.7), (65.5, 51.5), (48.0, 71.7), (33.5, 92.4), (62.7, 92.2)
]))  # fmt: skip


def test_own_templates_as_crop_of_images_and_of_fnets(monkeypatch):
    monkeypatch.setitem(TEMPLATES, "mine", MINE)  # and away with it afterwards
    net = tiny_fnet(size=(112, 96))
    x = faces(2, (64, 64))
    expected = FaceEncoder(net)(convert_crop(x, MINE, "sphereface"))
    assert expected.shape == (2, 16)
    torch.testing.assert_close(FaceEncoder(net, crop=MINE)(x), expected, atol=1e-5, rtol=1e-4)
    assert FaceEncoder(net, crop=register_template(MINE)).crop is FaceEncoder(net, crop="mine").crop
    with pytest.raises(ValueError, match="another template 'mine'"):
        register_template(Template("mine", (80, 80), MINE.points))
    net.crop = MINE
    net.pretrained_cfg["input_size"] = (3, 64, 64)
    small = faces(2, (112, 96))
    got = FaceEncoder(net, crop="sphereface")(small)
    torch.testing.assert_close(got, FaceEncoder(net)(convert_crop(small, "sphereface", MINE)))

    @register_fnet(crop=MINE)
    def core_test_fnet(pretrained=False, **kwargs):
        return net

    assert get_template(create_fnet("core_test_fnet").crop) == MINE


@pytest.mark.parametrize("scale", [1, 255])
def test_range_is_watched_at_later_calls_too(encoder, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(faces())
        encoder((faces() * 20 - 10).requires_grad_())  # a fresh network's
        if scale == 1:
            encoder(faces())
            return
    with pytest.warns(UserWarning, match=r"images spans .* value_range is \(0, 1\)"):
        encoder(faces() * scale)


@pytest.mark.parametrize(
    ("crop", "backend"), [(None, "aot_eager"), ("arcface", "aot_eager"), ("facenet", "inductor")]
)
def test_compiles_for_any_size(net, crop, backend):
    """A crop conversion with free sizes once took inductor a quarter of an hour."""
    net.pretrained_cfg["input_size"] = (3, 112, 96)
    encoder = FaceEncoder(net, crop=crop)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, dynamic=True, fullgraph=True, backend=backend)
    for batch, side in ((2, 56), (3, 112)):
        x = faces(batch, (side, side))
        torch.testing.assert_close(compiled(x), encoder(x), atol=1e-4, rtol=1e-4)


def test_prelus_are_quick_where_a_gradient_is_wanted():
    net = nn.Sequential(nn.PReLU(3), nn.Flatten(), nn.Linear(3 * 28 * 24, 4))
    encoder, x = FaceEncoder(net, **INPUT), faces()
    straight = encoder(x)
    assert type(encoder.fnet[0]) is nn.PReLU
    assert torch.equal(encoder(x.requires_grad_()), straight)
    assert type(encoder.fnet[0]) is FrozenPReLU
    assert type(net[0]) is nn.PReLU


ALIGNED, OTHERS = ("arcface", "sphereface", "ffhq", "psp"), ("ffhq", "facenet", "vggface", "psp")


@pytest.mark.parametrize(
    ("crop", "said"), [*((crop, crop) for crop in ALIGNED), *((crop, None) for crop in OTHERS)]
)
def test_aligned_faces_raise_no_doubt_and_others_do(golden, shared, crop, said):
    """Real faces and a real FNet."""
    photos = to_float(torch.from_numpy(golden["raw_bgr"]).permute(0, 3, 1, 2).flip(1))
    encoder = FaceEncoder(f"local-dir:{shared('weights/edgeface_xxs')}", crop=said)
    doubt = encoder.alignment_complaint(align(photos, torch.from_numpy(golden["landmarks"]), crop))
    assert doubt is None if said else "does not look aligned to 'arcface'" in doubt


def test_networks_that_cannot_tell_faces_apart_say_nothing_of_alignment(golden):
    """Random weights: re-crops keep 0.82, and different people 0.79."""
    photos = to_float(torch.from_numpy(golden["raw_bgr"]).permute(0, 3, 1, 2).flip(1))
    torch.manual_seed(0)
    encoder = FaceEncoder("mobilefacenet_relu6", pretrained=False)
    crops = align(photos, torch.from_numpy(golden["landmarks"]), "arcface")
    assert encoder.alignment_complaint(crops) is None


def test_crops_that_lack_what_the_fnet_wants_are_told():
    """The rest was a repeated border, without a word."""
    wide = tiny_fnet(size=(64, 64))
    wide.crop = "ffhq"
    with pytest.warns(UserWarning, match=r"takes 'ffhq' crops, of which crop=arcface holds 56%"):
        FaceEncoder(wide, crop="arcface")
    for net, crop in ((wide, "psp"), (wide, "ffhq"), (wide, None), (tiny_fnet(), "vggface")):
        FaceEncoder(net, crop=crop)
