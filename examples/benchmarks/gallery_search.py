"""How long 100 probes take in a gallery of a million faces, on disk, and in how much memory.

python examples/benchmarks/gallery_search.py --faces 1000000 --width 256
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from idloss.evaluation.identification import search


def main(options: argparse.Namespace) -> None:
    """Fill a gallery with noise, search it twice, and print what the second time took."""
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        path, shape = Path(folder) / "rows", (options.faces, options.width)
        with path.open("wb") as file:
            for start in range(0, options.faces, 10_000):
                size = (min(10_000, options.faces - start), options.width)
                file.write(rng.standard_normal(size, np.float32).tobytes())
        gallery = np.memmap(path, np.float32, "c", shape=shape)
        probes = torch.randn(options.probes, options.width)
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            search(gallery, probes, 5)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.probes} probes in {options.faces:,} faces of {options.width}, ", end="")
    print(f"{torch.get_num_threads()} threads: {wall:.2f} s, {cpu:.2f} s of CPU; {peak:.0f} MiB,")
    print(
        f"of which up to {4 * options.faces * options.width / 2**20:.0f} are the file's own pages"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--probes", type=int, default=100)
    main(parser.parse_args())
