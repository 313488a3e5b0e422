"""What the identity loss costs beside the bare arithmetic that it cannot do without.

    python examples/benchmarks/loss_overhead.py --batch 16 --rounds 5

The bare arithmetic is one FNet forward and backward-to-input on SR and one forward on HR, both
already at the FNet's size and normalised, and the cosine. Ways take turns, round by round; times
are medians and a ratio is the median over the rounds.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
import typer
from timing import Step, count_flops, matmul_rate, table, take_turns
from torch import Tensor
from torch.nn.functional import cosine_similarity

from idloss import IdentityPreservedLoss
from idloss.resample import Size

REFERENCE = {"IdentityPreservedLoss": "bare arithmetic", "target_features": "bare, no HR forward"}


class Timing(NamedTuple):
    """What one way costs; the ratio is to its reference, the share of the matmul rate."""

    name: str
    seconds: float
    ratio: float
    flops: int
    share: float


def ways(
    fnet: str, batch: int, device: str, sr_size: Size, hr_size: Size, crop: str | None
) -> dict[str, Step]:
    """The ways of computing the loss and its gradient, by name."""
    torch.manual_seed(0)
    loss = IdentityPreservedLoss(fnet, pretrained=False, crop=crop).to(device)
    encoder: Any = loss.encoders[0]
    sr = torch.rand(batch, 3, *sr_size, device=device, requires_grad=True)
    hr = torch.rand(batch, 3, *hr_size, device=device)
    with torch.no_grad():
        sr_input = encoder.preprocess(sr).detach().requires_grad_()
        hr_input = encoder.preprocess(hr)
    features = loss.embed(hr)

    def bare(hr_features: Tensor | None = None) -> None:
        if hr_features is None:
            with torch.no_grad():
                hr_features = encoder.fnet(hr_input)
        (1 - cosine_similarity(encoder.fnet(sr_input), hr_features)).mean().backward()
        sr_input.grad = None

    def ours(target: Tensor | None = None) -> None:
        loss(sr, hr if target is None else None, target_features=target).backward()
        sr.grad = None

    return {
        "bare arithmetic": bare,
        "IdentityPreservedLoss": ours,
        "bare, no HR forward": lambda: bare(features),
        "target_features": lambda: ours(features),
    }


def measure(
    fnet: str,
    batch: int,
    rounds: int,
    device: str = "cpu",
    sr_size: Size = (56, 48),
    hr_size: Size = (112, 96),
    crop: str | None = "sphereface",
) -> list[Timing]:
    """Time all ways in turn, with an FNet of random weights."""
    steps = ways(fnet, batch, device, sr_size, hr_size, crop)
    times = take_turns(steps, rounds, device)
    limit = matmul_rate(device)
    timings = []
    for name, step in steps.items():
        taken, flops = statistics.median(times[name]), count_flops(step)
        pairs = zip(times[name], times[REFERENCE.get(name, name)], strict=True)
        ratio = statistics.median(own / reference for own, reference in pairs)
        timings.append(Timing(name, taken, ratio, flops, flops / taken / limit))
    return timings


def main(fnet: str = "sface", batch: int = 32, rounds: int = 7, device: str = "cpu") -> None:
    """Print the table."""
    rows = [
        f"{one.name} | {one.seconds * 1e3:.1f} | {one.ratio:.3f} | {one.flops / 1e9:.1f}"
        f" | {one.share:.0%}"
        for one in measure(fnet, batch, rounds, device)
    ]
    print(table(" | ms | against bare | GFLOP | share of matmul rate", rows))


if __name__ == "__main__":
    typer.run(main)
