"""The search of a large gallery on disk beside FAISS, and identification as in Table 2.

    python examples/benchmarks/gallery_search.py --gallery 1000000

FAISS is measured where it is installed (pip install faiss-cpu). The gallery is drawn normalised:
FAISS compares what it is given, the search of the package normalises what it reads.
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray
from timing import Step, table, take_turns

from idloss.evaluation.identification import DRAWS, identify, search

# Paper, Table 2: 610 subjects of LFW, 6,733 images, 11 for each or about so.
SUBJECTS = 610
IMAGES = 11


def measure(gallery: int, probes: int, width: int, k: int, rounds: int) -> dict[str, float]:
    """Median seconds of identification, our search and FAISS's."""
    rng = np.random.default_rng(0)
    wanted = unit(rng, probes, width)
    labels = np.repeat(np.arange(SUBJECTS), IMAGES)
    faces = unit(rng, labels.size, width)
    with tempfile.TemporaryDirectory(prefix="idloss-") as folder:
        file = Path(folder) / "gallery.npy"
        stored = np.lib.format.open_memmap(file, "w+", np.float32, shape=(gallery, width))
        for start in range(0, gallery, 1 << 14):
            part = stored[start : start + (1 << 14)]
            part[:] = unit(rng, *part.shape)
        best = f"{k} best of {gallery:,} for {probes:,}"
        ways: dict[str, Step] = {
            f"identification, {SUBJECTS} people, {DRAWS} draws": (
                lambda: identify(faces, faces, labels)
            ),
            f"{best}, idloss": lambda: search(stored, wanted, k),
        }
        with suppress(ModuleNotFoundError):
            faiss = import_module("faiss")
            ways[f"{best}, FAISS"] = lambda: faiss.knn(
                wanted, stored, k, metric=faiss.METRIC_INNER_PRODUCT
            )
        return {name: statistics.median(t) for name, t in take_turns(ways, rounds).items()}


def unit(rng: np.random.Generator, count: int, width: int) -> NDArray[np.float32]:
    """Embeddings of length one, `[count, width]`."""
    drawn = rng.standard_normal((count, width), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def main(
    gallery: int = 1_000_000, probes: int = 1000, width: int = 512, k: int = 20, rounds: int = 3
) -> None:
    """Print the table."""
    times = measure(gallery, probes, width, k, rounds)
    print(table(" | s", [f"{name} | {taken:.2f}" for name, taken in times.items()]))


if __name__ == "__main__":
    typer.run(main)
