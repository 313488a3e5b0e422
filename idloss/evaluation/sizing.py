"""How many faces at a time: as many as keep the machine busy within its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Measured on MobileFaceNet, SFace and EDSR: a core gains nothing beyond some 16 images; a GPU is
# busy with some hundreds.
FACES_PER_CORE = 8
FACES_ON_GPU = 256
SHARE = 8
"""Activations are to fit into this part of the free memory: convolutions need workspace besides."""
FALLBACK_BYTES = 2 * 2**30
"""Free memory where the system does not tell."""


def batch_size_for(
    fnets: Mapping[str, nn.Module],
    srnets: Mapping[str, nn.Module],
    sizes: Sequence[tuple[int, int]],
    device: str,
) -> int:
    """Faces at a time for a grid of networks.

    Args:
        fnets: FNets by name, as from `create_fnet`.
        srnets: SRNets by name.
        sizes: Probe sizes, rows and columns.
        device: Where the networks are to run.

    Returns:
        At least 1.
    """
    largest = max(sizes, key=lambda size: size[0] * size[1], default=(1, 1))
    needs = [activation_bytes(net, net.pretrained_cfg["input_size"]) for net in fnets.values()]  # type: ignore[index, arg-type]
    needs += [activation_bytes(net, (3, *largest)) for net in srnets.values()]
    on_gpu = torch.device(device).type != "cpu"
    wanted = FACES_ON_GPU if on_gpu else FACES_PER_CORE * torch.get_num_threads()
    views = 2
    return max(1, min(wanted, _free_bytes(device) // SHARE // (views * max(needs, default=1))))


@torch.no_grad()
def activation_bytes(net: nn.Module, shape: tuple[int, int, int]) -> int:
    """The most that any layer of a network takes in and gives out for one image.

    Args:
        net: The network, on any device; it is run once, in eval mode.
        shape: `(3, H, W)` of the image.

    Returns:
        Bytes.
    """
    most = 0

    def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal most
        tensors = [one for one in (*inputs, output) if isinstance(one, Tensor)]
        most = max(most, sum(one.numel() * one.element_size() for one in tensors))

    reference = next(net.parameters(), torch.empty(0))
    modes = {module: module.training for module in net.modules()}
    hooks = [module.register_forward_hook(look) for module in modes]
    try:
        net.eval()(torch.zeros(1, *shape).to(reference))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return max(1, most)


def _free_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    listing = Path("/proc/meminfo")  # counts what the page cache would give up, as sysconf does not
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return FALLBACK_BYTES
