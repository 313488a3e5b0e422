"""Memory and time of loading a checkpoint, beside reading the file; on Linux.

    python examples/benchmarks/loading.py --model iresnet50

The default is as large as the recognisers that most people use, 175 MB. Memory is the peak over
what the process held with everything imported, time that of the processor, the best of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from timing import in_own_process, peak_mebibytes, table

from idloss import create_fnet

WAYS: dict[str, Callable[[str, Path], object]] = {
    "reading the file": lambda _, path: path.read_bytes(),
    "create_fnet(checkpoint=)": lambda model, path: create_fnet(model, checkpoint=path),
    "create_fnet(pretrained_cfg_overlay=)": lambda model, path: create_fnet(
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


def measure(way: str, model: str, path: Path) -> tuple[float, float]:
    """Peak memory in MiB and seconds."""
    with torch.device("meta"):
        create_fnet(model)  # what is imported late
    status = Path("/proc/self/status").read_text()
    before = int(status.partition("VmRSS:")[2].split()[0]) / 2**10
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak, times = 0.0, []
    for _ in range(3):
        start = time.process_time()
        loaded = WAYS[way](model, path)
        times.append(time.process_time() - start)
        peak = peak or peak_mebibytes() - before
        del loaded
    return peak, min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="iresnet50", help="FNet")
    model = parser.parse_args().model
    rows = []
    with TemporaryDirectory() as folder:
        for path in in_own_process(write, model, folder):
            size = path.stat().st_size / 2**20
            for way in WAYS:
                peak, seconds = in_own_process(measure, way, model, path)
                rows.append(f"{path.name}, {way} | {size:.0f} | {peak / size:.2f} | {seconds:.3f}")
    print(table("way | MiB | peak, times the file | s", rows))


if __name__ == "__main__":
    main()
