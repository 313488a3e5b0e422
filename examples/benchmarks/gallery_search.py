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
from typing import NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from timing import Step, seconds, table

from idloss.evaluation.identification import DRAWS, identify, search

# Paper, Table 2: 610 subjects of LFW, 6,733 images, 11 for each or about so.
SUBJECTS = 610
IMAGES = 11


class Searched(NamedTuple):
    """Median wall time of one way, and how many pairs of embeddings it compared."""

    name: str
    seconds: float
    cosines: int


def measure(gallery: int, probes: int, width: int, k: int, rounds: int) -> list[Searched]:
    """Time identification, our search and FAISS's, in turn."""
    rng = np.random.default_rng(0)
    wanted = unit(rng, probes, width)
    labels = np.repeat(np.arange(SUBJECTS), IMAGES)
    faces = unit(rng, labels.size, width)
    compared = (labels.size - SUBJECTS) * SUBJECTS * DRAWS
    with tempfile.TemporaryDirectory(prefix="idloss-") as folder:
        stored = on_disk(Path(folder) / "gallery.npy", gallery, width, rng)
        best = f"{k} best of {gallery:,}"
        ways: dict[str, tuple[Step, int]] = {
            f"identification, {SUBJECTS} people, {DRAWS} draws": (
                lambda: identify(faces, faces, labels),
                compared,
            ),
            f"{best}, idloss": (lambda: search(stored, wanted, k), gallery * probes),
        }
        with suppress(ModuleNotFoundError):
            faiss = import_module("faiss")
            ways[f"{best}, FAISS"] = (
                lambda: faiss.knn(wanted, stored, k, metric=faiss.METRIC_INNER_PRODUCT),
                gallery * probes,
            )
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (step, _) in ways.items():
                times[name].append(seconds(step))
    return [
        Searched(name, statistics.median(times[name]), cosines)
        for name, (_, cosines) in ways.items()
    ]


def unit(rng: np.random.Generator, count: int, width: int) -> NDArray[np.float32]:
    """Embeddings of length one, `[count, width]`."""
    drawn = rng.standard_normal((count, width), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def on_disk(
    path: Path, count: int, width: int, rng: np.random.Generator, block: int = 1 << 14
) -> NDArray[np.float32]:
    """A gallery in a file, drawn block by block and mapped into memory, `[count, width]`."""
    gallery = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
    for start in range(0, count, block):
        part = gallery[start : start + block]
        part[:] = unit(rng, *part.shape)
    gallery.flush()
    stored: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return stored


def main(
    gallery: int = 1_000_000, probes: int = 1000, width: int = 512, k: int = 20, rounds: int = 3
) -> None:
    """Print the table."""
    rows = [
        [one.name, f"{one.seconds:.2f}", f"{one.cosines / one.seconds / 1e6:.0f}"]
        for one in measure(gallery, probes, width, k, rounds)
    ]
    print(table(["", "s", "million cosines/s"], rows))


if __name__ == "__main__":
    typer.run(main)
