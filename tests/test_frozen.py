"""Frozen networks work faster, and give what they gave before."""

import copy

import pytest
import torch
from torch import nn

from idloss import create_fnet
from idloss.frozen import FrozenDepthwise, FrozenPReLU, fold_batch_norm, quicken

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prelu_is_torchs_own_but_for_the_gradient_of_frozen_slopes(dtype, memory_format):
    torch.manual_seed(0)
    ours, theirs = FrozenPReLU(5).requires_grad_(False), nn.PReLU(5)
    ours.weight.copy_(torch.tensor([0.0, 0.1, 0.25, -0.3, 0.7]))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 7, 6).contiguous(memory_format=memory_format)
    x[0, 0, 0] = 0
    outcome = []
    for act in (ours, theirs):
        leaf = x.to(dtype).requires_grad_()
        y = act.to(dtype)(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape))
        outcome.append((y.detach(), leaf.grad))
    for one, other in zip(*outcome, strict=True):
        assert torch.equal(one[:, :4], other[:, :4])
        torch.testing.assert_close(one[:, 4], other[:, 4])
    assert ours.weight.grad is None
    trained = FrozenPReLU(5)
    trained(x).sum().backward()
    assert trained.weight.grad.abs().sum() > 0


DEPTHWISE = {
    "3x3": {"kernel_size": 3, "stride": 2, "padding": 1},
    "no bias": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "not square": {"kernel_size": (5, 3), "stride": (3, 2), "padding": (1, 0)},
    "valid": {"kernel_size": 2, "stride": 2},
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("options", DEPTHWISE.values(), ids=DEPTHWISE)
@pytest.mark.parametrize("size", [(14, 12), (15, 13)])
def test_gradient_of_a_depthwise_convolution_is_torchs_own(options, memory_format, size):
    torch.manual_seed(0)
    theirs = nn.Conv2d(5, 5, groups=5, **options).requires_grad_(False)
    ours = copy.deepcopy(theirs)
    ours.__class__ = FrozenDepthwise
    x = torch.randn(2, 5, *size).contiguous(memory_format=memory_format)
    outcome = []
    for conv in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = conv(leaf)
        (slope,) = torch.autograd.grad((y * torch.sin(y)).sum(), leaf, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), leaf)
        tangent = torch.func.jvp(conv, (x,), (torch.cos(x),))[1]
        outcome.append((y.detach(), slope.detach(), curve, tangent))
    for one, other in zip(*outcome, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    trained = copy.deepcopy(ours).requires_grad_()
    trained(x).sum().backward()
    assert trained.weight.grad.abs().sum() > 0


def test_bfloat16_is_as_near_as_torchs_own():
    torch.manual_seed(0)
    exact = nn.Conv2d(8, 8, 3, 2, 1, groups=8).requires_grad_(False).double()
    x, out = torch.randn(2, 8, 14, 14), None
    errors = []
    for conv in (exact, quick := copy.deepcopy(exact).bfloat16(), copy.deepcopy(quick)):
        if conv is quick:
            conv.__class__ = FrozenDepthwise
        leaf = x.to(conv.weight.dtype).requires_grad_()
        conv(leaf).square().sum().backward()
        out = leaf.grad.double() if out is None else out
        errors.append((leaf.grad.double() - out).abs().max())
    assert errors[1] <= 1.5 * errors[2]


@pytest.mark.parametrize("name", ["mobilefacenet", "mobilefacenet_relu6", "ir18", "edgeface_xxs"])
def test_a_quick_network_gives_the_same(name):
    torch.manual_seed(0)
    net = create_fnet(name).eval().requires_grad_(False).double()
    x = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    outcome = []
    with torch.autocast("cpu", torch.bfloat16):  # as in training; folding is exact all the same
        quick = quicken(copy.deepcopy(net), (3, 112, 112))
    for one in (net, quick):
        leaf = x.clone().requires_grad_()
        features = one(leaf)
        features.square().sum().backward()
        outcome.append((features.detach(), leaf.grad))
    for expected, got in zip(*outcome, strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()


def test_folding_is_exact_and_gives_up_where_it_is_not():
    net = create_fnet("mobilefacenet").eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    quick = fold_batch_norm(net, (3, 112, 112))
    assert quick is not net
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    x = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        expected = net(x)
        assert (quick(x) - expected).norm() <= 1e-5 * expected.norm()

    class Branching(nn.Module):
        """The convolution's output is used beside the batch norm, too."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            nn.init.constant_(self.norm.running_mean, 2.0)

        def forward(self, x):
            x = self.conv(x)
            return (x + self.norm(x)).flatten(1)

    branching = Branching().eval()
    assert fold_batch_norm(branching, (3, 4, 4)) is branching
