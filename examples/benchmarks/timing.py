"""Time, memory and arithmetic of a step, for the benchmarks beside this file."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]
_Answer = TypeVar("_Answer")


def seconds(step: Step, device: str = "cpu") -> float:
    """Time one step, the device's queue emptied before and after."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until a GPU has done all it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(step: Step) -> int:
    """Floating-point operations of a step, convolutions and matrix products counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def matmul_rate(device: str, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """Operations a second of large matrix products, the limit that shares refer to; best of 5."""
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    a = torch.rand(size, size, device=device).to(dtype)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a), device) for _ in range(5))


def in_own_process(function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Call a function in a fresh process: a memory peak never falls again in this one."""
    # an executor reports a process that dies at the start; multiprocessing.Pool tries for ever
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
