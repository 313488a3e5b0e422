"""What a network that nobody trains can do quicker: same outputs, same gradients for its input."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# how far a folded network may stray, relative to its output: some ten roundings of float32
_FOLD_TOLERANCE = 1e-5


def freeze(net: nn.Module) -> nn.Module:
    """Eval mode, no gradients."""
    with suppress(NotImplementedError):  # of exported programs, which are in eval mode
        net.eval()
    for module in net.modules():
        if getattr(module, "training", False):  # some have a train() of their own
            module.training = False
    for parameter in net.parameters():  # scripted modules have no requires_grad_()
        parameter.requires_grad_(False)
    return net


def quicken(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A frozen network whose batch norms are folded, and whose layers work for the input alone."""
    with torch.autocast(reference(net).device.type, enabled=False):
        net = freeze(fold_batch_norm(net, input_size))
    for module in net.modules():
        if type(module) is nn.PReLU:
            module.__class__ = FrozenPReLU
        elif type(module) is nn.Conv2d and _is_sparse(module):
            module.__class__ = FrozenDepthwise
    return net


def _is_sparse(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise and strides."""
    plain = conv.padding_mode == "zeros" and conv.dilation == (1, 1) and conv.padding != "same"
    return plain and conv.groups == conv.in_channels == conv.out_channels and max(conv.stride) > 1


class FrozenPReLU(nn.PReLU):
    """`torch.nn.PReLU` that leaves out the gradient of frozen slopes.

    On a CPU that gradient, which nobody wants, was a third of an identity loss. What goes back is
    the same to the last bit where slopes are below 0.5, and within a rounding elsewhere.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale what is negative in `[B, C, ...]`."""
        if self.weight.requires_grad or not torch.is_grad_enabled():
            return F.prelu(x, self.weight)
        scaled: Tensor = _FrozenPReLU.apply(x, self.weight)
        return scaled


class _FrozenPReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.prelu(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(grad, x, 0)  # the gradient where x is
        return torch.lerp(positive, grad, _slopes(weight, grad)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        return torch.where(x > 0, tangent, tangent * _slopes(weight, tangent))


def _slopes(weight: Tensor, like: Tensor) -> Tensor:
    return weight.to(like.dtype).view(-1, *[1] * (like.ndim - 2))


class FrozenDepthwise(nn.Conv2d):
    """A depthwise convolution that strides, whose backward pass is a convolution as well.

    Zeros between the gradients make it one without stride. On a CPU that takes a fifth of the time
    of the library's own in bfloat16, where three such layers were a third of MobileFaceNet's loss.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Filter `[B, C, H, W]`."""
        if self.weight.requires_grad or not torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        filtered: Tensor = _FrozenDepthwise.apply(
            x, self.weight, self.bias, self.stride, self.padding
        )
        return filtered


class _FrozenDepthwise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.size = x.shape[-2:]
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        kernel, (down, right) = weight.shape[-2:], ctx.stride
        room = [n + 2 * p - k + 1 for n, p, k in zip(ctx.size, ctx.padding, kernel, strict=True)]
        apart = grad.new_zeros(*grad.shape[:2], *room)
        if not grad.is_contiguous():
            apart = apart.contiguous(memory_format=torch.channels_last)
        apart[..., ::down, ::right] = grad
        border = [k - 1 - p for k, p in zip(kernel, ctx.padding, strict=True)]
        turned = weight.to(grad.dtype).flip(-2, -1)
        whole = F.conv2d(apart, turned, padding=border, groups=weight.shape[0])
        return whole, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (weight,) = ctx.saved_tensors
        return F.conv2d(tangent, weight, None, ctx.stride, ctx.padding, groups=weight.shape[0])


@torch.no_grad()
def fold_batch_norm(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of a network with its batch norms folded into convolutions; itself if that changes it.

    A batch norm is folded when it is given the very tensor that a convolution returned. Whether
    nothing else used that tensor cannot be seen, so the copy is compared with the original.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *input_size, generator=generator).to(reference(net))
    try:
        twin = copy.deepcopy(net)
    except Exception:  # weight norm, kept outputs, sessions of other runtimes
        return net
    pairs = _pairs(twin, image)
    if not pairs:
        return net
    names = {module: name for name, module in twin.named_modules()}
    for conv, norm in pairs:
        for old, new in ((conv, fuse_conv_bn_eval(conv, norm)), (norm, nn.Identity())):
            owner, _, child = names[old].rpartition(".")
            setattr(twin.get_submodule(owner), child, new)
    expected, got = net(image), twin(image)
    if not isinstance(expected, Tensor):
        return net  # FaceEncoder says what it needs
    error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
    return twin if error <= _FOLD_TOLERANCE else net


def _pairs(net: nn.Module, image: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the batch norms that take their output, each of them used once."""
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # holds the tensors, so that ids stay theirs
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    runs: dict[nn.Module, int] = {}

    def ran(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        runs[module] = runs.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (module, output)
        elif id(inputs[0]) in made_by:
            pairs.append((made_by[id(inputs[0])][0], module))  # type: ignore[arg-type]

    # subclasses may do more than their parent
    watched = [m for m in net.modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d)]
    hooks = [module.register_forward_hook(ran) for module in watched]
    try:
        net(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(runs[module] == 1 for module in pair)]


def reference(net: nn.Module) -> Tensor:
    """A tensor of the device and floating-point type that a network's input is to have."""
    tensors = [*net.parameters(), *net.buffers()]
    floating = (tensor for tensor in tensors if tensor.is_floating_point())
    return next(floating, torch.empty(0, dtype=torch.float32, device="cpu"))
