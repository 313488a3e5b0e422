"""Search of a large gallery on disk, side by side with FAISS, and identification as in Table 2."""

from __future__ import annotations

import statistics
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray

from idloss.benchmark.timing import Step, seconds
from idloss.evaluation.identification import DRAWS, identify, search

# Paper, Table 2: 610 subjects of LFW, 6,733 images, 11 for each or about so.
SUBJECTS = 610
IMAGES = 11
_ROWS = 1 << 14


class SearchCase(NamedTuple):
    """What `benchmark_search` measures.

    Attributes:
        gallery: Embeddings in the gallery.
        probes: Embeddings searched for.
        width: Features of an embedding.
        k: Matches wanted for each probe.
    """

    gallery: int = 1_000_000
    probes: int = 1000
    width: int = 512
    k: int = 20


class Searched(NamedTuple):
    """What one way of searching costs.

    Attributes:
        name: Which way.
        seconds: Median wall time.
        cosines: Pairs of embeddings that were compared.
    """

    name: str
    seconds: float
    cosines: int


def benchmark_search(case: SearchCase, rounds: int = 3) -> list[Searched]:
    """Time the search of a drawn gallery, memory-mapped, and identification after Table 2.

    The gallery is drawn normalised: FAISS compares what it is given, the search of the package
    normalises what it reads.

    Args:
        case: What to measure.
        rounds: How often; the ways take turns.

    Returns:
        Identification, our search and, where it is installed, FAISS's.
    """
    rng = np.random.default_rng(0)
    probes = _unit(rng, case.probes, case.width)
    labels = np.repeat(np.arange(SUBJECTS), IMAGES)
    faces = _unit(rng, labels.size, case.width)
    compared = (labels.size - SUBJECTS) * SUBJECTS * DRAWS, case.gallery * case.probes
    with tempfile.TemporaryDirectory(prefix="idloss-") as folder:
        gallery = _drawn(Path(folder) / "gallery.npy", case, rng)
        steps: dict[str, tuple[Step, int]] = {
            f"identification, {SUBJECTS} people, {DRAWS} draws": (
                lambda: identify(faces, faces, labels),
                compared[0],
            ),
            f"{case.k} best of {case.gallery:,}, idloss": (
                lambda: search(gallery, probes, case.k),
                compared[1],
            ),
        }
        with suppress(ModuleNotFoundError):
            faiss = import_module("faiss")
            steps[f"{case.k} best of {case.gallery:,}, FAISS"] = (
                lambda: faiss.knn(probes, gallery, case.k, metric=faiss.METRIC_INNER_PRODUCT),
                compared[1],
            )
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in tqdm(range(rounds), desc="searching", unit="round", delay=2):
            for name, (step, _) in steps.items():
                times[name].append(seconds(step, "cpu"))
    return [
        Searched(name, statistics.median(times[name]), cosines)
        for name, (_, cosines) in steps.items()
    ]


def format_search(searched: list[Searched]) -> str:
    """Lay the costs out as a Markdown table.

    Args:
        searched: What `benchmark_search` gave.

    Returns:
        The table.
    """
    head = ["| | s | million cosines/s |", "|---|---:|---:|"]
    rows = [
        f"| {one.name} | {one.seconds:.2f} | {one.cosines / one.seconds / 1e6:.0f} |"
        for one in searched
    ]
    return "\n".join(head + rows)


def _unit(rng: np.random.Generator, count: int, width: int) -> NDArray[np.float32]:
    """Embeddings of length one, `[count, width]`."""
    drawn = rng.standard_normal((count, width), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def _drawn(path: Path, case: SearchCase, rng: np.random.Generator) -> NDArray[np.float32]:
    """A gallery on disk, drawn block by block."""
    shape = (case.gallery, case.width)
    gallery = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in tqdm(range(0, case.gallery, _ROWS), desc="drawing", unit="block", delay=2):
        part = gallery[start : start + _ROWS]
        part[:] = _unit(rng, *part.shape)
    gallery.flush()
    stored: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return stored
