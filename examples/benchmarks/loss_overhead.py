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
from timing import Step, count_flops, in_own_process, matmul_rate, peak_mebibytes, seconds, table
from torch import Tensor
from torch.nn.functional import cosine_similarity

from idloss import IdentityPreservedLoss


class Case(NamedTuple):
    """What is measured: an FNet with random weights, a batch and two image sizes."""

    fnet: str = "sface"
    batch: int = 32
    device: str = "cpu"
    sr_size: tuple[int, int] = (56, 48)
    hr_size: tuple[int, int] = (112, 96)
    crop: str | None = "sphereface"


class Timing(NamedTuple):
    """What one way costs; the ratio is to its reference, the share of the matmul rate."""

    name: str
    seconds: float
    ratio: float
    flops: int
    share: float
    mebibytes: float


def ways(case: Case) -> dict[str, tuple[Step, str]]:
    """The ways of computing the loss and its gradient, each with the name of its reference."""
    torch.manual_seed(0)
    loss = IdentityPreservedLoss(case.fnet, pretrained=False, crop=case.crop).to(case.device)
    encoder: Any = loss.encoders[0]
    sr = torch.rand(case.batch, 3, *case.sr_size, device=case.device, requires_grad=True)
    hr = torch.rand(case.batch, 3, *case.hr_size, device=case.device)
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
        "bare arithmetic": (bare, "bare arithmetic"),
        "IdentityPreservedLoss": (ours, "bare arithmetic"),
        "bare, no HR forward": (lambda: bare(features), "bare, no HR forward"),
        "loss, target_features": (lambda: ours(features), "bare, no HR forward"),
    }


def measure(case: Case, rounds: int) -> list[Timing]:
    """Time all ways in turn, round by round."""
    steps = ways(case)
    for step, _ in steps.values():  # first calls plan kernels and allocate
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, (step, _) in steps.items():
            times[name].append(seconds(step, case.device))
    limit = matmul_rate(case.device)
    timings = []
    for name, (step, reference) in steps.items():
        taken, flops = statistics.median(times[name]), count_flops(step)
        ratio = statistics.median(
            own / other for own, other in zip(times[name], times[reference], strict=True)
        )
        memory = in_own_process(peak_of, case, name)
        timings.append(Timing(name, taken, ratio, flops, flops / taken / limit, memory))
    return timings


def peak_of(case: Case, name: str) -> float:
    """Peak memory of a process that does nothing but one way, in MiB."""
    step = ways(case)[name][0]
    step()
    step()
    return peak_mebibytes(case.device)


def main(fnet: str = "sface", batch: int = 32, rounds: int = 7, device: str = "cpu") -> None:
    """Print the table."""
    head = ["", "ms", "against bare", "GFLOP", "share of matmul rate", "peak MiB"]
    rows = [
        [
            one.name,
            f"{one.seconds * 1e3:.1f}",
            f"{one.ratio:.3f}",
            f"{one.flops / 1e9:.1f}",
            f"{one.share:.0%}",
            f"{one.mebibytes:.0f}",
        ]
        for one in measure(Case(fnet, batch, device), rounds)
    ]
    print(table(head, rows))


if __name__ == "__main__":
    typer.run(main)
