"""Clocks and high-water marks."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

Step = Callable[[], object]
_Answer = TypeVar("_Answer")


def seconds(step: Step, device: str) -> float:
    """Time one step, the device's queue emptied before and after.

    Args:
        step: What to time.
        device: Where it runs.

    Returns:
        Seconds.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_rate(
    device: str = "cpu",
    *,
    size: int | None = None,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Measure the machine's matrix-product rate, the limit that shares refer to.

    Args:
        device: Where.
        size: Side of the square matrices; None for one that fills a CPU or a GPU.
        rounds: How often; the best is given.
        dtype: Of the matrices.

    Returns:
        Floating-point operations a second.
    """
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    a = torch.rand(size, size, device=device).to(dtype)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, a), device) for _ in range(rounds))


def in_own_process(function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Call a function in a fresh process: a peak is a high-water mark and never falls again.

    Args:
        function: A function of a module.
        *arguments: Its arguments; they and the answer are pickled.

    Returns:
        Its answer.
    """
    # an executor reports a process that dies at the start; multiprocessing.Pool tries for ever
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_peak() -> int:
    """The most memory that this process has held at once, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss begins at what the parent process held
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
