"""Time, memory and arithmetic of a step, for the benchmarks beside this file."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]
_Answer = TypeVar("_Answer")


def seconds(step: Step, device: str = "cpu") -> float:
    """Time one step, the device's queue emptied before and after."""
    start = now(device)
    step()
    return now(device) - start


def take_turns(
    ways: Mapping[str, Step], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Times of each way, round by round, after a first call that plans kernels and allocates."""
    for step in ways.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            times[name].append(seconds(step, device))
    return times


def now(device: str) -> float:
    """The time in seconds, once a GPU has done all it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def count_flops(step: Step) -> int:
    """Floating-point operations of a step, convolutions and matrix products counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def matmul_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of large matrix products, the limit that shares refer to; best of 5."""
    size = 2048 if torch.device(device).type == "cpu" else 8192
    a = torch.rand(size, size, device=device).to(dtype)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a), device) for _ in range(5))


def in_own_process(function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Call a function in a fresh process: a memory peak never falls again in this one."""
    # multiprocessing.Pool would start a process that dies again and again
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mebibytes(device: str = "cpu") -> float:
    """Peak memory in MiB: a GPU's, or this process's, Python and torch included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss begins at what the parent process held
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def table(head: str, rows: Sequence[str]) -> str:
    """A Markdown table of lines `name | number | number`."""
    lines = [head, "---" + " | ---:" * head.count("|"), *rows]
    return "\n".join(f"| {line} |" for line in lines)
