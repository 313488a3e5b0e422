"""The identity loss, side by side with the bare arithmetic that it cannot do without."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from idloss.benchmark.timing import Step, in_own_process, matmul_rate, resident_peak, seconds
from idloss.losses import IdentityPreservedLoss, cosine_distance


class Timing(NamedTuple):
    """What one way of doing a thing costs.

    Attributes:
        name: What was timed.
        seconds: Median time of a step.
        ratio: Median over rounds of its time against the reference of the same round.
        flops: Floating-point operations of a step, convolutions and matrix products counted.
        share: Its rate against the machine's measured matrix-product rate, in [0, 1].
        mebibytes: Peak memory, in MiB: the device's, or that of a process which does nothing else,
            Python and torch included.
    """

    name: str
    seconds: float
    ratio: float
    flops: int
    share: float
    mebibytes: float


class LossCase(NamedTuple):
    """What `benchmark_loss` measures: an FNet, a batch and two image sizes."""

    fnet: str = "sface"
    batch: int = 32
    sr_size: tuple[int, int] = (56, 48)
    hr_size: tuple[int, int] = (112, 96)
    crop: str | None = "sphereface"
    pretrained: bool = False
    device: str = "cpu"

    def steps(self) -> dict[str, tuple[Step, str]]:
        """The ways of computing the loss and its gradient, each with the name of its reference.

        The bare arithmetic is one FNet forward and backward-to-input on SR and one forward on HR,
        both already at the FNet's size and normalised, and the cosine.
        """
        torch.manual_seed(0)
        loss = IdentityPreservedLoss(self.fnet, pretrained=self.pretrained, crop=self.crop)
        loss = loss.to(self.device)
        encoder = loss.encoders[0]
        fnet: nn.Module = encoder.fnet  # type: ignore[assignment]
        sr = torch.rand(self.batch, 3, *self.sr_size, device=self.device, requires_grad=True)
        hr = torch.rand(self.batch, 3, *self.hr_size, device=self.device)
        with torch.no_grad():
            sr_input = encoder.preprocess(sr).detach().requires_grad_()  # type: ignore[operator]
            hr_input = encoder.preprocess(hr)  # type: ignore[operator]
        features = loss.embed(hr)

        def bare(hr_features: Tensor | None = None) -> None:
            if hr_features is None:
                with torch.no_grad():
                    hr_features = fnet(hr_input)
            cosine_distance(fnet(sr_input), hr_features).mean().backward()
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


def benchmark_loss(case: LossCase, *, rounds: int = 7) -> list[Timing]:
    """Time the identity loss against the bare arithmetic, in turn, round by round.

    Args:
        case: What to measure.
        rounds: How often; the medians are given.

    Returns:
        One `Timing` for each way, the references among them.
    """
    steps = case.steps()
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
        taken = statistics.median(times[name])
        flops = _flops(step)
        ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
        timings.append(
            Timing(
                name,
                taken,
                statistics.median(ratios),
                flops,
                flops / taken / limit,
                _peak_mebibytes(case, name),
            )
        )
    return timings


def _flops(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _peak_mebibytes(case: LossCase, name: str) -> float:
    if torch.device(case.device).type == "cuda":
        step = case.steps()[name][0]
        torch.cuda.reset_peak_memory_stats(case.device)
        step()
        return torch.cuda.max_memory_allocated(case.device) / 2**20
    return in_own_process(_process_mebibytes, case, name)


def _process_mebibytes(case: LossCase, name: str) -> float:
    step = case.steps()[name][0]
    step()
    step()
    return resident_peak() / 2**20


def format_timings(timings: Sequence[Timing]) -> str:
    """Lay timings out as a Markdown table.

    Args:
        timings: What `benchmark_loss` gave.

    Returns:
        The table, one row for each timing.
    """
    lines = [
        "| | ms | against bare | GFLOP | share of matmul rate | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {t.name} | {t.seconds * 1e3:.1f} | {t.ratio:.3f} | {t.flops / 1e9:.1f} "
        f"| {t.share:.0%} | {t.mebibytes:.0f} |"
        for t in timings
    ]
    return "\n".join(lines)
