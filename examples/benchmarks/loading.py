"""Memory and time of loading a checkpoint, beside reading the file; on Linux.

    python examples/benchmarks/loading.py --model iresnet50

The default is as large as the recognisers that most people use, 175 MB. Memory is the peak over
what the process held with everything imported. Reading is `read_bytes` of a file that the system
holds in memory, in turns with loading, and both are timed by the processor and by the clock: the
best and the middle one of all rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from timing import in_own_process, peak_mebibytes, table

from idloss import create_fnet

WAYS: dict[str, Callable[[str, Path], object]] = {
    "checkpoint=": lambda model, path: create_fnet(model, checkpoint=path),
    "pretrained_cfg_overlay=": lambda model, path: create_fnet(
        model, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    ),
}


def write(model: str, folder: str) -> list[Path]:
    """A checkpoint of random numbers, as safetensors and as torch writes it."""
    tensors = create_fnet(model).state_dict()
    paths = [Path(folder, "model.safetensors"), Path(folder, "model.pth")]
    safetensors.torch.save_file(tensors, paths[0])
    torch.save(tensors, paths[1])
    return paths


def measure(way: str, model: str, path: Path, rounds: int) -> tuple[float, list[list[float]]]:
    """Peak memory in MiB; seconds of reading and loading by the processor, and by the clock."""
    with torch.device("meta"):
        create_fnet(model)  # what is imported late
    status = Path("/proc/self/status").read_text()
    before = int(status.partition("VmRSS:")[2].split()[0]) / 2**10
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    WAYS[way](model, path)
    peak = peak_mebibytes() - before
    times: list[list[float]] = [[], [], [], []]
    for _ in range(rounds):
        for index, step in enumerate((path.read_bytes, lambda: WAYS[way](model, path))):
            processor, clock = time.process_time(), time.perf_counter()
            held = step()
            times[index].append(time.process_time() - processor)
            times[2 + index].append(time.perf_counter() - clock)
            del held
    return peak, times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="iresnet50", help="FNet")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as folder:
        for path in in_own_process(write, args.model, folder):
            size = path.stat().st_size / 2**20
            for way in WAYS:
                peak, times = in_own_process(measure, way, args.model, path, args.rounds)
                row = f"{path.name}, {way} | {size:.0f} | {peak / size:.2f}"
                for reading, loading in (times[:2], times[2:]):
                    for summary in (min, median):
                        read, load = summary(reading), summary(loading)
                        row += f" | {load * 1000:.0f} ({load / read:.2f})"
                rows.append(row)
    head = "way | MiB | peak, times the file | processor, ms (times reading) | middle"
    print(table(f"{head} | clock, ms (times reading) | middle", rows))


if __name__ == "__main__":
    main()
