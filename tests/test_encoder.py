import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import faces, tiny_fnet
from torch import nn

from idloss import FaceEncoder
from idloss.encoder import resolve_device
from idloss.geometry import convert_crop


class Parent(nn.Module):
    """A training loop's module: something to train beside the frozen network."""

    def __init__(self, encoder):
        super().__init__()
        self.srnet = nn.Conv2d(3, 3, 3, padding=1)
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(self.srnet(x))


def frozen_state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def assert_same_state(net, before):
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.fixture
def net():
    return tiny_fnet()


@pytest.fixture
def encoder(net):
    return FaceEncoder(net)


def test_normalises_as_the_fnet_asks(net, encoder):
    x = faces()
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(encoder(x), net.eval()((x - mean) / std))


def test_resizes_as_torch_bilinear(net, encoder):
    x = faces(size=(14, 12))
    up = F.interpolate(x, (28, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoder(x), encoder(up))


@pytest.mark.parametrize("value_range", [(-1, 1), (0, 255), (-0.5, 0.5)])
def test_value_range(net, value_range):
    low, high = value_range
    x = faces()
    expected = FaceEncoder(net)(x)
    got = FaceEncoder(net, value_range=value_range)(x * (high - low) + low)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_channel_order(net):
    x = faces()
    bgr = FaceEncoder(net, channel_order="bgr")(x.flip(1))
    torch.testing.assert_close(bgr, FaceEncoder(net)(x))


def test_flip_concatenates_the_mirror_image(net, encoder):
    x = faces()
    both = FaceEncoder(net, flip=True)
    assert both.num_features == 2 * encoder.num_features
    expected = torch.cat((encoder(x), encoder(x.flip(-1))), dim=1)
    torch.testing.assert_close(both(x), expected)


def test_converts_the_crop(net):
    net.crop = "arcface"
    net.pretrained_cfg["input_size"] = (3, 112, 112)
    x = faces(size=(112, 96))
    expected = FaceEncoder(net)(convert_crop(x, "sphereface", "arcface"))
    torch.testing.assert_close(FaceEncoder(net, crop="sphereface")(x), expected)


def test_stays_frozen_under_a_training_parent(net, encoder):
    parent = Parent(encoder)
    before = frozen_state(net)
    parent.train().requires_grad_(True)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parent(faces()).square().sum().backward()
        optimizer.step()
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert parent.srnet.weight.grad.abs().sum() > 0
    assert_same_state(net, before)


def test_is_in_no_state_dict_and_no_parameter_list(encoder):
    parent = Parent(encoder)
    assert set(parent.state_dict()) == {"srnet.weight", "srnet.bias"}
    assert {name for name, _ in parent.named_parameters()} == {"srnet.weight", "srnet.bias"}
    parent.load_state_dict(parent.state_dict(), strict=True)


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
    parent = Parent(encoder).double()
    assert encoder.fnet.conv.weight.dtype == torch.float64
    assert parent(faces().double()).dtype == torch.float64
    meta = Parent(FaceEncoder(tiny_fnet())).to("meta")
    assert meta.encoder.fnet.conv.weight.device.type == "meta"


def test_takes_half_images_outside_autocast(encoder):
    torch.testing.assert_close(encoder(faces().half()), encoder(faces()), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (torch.zeros(2, 3, 28, 24, dtype=torch.uint8), TypeError, "to_float"),
        (torch.zeros(2, 3, 28, 24, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(3, 28, 24), ValueError, r"\[B, 3, H, W\]"),
        (torch.zeros(2, 1, 28, 24), ValueError, r"\[2, 1, 28, 24\]"),
        ([[0.0]], TypeError, "list"),
    ],
)
def test_names_bad_images(encoder, bad, error, says):
    with pytest.raises(error, match=says):
        encoder(bad)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"value_range": (1, 0)}, "value_range"),
        ({"channel_order": "gbr"}, "channel_order"),
        ({"crop": "arcfase"}, "arcface"),
    ],
)
def test_names_bad_options(net, options, says):
    with pytest.raises(ValueError, match=says):
        FaceEncoder(net, **options)


def test_repr_tells_what_is_inside(encoder):
    assert "tiny" in repr(encoder)
    assert "frozen" in repr(encoder)


def test_device_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device() == (found or torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'gpu' cannot be used .*this machine has"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="'cuda:99' cannot be used"):
        resolve_device("cuda:99")
