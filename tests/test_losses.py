import copy
import io
import warnings

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


@pytest.mark.parametrize("distance", DISTANCES)
def test_distance_by_name_and_as_callable(net, distance):
    sr, hr = sr_and_hr()
    by_name = loss_of(net, distance=distance)(sr, hr)
    by_function = loss_of(net, distance=DISTANCES[distance])(sr, hr)
    assert torch.equal(by_name, by_function)


def test_gradient_reaches_sr_alone(net):
    sr, hr = sr_and_hr()
    hr.requires_grad_()
    loss_of(net)(sr, hr).backward()
    assert sr.grad.abs().sum() > 0
    assert hr.grad is None
    assert all(p.grad is None for p in net.parameters())


def test_gradient_is_the_true_one(net):
    loss = loss_of(net).double()
    sr, hr = (x.detach().double() for x in sr_and_hr(2))
    assert torch.autograd.gradcheck(lambda x: loss(x, hr), sr.requires_grad_(), fast_mode=True)


def test_target_features_save_the_hr_forward(net):
    sr, hr = sr_and_hr()
    loss = loss_of(net)
    expected = loss(sr, hr)
    features = loss.embed(hr)
    loss.encoders[0].fnet.calls.clear()
    assert torch.equal(loss(sr, target_features=features), expected)
    assert list(loss.encoders[0].fnet.calls) == [4]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduction(net, reduction, weighted):
    sr, hr = sr_and_hr()
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0]) if weighted else None
    each = loss_of(net, reduction="none")(sr, hr)
    assert each.shape == (4,)
    total = each * weight if weighted else each
    expected = {
        "none": total,
        "sum": total.sum(),
        "mean": total.sum() / (weight.sum() if weighted else 4),
    }[reduction]
    torch.testing.assert_close(loss_of(net, reduction=reduction)(sr, hr, weight=weight), expected)


def test_all_weights_zero_is_zero_not_nan(net):
    sr, hr = sr_and_hr()
    assert loss_of(net)(sr, hr, weight=torch.zeros(4)).item() == 0


def test_mean_does_not_depend_on_the_number_of_features():
    """A mean over the feature axis would make the loss smaller by that axis."""
    sr, hr = sr_and_hr()
    single = loss_of(tiny_fnet(num_features=16), reduction="none")(sr, hr)
    repeated = tiny_fnet(num_features=64)
    with torch.no_grad():
        small = tiny_fnet(num_features=16).head
        repeated.load_state_dict(
            tiny_fnet(num_features=16).state_dict()
            | {"head.weight": small.weight.repeat(4, 1), "head.bias": small.bias.repeat(4)}
        )
    torch.testing.assert_close(loss_of(repeated, reduction="none")(sr, hr), single)


def test_ensemble_is_the_weighted_mean():
    nets = [tiny_fnet(seed=1), tiny_fnet(seed=2, num_features=8)]
    sr, hr = sr_and_hr()
    one, two = (loss_of(net)(sr, hr) for net in nets)
    torch.testing.assert_close(loss_of(nets)(sr, hr), (one + two) / 2)
    ensemble = loss_of(dict(zip(nets, (3.0, 1.0), strict=True)))
    torch.testing.assert_close(ensemble(sr, hr), 0.75 * one + 0.25 * two)
    features = ensemble.embed(hr)
    assert features.shape == (4, 24)
    torch.testing.assert_close(ensemble(sr, target_features=features), ensemble(sr, hr))


def test_holds_nothing_to_save_or_train(net):
    loss = loss_of([net, tiny_fnet(seed=3)]).train()
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert not any(encoder.fnet.training for encoder in loss.encoders)


def test_old_checkpoints_of_a_parent_load_strictly(net):
    class Trainer(nn.Module):
        def __init__(self, with_loss):
            super().__init__()
            self.srnet = nn.Conv2d(3, 3, 1)
            if with_loss:
                self.loss = loss_of(net)

    file = io.BytesIO()
    torch.save(Trainer(False).state_dict(), file)
    file.seek(0)
    Trainer(True).load_state_dict(torch.load(file, weights_only=True), strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_embeddings_in_half_precision_are_not_nan(net, dtype):
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    loss = loss_of(net).to(dtype).eval()  # a network of zeros gives no gradient, and is refused
    sr, hr = (x.detach().to(dtype) for x in sr_and_hr())
    value = loss(sr.requires_grad_(), hr)
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


def test_deepcopy_of_a_module_that_owns_the_loss(net):
    owner = nn.ModuleDict({"srnet": nn.Conv2d(3, 3, 1), "loss": loss_of(net)})
    twin = copy.deepcopy(owner).train()
    sr, hr = sr_and_hr()
    assert torch.equal(twin["loss"](sr, hr), owner["loss"](sr, hr))
    assert twin["loss"].encoders[0].fnet is not net


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s, h: ((s, None), {}), ValueError, "exactly one"),
        (lambda s, h: ((s, h), {"target_features": torch.zeros(4, 16)}), ValueError, "exactly one"),
        (lambda s, h: ((s[:0], h[:0]), {}), ValueError, "empty batch"),
        (lambda s, h: ((s, h[:2]), {}), ValueError, "hr holds 2 faces and sr 4"),
        (lambda s, h: ((s[0], h), {}), ValueError, "sr must be"),
        (lambda s, h: ((s, h[0]), {}), ValueError, "hr must be"),
        (lambda s, h: ((s, (h * 255).byte()), {}), TypeError, "hr must be floating point"),
        (lambda s, h: ((s,), {"target_features": torch.zeros(4, 9)}), ValueError, r"\[4, 16\]"),
        (lambda s, h: ((s, h), {"weight": torch.ones(3)}), ValueError, r"weight must be \[4\]"),
    ],
)
def test_names_bad_input(net, call, error, says):
    args, options = call(*sr_and_hr())
    with pytest.raises(error, match=says):
        loss_of(net)(*args, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distance": "cosin"}, "cosine"),
        ({"reduction": "avg"}, "reduction"),
        ({"fnet": []}, "ensemble"),
        ({"fnet": {tiny_fnet(): 0.0}}, "above zero"),
    ],
)
def test_names_bad_options(net, options, says):
    with pytest.raises(ValueError, match=says):
        IdentityPreservedLoss(**({"fnet": net} | options))


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
        loss(sr, hr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(sr, hr)


def test_ordinary_input_warns_of_nothing(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(net)(*sr_and_hr())
        with torch.no_grad():
            loss_of(net).eval()(*sr_and_hr())


def test_nan_is_passed_on_not_hidden(net):
    sr, hr = sr_and_hr()
    with pytest.warns(UserWarning, match="NaN"):
        assert loss_of(net)(sr * float("nan"), hr).isnan()


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

    def test_target_features(self, net):
        sr, hr = sr_and_hr()
        loss = HallucinationLoss(net)
        features = loss.identity.embed(hr)
        loss(sr, hr)  # the first call tries the gradient
        calls = loss.identity.encoders[0].fnet.calls
        calls.clear()
        total, _ = loss(sr, hr, target_features=features)
        assert list(calls) == [4]
        assert torch.equal(total, loss(sr, hr)[0])

    def test_own_image_loss(self):
        sr, hr = sr_and_hr()
        loss = HallucinationLoss(None, image_loss=F.mse_loss)
        total, _ = loss(sr, hr)
        mr = loss.medium_resolution(hr, (14, 12))
        torch.testing.assert_close(total, 4 * F.mse_loss(sr, mr))

    @pytest.mark.parametrize(
        ("arguments", "options", "says"),
        [
            ((None,), {"weight": -1}, "negative"),
            ((IdentityPreservedLoss(tiny_fnet()),), {"flip": True}, "flip"),
            ((IdentityPreservedLoss(tiny_fnet()),), {"value_range": (-1, 1)}, "value_range"),
        ],
    )
    def test_names_bad_options(self, arguments, options, says):
        with pytest.raises(ValueError, match=says):
            HallucinationLoss(*arguments, **options)

    def test_names_a_mismatched_batch(self, net):
        sr, hr = sr_and_hr()
        with pytest.raises(ValueError, match="hr holds 3 faces and sr 4"):
            HallucinationLoss(net)(sr, hr[:3])


# --- gradients that do not arrive ----------------------------------------------------------------


def cutting(how):
    """A tiny FNet whose gradient does not get through."""
    net = tiny_fnet()
    straight = net.forward
    net.forward = {
        "no_grad": torch.no_grad()(straight),
        "detach": lambda x: straight(x.detach()),
        "numpy": lambda x: straight(torch.from_numpy(x.detach().numpy())),
        "rounding": lambda x: straight((x * 100).round() / 100),
    }[how]
    return net


@pytest.mark.parametrize("how", ["no_grad", "detach", "numpy", "rounding"])
def test_refuses_an_fnet_that_cuts_the_gradient(how):
    sr, hr = sr_and_hr()
    loss = loss_of(tiny_fnet())
    loss.encoders[0].fnet.forward = cutting(how).forward
    with pytest.raises(RuntimeError, match="FNet TinyFNet cuts the gradient"):
        loss(sr, hr)
    with torch.no_grad():
        loss.eval()(sr, hr)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: IdentityPreservedLoss(net, distance=lambda a, b: (a - b).detach().sum(1)),
        lambda net: HallucinationLoss(net, image_loss=lambda a, b: (a.detach() - b).abs().mean()),
    ],
    ids=["distance", "image loss"],
)
def test_refuses_functions_that_cut_the_gradient(net, make):
    with pytest.raises(RuntimeError, match=r"the (distance|image loss) cuts the gradient"):
        make(net)(*sr_and_hr())


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


# --- transforms ----------------------------------------------------------------------------------


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


# --- distances -----------------------------------------------------------------------------------


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


def test_every_distance_has_a_reference():
    assert set(DISTANCES) == set(REFERENCE)


@pytest.mark.parametrize("name", DISTANCES)
def test_formula(name):
    a, b = pairs()
    ours = DISTANCES[name](torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(ours.numpy(), REFERENCE[name](a, b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("case", ["equal", "opposite", "zero", "tiny"])
def test_gradient_is_finite_where_formulas_break(name, case):
    b = torch.from_numpy(pairs()[0])
    a = {"equal": b, "opposite": -b, "zero": b * 0, "tiny": b * 1e-20}[case]
    a = a.clone().requires_grad_()
    DISTANCES[name](a, b).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTANCES)
def test_same_embedding_is_at_distance_zero(name):
    a = torch.from_numpy(pairs()[0])
    torch.testing.assert_close(DISTANCES[name](a, a), torch.zeros(6), atol=1e-6, rtol=0)


def test_own_distances_and_image_losses_by_name(net):
    sr, hr = sr_and_hr()
    register_distance("test_squared", lambda a, b: (a - b).square().sum(1))
    assert loss_of(net, distance="test_squared")(sr, hr) > 0
    with pytest.raises(ValueError, match="another distance 'cosine'"):
        register_distance("cosine", lambda a, b: a)
    register_image_loss("test_quarter", lambda a, b: (a - b).abs().mean() / 4)
    quarter, _ = HallucinationLoss(None, image_loss="test_quarter")(sr, hr)
    torch.testing.assert_close(4 * quarter, HallucinationLoss(None)(sr, hr)[0])
    with pytest.raises(ValueError, match="Did you mean 'l1'"):
        HallucinationLoss(None, image_loss="l11")
