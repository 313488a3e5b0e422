import itertools
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import faces, tiny_fnet
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from idloss import FaceEncoder, HallucinationLoss, IdentityPreservedLoss
from idloss.geometry import align
from idloss.losses import DISTANCES, register_distance, register_image_loss
from idloss.resample import resize, to_float


@pytest.fixture
def net():
    return tiny_fnet()


def loss_of(net, **options):
    return IdentityPreservedLoss(net, **options)


def sr_and_hr(batch=4):
    return faces(batch, (14, 12), seed=1).requires_grad_(), faces(batch, seed=2)


def test_equations_2_and_3(net):
    sr, hr = sr_and_hr()
    encoder = FaceEncoder(net)
    a, b = (encoder(x).detach().double().numpy() for x in (sr, hr))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(loss_of(net)(sr, hr).item(), (1 - cosine).mean(), rtol=1e-5)


def test_gradient_reaches_sr_alone_and_no_random_number_is_drawn(net):
    sr, hr = sr_and_hr()
    hr.requires_grad_()
    loss, state = loss_of(net), torch.get_rng_state()
    loss.to("cpu")(sr, hr).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert sr.grad.abs().sum() > 0
    assert hr.grad is None
    assert all(p.grad is None for p in net.parameters())


def test_gradient_is_the_true_one(net):
    loss = loss_of(net).double()
    sr, hr = (x.detach().double() for x in sr_and_hr(2))
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), sr.requires_grad_(), fast_mode=True)


def test_target_features_save_the_hr_forward(net):
    sr, hr = sr_and_hr()
    whole = HallucinationLoss(net)
    loss = whole.identity
    features = loss.embed(hr)
    expected = loss(sr, hr), whole(sr, hr)[0]
    calls = loss.encoders[0].fnet.calls
    calls.clear()
    assert torch.equal(loss(sr, target_features=features), expected[0])
    assert torch.equal(whole(sr, hr, target_features=features)[0], expected[1])
    assert list(calls) == [4, 4]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduction(net, reduction, weighted):
    sr, hr = sr_and_hr()
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0] if weighted else [1.0] * 4)
    each = weight * loss_of(net, reduction="none")(sr, hr)
    assert each.shape == (4,)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / weight.sum()}[reduction]
    weight = weight if weighted else None
    loss = loss_of(net, reduction=reduction)
    torch.testing.assert_close(loss(sr, hr, weight=weight), expected)
    assert (loss(sr, hr, weight=torch.zeros(4)) == 0).all()  # and not NaN


def test_mean_does_not_depend_on_the_number_of_features():
    """A mean over the feature axis would make the loss smaller by that axis."""
    sr, hr = sr_and_hr()
    single = loss_of(tiny_fnet(num_features=16), reduction="none")(sr, hr)
    repeated, small = tiny_fnet(num_features=64), tiny_fnet(num_features=16).state_dict()
    for name in ("head.weight", "head.bias"):
        small[name] = torch.cat([small[name]] * 4)
    repeated.load_state_dict(small)
    torch.testing.assert_close(loss_of(repeated, reduction="none")(sr, hr), single)


def test_ensemble_is_the_weighted_mean_and_holds_nothing_to_save_or_train():
    nets = [tiny_fnet(seed=1), tiny_fnet(seed=2, num_features=8)]
    sr, hr = sr_and_hr()
    one, two = (loss_of(net)(sr, hr) for net in nets)
    torch.testing.assert_close(loss_of(nets)(sr, hr), (one + two) / 2)
    ensemble = loss_of(dict(zip(nets, (3.0, 1.0), strict=True)))
    torch.testing.assert_close(ensemble(sr, hr), 0.75 * one + 0.25 * two)
    features = ensemble.embed(hr)
    assert features.shape == (4, 24)
    torch.testing.assert_close(ensemble(sr, target_features=features), ensemble(sr, hr))
    assert not any(encoder.fnet.training for encoder in ensemble.train().encoders)
    assert not [*ensemble.state_dict(), *ensemble.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_embeddings_in_half_precision_are_not_nan(net, dtype):
    loss = loss_of(net).to(dtype)
    sr, hr = (x.detach().to(dtype) for x in sr_and_hr())
    loss(sr.requires_grad_(), hr)  # a network of zeros gives no gradient, and is refused at first
    for parameter in loss.encoders[0].fnet.head.parameters():
        parameter.zero_()
    value = loss(sr, hr)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == 1
    assert sr.grad.isfinite().all()


def test_compiles_to_one_graph(net):
    sr, hr = sr_and_hr()
    loss = loss_of(net)
    expected = loss(sr, hr)
    expected.backward()
    grad = sr.grad.clone()
    sr.grad = None
    compiled = torch.compile(loss, fullgraph=True)
    value = compiled(sr, hr)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(sr.grad, grad)
    fresh = torch._dynamo.explain(loss_of(net))(sr, hr)
    assert fresh.graph_break_count == 0


def test_exports(net):
    sr, hr = (x.detach() for x in sr_and_hr())
    loss = loss_of(net)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(loss, (sr, hr), dynamic_shapes=({0: batch}, {0: batch}))
    more = (faces(7, (14, 12), seed=4), faces(7, seed=5))
    torch.testing.assert_close(program.module()(*more), loss.eval()(*more))


BYTES = torch.zeros(4, 3, 28, 24, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f, s, h: f(s, None), "exactly one"),
        (lambda f, s, h: f(s, h, target_features=torch.zeros(4, 16)), "exactly one"),
        (lambda f, s, h: f(s[:0], h[:0]), "empty batch"),
        (lambda f, s, h: f(s, h[:2]), "hr holds 2 faces and sr 4"),
        (lambda f, s, h: f(s[0], h), "sr must be"),
        (lambda f, s, h: f(s, h[0]), "hr must be"),
        (lambda f, s, h: f(s, BYTES), "hr must be floating point"),
        (lambda f, s, h: f(s, target_features=torch.zeros(4, 9)), r"\[4, 16\]"),
        (lambda f, s, h: f(s, h, weight=torch.ones(3)), r"weight must be \[4\]"),
        (lambda f, s, h: HallucinationLoss(f)(s, h[:3]), "hr holds 3 faces and sr 4"),
        (lambda f, s, h: HallucinationLoss(None, weight=-1), "negative"),
        (lambda f, s, h: HallucinationLoss(None, weight=math.nan), "finite"),
        (lambda f, s, h: HallucinationLoss(None, value_range=(1, 0)), "value_range must be"),
        (lambda f, s, h: HallucinationLoss(None, value_range=(0, math.nan)), "value_range must be"),
        (lambda f, s, h: HallucinationLoss(f, flip=True), "flip"),
        (lambda f, s, h: HallucinationLoss(f, value_range=(-1, 1)), "value_range"),
        (lambda f, s, h: HallucinationLoss(None, image_loss="l11"), "Did you mean 'l1'"),
        (lambda f, s, h: IdentityPreservedLoss(distance="cosin"), "cosine"),
        (lambda f, s, h: IdentityPreservedLoss(reduction="avg"), "reduction"),
        (lambda f, s, h: IdentityPreservedLoss([]), "ensemble"),
        (lambda f, s, h: IdentityPreservedLoss({tiny_fnet(): 0.0}), "above zero"),
        (lambda f, s, h: IdentityPreservedLoss({tiny_fnet(): math.inf}), "above zero"),
        (lambda f, s, h: register_distance("cosine", lambda a, b: a), "another distance 'cosine'"),
    ],
)
def test_names_what_is_bad(net, call, says):
    with pytest.raises(TypeError if "floating" in says else ValueError, match=says):
        call(loss_of(net), *sr_and_hr())


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda sr, hr: (sr, hr * 255), {}, "hr spans .* value_range"),
        (lambda sr, hr: (sr * 2 - 1, hr * 2 - 1), {}, "value_range"),
        (lambda sr, hr: (sr, hr), {"value_range": (-1, 1)}, r"look like \[0, 1\]"),
        (lambda sr, hr: (sr, hr), {"value_range": (0, 255)}, r"look like \[0, 1\]"),
        (lambda sr, hr: (sr, hr * float("nan")), {}, "NaN"),
        (lambda sr, hr: (sr.detach(), hr), {}, "gradient"),
        (lambda sr, hr: (sr, faces(size=(28, 28))), {}, "stretched"),
    ],
)
def test_warns_once_of_what_is_surely_not_meant(net, change, options, says):
    loss = loss_of(net, **options)
    sr, hr = change(*sr_and_hr())
    with pytest.warns(UserWarning, match=says):
        assert loss(sr, hr).isnan() == ("NaN" in says)  # passed on, not hidden
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(sr, hr)


def test_ordinary_input_warns_of_nothing(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net)(*sr_and_hr())
        with torch.no_grad():
            loss_of(net).eval()(*sr_and_hr())


class TestHallucinationLoss:
    def test_equation_4_and_its_parts(self, net):
        sr, hr = sr_and_hr()
        total, parts = HallucinationLoss(net, weight=0.3)(sr, hr)
        assert set(parts) == {"image", "identity"}
        torch.testing.assert_close(parts["identity"], loss_of(net)(sr, hr).detach())
        torch.testing.assert_close(total, parts["image"] + 0.3 * parts["identity"])
        assert total.requires_grad
        assert not parts["image"].requires_grad

    def test_image_loss_is_on_the_papers_scale(self, net):
        sr, hr = sr_and_hr()
        levels = (hr * 255).round()  # photos are 8-bit, and so is the released code's MR
        hr = levels / 255
        mr = F.interpolate(levels, (14, 12), mode="bicubic").round().clamp(0, 255) / 127.5 - 1
        expected = (sr * 2 - 1 - mr).abs().mean()
        for low, high in [(0, 1), (-1, 1), (0, 255)]:
            loss = HallucinationLoss(None, value_range=(low, high))
            scaled = [x * (high - low) + low for x in (sr, hr)]
            total, parts = loss(*scaled)
            torch.testing.assert_close(total, expected, atol=1e-5, rtol=0)
            assert set(parts) == {"image"}

    def test_lambda_zero_builds_no_fnet(self):
        loss = HallucinationLoss("no_such_fnet", weight=0)
        assert loss.identity is None

    def test_own_image_loss(self):
        sr, hr = sr_and_hr()
        loss = HallucinationLoss(None, image_loss=F.mse_loss)
        total, _ = loss(sr, hr)
        mr = loss.medium_resolution(hr, (14, 12))
        torch.testing.assert_close(total, 4 * F.mse_loss(sr, mr))


CUTS = {
    "no_grad": lambda f: torch.no_grad()(f),
    "detach": lambda f: lambda *x: f(*(one.detach() for one in x)),
    "zero": lambda f: lambda *x: f(*x) * 0,
    "numpy": lambda f: lambda x: f(torch.from_numpy(x.detach().numpy())),
    "rounding": lambda f: lambda x: f((x * 100).round() / 100),
}


WAYS = {
    "in training": lambda loss: loss,
    "in eval mode": lambda loss: loss.eval(),
    "in an ensemble": lambda loss: loss_of([tiny_fnet(), *(one.fnet for one in loss.encoders)]),
    "encoder alone": lambda loss: lambda sr, hr: loss.encoders[0](sr),
    "compiled": lambda loss: torch.compile(loss, backend="eager", fullgraph=True),
    "differentiated": lambda loss: lambda sr, hr: torch.func.grad(loss)(sr, hr),
    "mapped, then differentiated": lambda loss: (
        lambda sr, hr: torch.func.vmap(torch.func.grad(loss))(sr[:, None], hr[:, None])
    ),
    "differentiated, then mapped": lambda loss: (
        lambda sr, hr: torch.func.grad(
            lambda x: torch.func.vmap(loss)(x[:, None], hr[:, None]).sum()
        )(sr)
    ),
    "forward": lambda loss: lambda sr, hr: torch.func.jvp(lambda x: loss(x, hr), (sr,), (sr,)),
    "jacobian": lambda loss: lambda sr, hr: torch.func.jacfwd(lambda x: loss(x, hr))(sr),
}


TRANSFORMS = list(WAYS)[5:]  # where torch itself refuses numpy


@pytest.mark.parametrize(
    ("how", "way"),
    [
        (how, way)
        for how, way in itertools.product(CUTS, WAYS)
        if how != "numpy" or way not in TRANSFORMS
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo does not know", "ignore:Converting a tensor")
def test_refuses_an_fnet_that_cuts_the_gradient(net, how, way):
    loss = loss_of(net)
    fnet = loss.encoders[0].fnet
    fnet.forward = CUTS[how](partial(type(fnet).forward, fnet))
    with torch.no_grad():
        loss.eval()(*sr_and_hr())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="FNet TinyFNet cuts the gradient"):
        WAYS[way](loss.train())(*sr_and_hr())


@pytest.mark.parametrize("way", TRANSFORMS)
def test_transforms_of_a_sound_fnet_are_not_refused(net, way):
    WAYS[way](loss_of(net))(*sr_and_hr())


@pytest.mark.parametrize("what", ["distance", "image_loss"])
def test_refuses_functions_that_cut_the_gradient(net, what):
    function = {"distance": DISTANCES["cosine"], "image_loss": F.l1_loss}[what]
    for how in ("no_grad", "detach", "zero"):
        loss = HallucinationLoss(net, **{what: CUTS[how](function)}).eval()
        with pytest.raises(RuntimeError, match=f"the {what.replace('_', ' ')} cuts the gradient"):
            loss(*sr_and_hr())
        loss = HallucinationLoss(net, **{what: CUTS[how](function)})
        with pytest.raises(RuntimeError, match=f"the {what.replace('_', ' ')} cuts the gradient"):
            torch.func.grad(lambda sr, hr, loss=loss: loss(sr, hr)[0])(*sr_and_hr())


def test_a_face_of_weight_zero_may_hold_anything(net):
    sr, hr = faces(4, (14, 12), seed=1), faces(4, seed=2)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = loss_of(net)
    expected = loss(sr.requires_grad_(), hr, weight=weight)
    expected.backward()
    bad = sr.detach().clone()
    bad[1], hr[1] = float("nan"), float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        value = loss_of(net)(bad.requires_grad_(), hr, weight=weight)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(bad.grad, sr.grad)


def test_range_is_judged_by_what_is_settled(net):
    """A fresh network overshoots; one that has been trained for a while does not."""
    sr, hr = sr_and_hr()
    wide = (sr.detach() * 20 - 10).requires_grad_()
    loss = loss_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(63):
            loss(wide, hr)
    with pytest.warns(UserWarning, match="sr spans"):
        loss(wide, hr)
    with pytest.warns(UserWarning, match="hr spans"):
        HallucinationLoss(None)(sr, hr * 255)
    stored = HallucinationLoss(net)
    features = stored.identity.embed(hr)
    with pytest.warns(UserWarning, match="hr spans"):
        stored(sr, hr * 255, target_features=features)


@pytest.mark.parametrize(("crop", "aligned"), [("arcface", True), ("facenet", False)])
def test_hr_that_does_not_look_aligned_is_named(golden, shared, crop, aligned):
    """Crops of FaceNet's template, said to be ArcFace's."""
    photos = to_float(torch.from_numpy(golden["raw_bgr"]).permute(0, 3, 1, 2).flip(1))
    hr = resize(align(photos, torch.from_numpy(golden["landmarks"]), crop), (112, 112))
    loss = loss_of(f"local-dir:{shared('weights/edgeface_xxs')}")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(resize(hr, (56, 56)).requires_grad_(), hr)
    doubts = [one for one in seen if "hr does not look aligned to 'arcface'" in str(one.message)]
    assert len(doubts) == (0 if aligned else 1)


@pytest.fixture
def prelu_loss():
    net = nn.Sequential(nn.PReLU(3), nn.Conv2d(3, 4, 3, stride=2), nn.PReLU(4), nn.Flatten())
    shape = {"input_size": (3, 28, 24), "mean": (0.4,) * 3, "std": (0.5,) * 3}
    return IdentityPreservedLoss(net, reduction="none", **shape)


def test_functional_transforms(prelu_loss):
    sr, hr = faces(3, (14, 12), seed=1), faces(3, seed=2)
    total = lambda x: prelu_loss(x, hr).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(total(sr.requires_grad_()), sr)
    sr = sr.detach()
    torch.testing.assert_close(torch.func.grad(total)(sr), expected)
    torch.testing.assert_close(torch.func.jacrev(total)(sr), expected)
    tangent = faces(3, (14, 12), seed=3)
    _, along = torch.func.jvp(total, (sr,), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    mapped = torch.func.vmap(prelu_loss)(sr[:, None], hr[:, None])
    torch.testing.assert_close(mapped[:, 0], prelu_loss(sr, hr))
    each = torch.func.vmap(torch.func.grad(lambda s, h: prelu_loss(s, h).sum()))
    torch.testing.assert_close(each(sr[:, None], hr[:, None])[:, 0], expected)


@pytest.mark.parametrize("kind", ["make_fx", "symbolic", "trace", "fake", "meta"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_first_call_inside_a_tracer(net, kind):
    sr, hr = (x.detach() for x in sr_and_hr())
    loss, expected = loss_of(net), loss_of(net)(sr, hr)
    if kind in ("make_fx", "symbolic"):
        mode = "real" if kind == "make_fx" else kind
        got = make_fx(loss, tracing_mode=mode, _allow_non_fake_inputs=True)(sr, hr)(sr, hr)
    elif kind == "trace":
        got = torch.jit.trace(loss.eval(), (sr, hr))(sr, hr)
    elif kind == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert loss(torch.rand(4, 3, 14, 12), torch.rand(4, 3, 28, 24)).shape == ()
        got = loss(sr, hr)
    else:
        assert loss.to("meta")(sr.to("meta"), hr.to("meta")).is_meta
        return
    torch.testing.assert_close(got, expected)


def pairs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 6, 32)).astype(np.float32)


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


REFERENCE = {
    "cosine": lambda a, b: 1 - cosines(a, b),
    "euclidean": lambda a, b: 2 - 2 * cosines(a, b),
    "angular": lambda a, b: np.arccos(cosines(a, b)) / np.pi,
    "l1": lambda a, b: np.abs(a - b).sum(1),
}


@pytest.mark.parametrize("name", DISTANCES)
def test_formula(net, name):
    a, b = pairs()
    ours = DISTANCES[name](torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(ours.numpy(), REFERENCE[name](a, b), rtol=1e-5, atol=1e-6)
    same = DISTANCES[name](torch.from_numpy(a), torch.from_numpy(a))
    torch.testing.assert_close(same, torch.zeros(6), atol=1e-6, rtol=0)
    by_name, by_function = (loss_of(net, distance=d)(*sr_and_hr()) for d in (name, DISTANCES[name]))
    assert torch.equal(by_name, by_function)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("case", ["equal", "opposite", "zero", "tiny"])
def test_gradient_is_finite_where_formulas_break(name, case):
    b = torch.from_numpy(pairs()[0])
    a = {"equal": b, "opposite": -b, "zero": b * 0, "tiny": b * 1e-20}[case]
    a = a.clone().requires_grad_()
    DISTANCES[name](a, b).sum().backward()
    assert a.grad.isfinite().all()


def test_own_distances_and_image_losses_by_name(net):
    sr, hr = sr_and_hr()
    register_distance("test_squared", lambda a, b: (a - b).square().sum(1))
    assert loss_of(net, distance="test_squared")(sr, hr) > 0
    register_image_loss("test_quarter", lambda a, b: (a - b).abs().mean() / 4)
    quarter, _ = HallucinationLoss(None, image_loss="test_quarter")(sr, hr)
    torch.testing.assert_close(4 * quarter, HallucinationLoss(None)(sr, hr)[0])
