"""Batch norm folded into the convolution before it: the same network, quicker."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-5
"""How far a folded network may stray, relative to its output: some ten roundings of float32."""


@torch.no_grad()
def folded(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of a network with its batch norms folded into convolutions, where that is exact.

    Pairs are found by watching one image go through: a batch norm is folded when it is given the
    very tensor that a convolution returned. Whether nothing else used that tensor cannot be seen,
    so the copy is compared with the original, and given up where they differ.

    Args:
        net: A network in eval mode.
        input_size: `(3, H, W)` of its input.

    Returns:
        The copy, or the network itself where there is nothing to fold or folding changed it.
    """
    reference = next(net.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, *input_size, generator=generator).to(reference)
    twin = copy.deepcopy(net)
    pairs = _pairs(twin, image)
    if not pairs:
        return net
    names = {module: name for name, module in twin.named_modules()}
    for conv, norm in pairs:
        _replace(twin, names[conv], fuse_conv_bn_eval(conv, norm))
        _replace(twin, names[norm], nn.Identity())
    expected, got = net(image), twin(image)
    error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
    return twin if error <= TOLERANCE else net


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


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(net.get_submodule(owner), child, module)
