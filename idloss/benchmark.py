"""Speed and memory, side by side with a reference that does only the unavoidable work."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from idloss.distances import cosine_distance
from idloss.losses import IdentityPreservedLoss

Step = Callable[[], object]


class Timing(NamedTuple):
    """What one way of doing a thing costs.

    Attributes:
        name: What was timed.
        seconds: Median time of a step.
        ratio: Median over rounds of its time against the reference of the same round.
        flops: Floating-point operations of a step, convolutions and matrix products counted.
        share: Its rate against the machine's measured matrix-product rate, in [0, 1].
        mebibytes: Peak memory a step adds, in MiB.
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
            times[name].append(_seconds(step, case.device))
    limit = matmul_rate(case.device)
    timings = []
    for name, (step, reference) in steps.items():
        seconds = statistics.median(times[name])
        flops = _flops(step)
        ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
        timings.append(
            Timing(
                name,
                seconds,
                statistics.median(ratios),
                flops,
                flops / seconds / limit,
                _peak_mebibytes(case, name),
            )
        )
    return timings


def matmul_rate(device: str = "cpu", *, size: int = 2048, rounds: int = 5) -> float:
    """Measure the machine's float32 matrix-product rate, the limit that shares refer to.

    Args:
        device: Where.
        size: Side of the square matrices.
        rounds: How often; the best is given.

    Returns:
        Floating-point operations a second.
    """
    a = torch.rand(size, size, device=device)
    torch.mm(a, a)
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, a), device) for _ in range(rounds))


def _seconds(step: Step, device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _flops(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _peak_mebibytes(case: LossCase, name: str) -> float:
    if torch.device(case.device).type == "cuda":
        step = case.steps()[name][0]
        before = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        step()
        return (torch.cuda.max_memory_allocated(case.device) - before) / 2**20
    # A process of its own for each way: a peak is a high-water mark and never falls again.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_added_mebibytes, (case, name))


def _added_mebibytes(case: LossCase, name: str) -> float:
    step = case.steps()[name][0]
    before = _resident_peak()
    step()
    step()
    return (_resident_peak() - before) / 2**20


def _resident_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_timings(timings: Sequence[Timing]) -> str:
    """Lay timings out as a Markdown table.

    Args:
        timings: What `benchmark_loss` gave.

    Returns:
        The table, one row for each timing.
    """
    lines = [
        "| | ms | against bare | GFLOP | share of matmul rate | peak MiB added |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {t.name} | {t.seconds * 1e3:.1f} | {t.ratio:.3f} | {t.flops / 1e9:.1f} "
        f"| {t.share:.0%} | {t.mebibytes:.0f} |"
        for t in timings
    ]
    return "\n".join(lines)
