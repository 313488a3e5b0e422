"""The bench, side by side with the released evaluation's way of doing the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from torch import Tensor, nn

from idloss.benchmark.timing import in_own_process, resident_peak
from idloss.data import EvaluationSet, FileFaces, Pairs, open_evaluation
from idloss.encoder import FaceEncoder
from idloss.evaluation import HR, PAPER_SIZES, evaluate
from idloss.geometry import fit_similarity, get_template
from idloss.registry import create_fnet, create_srnet
from idloss.resample import Size

METHODS = ("bilinear", "bicubic")
Scores = dict[tuple[str, Size], NDArray[np.float64]]


class EvaluationCase(NamedTuple):
    """What `benchmark_evaluation` measures.

    Attributes:
        data: Path of LFW, its lists beside it.
        fnet: The FNet.
        sizes: Probe sizes, rows and columns.
        pairs: How many pairs, as many from each fold and of each kind; None for all.
        pretrained: Load the FNet's weights; the times do not depend on them.
    """

    data: str
    fnet: str = "mobilefacenet"
    sizes: tuple[Size, ...] = PAPER_SIZES["verification"]
    pairs: int | None = None
    pretrained: bool = True

    def open(self) -> EvaluationSet:
        """The pairs to judge."""
        found = open_evaluation(self.data)
        if found.pairs is None:
            raise ValueError(f"{self.data} has no pairs; put pairs.txt beside it")
        return found if self.pairs is None else replace(found, pairs=_some(found.pairs, self.pairs))

    def network(self) -> nn.Module:
        """The FNet; random weights are the same in every process."""
        torch.manual_seed(0)
        return create_fnet(self.fnet, pretrained=self.pretrained)


class Measured(NamedTuple):
    """What one way of evaluating costs.

    Attributes:
        name: Which way.
        seconds: Wall time, without imports, the network's making and the reading of the lists.
        images: Faces judged: two for each pair and cell of the table.
        mebibytes: Peak memory of the process, in MiB.
        scores: Cosine of each pair in each cell, `[N]`.
    """

    name: str
    seconds: float
    images: int
    mebibytes: float
    scores: Scores


def benchmark_evaluation(case: EvaluationCase) -> list[Measured]:
    """Run the same verification the released way and ours, each in a process of its own.

    Args:
        case: What to measure.

    Returns:
        The released way, ours, and ours at a single size, whose memory tells whether it grows.

    Raises:
        ModuleNotFoundError: OpenCV, which the released way runs on, is missing.
    """
    single = case._replace(sizes=case.sizes[-1:])
    return [
        in_own_process(_measure, name, way, which)
        for name, way, which in (
            ("the released way", released_way, case),
            (f"idloss, {len(case.sizes)} sizes", our_way, case),
            ("idloss, 1 size", our_way, single),
        )
    ]


def format_evaluation(measured: list[Measured]) -> str:
    """Lay the costs out as a Markdown table.

    Args:
        measured: What `benchmark_evaluation` gave.

    Returns:
        The table, and the largest difference between the two ways' cosines.
    """
    reference, ours = measured[0], measured[1]
    lines = ["| | s | images/s | speed-up | peak MiB |", "|---|---:|---:|---:|---:|"]
    for one in measured:
        rate = one.images / one.seconds
        gain = rate * reference.seconds / reference.images
        lines.append(
            f"| {one.name} | {one.seconds:.1f} | {rate:.1f} | {gain:.2f} | {one.mebibytes:.0f} |"
        )
    apart = max(
        float(np.abs(scores - ours.scores[cell]).max()) for cell, scores in reference.scores.items()
    )
    lines.append(f"\nThe cosines of the two ways differ by {apart:.4f} at most.")
    return "\n".join(lines)


def _measure(
    name: str,
    way: Callable[[EvaluationSet, nn.Module, EvaluationCase], Scores],
    case: EvaluationCase,
) -> Measured:
    data, fnet = case.open(), case.network()
    start = time.perf_counter()
    scores = way(data, fnet, case)
    taken = time.perf_counter() - start
    images = 2 * sum(len(row) for row in scores.values())
    return Measured(name, taken, images, resident_peak() / 2**20, scores)


def our_way(data: EvaluationSet, fnet: nn.Module, case: EvaluationCase) -> Scores:
    """Everything that `idloss evaluate` does but writing files, with an empty cache.

    Args:
        data: The pairs.
        fnet: The FNet.
        case: What to measure.

    Returns:
        Cosines by method and size.
    """
    srnets = {name: create_srnet(name) for name in METHODS}
    results = evaluate(data, {"fnet": fnet}, srnets, case.sizes, cache=False)
    return {
        (cell.srnet, (cell.height, cell.width)): arrays["scores"].astype(np.float64)
        for cell, arrays in results.arrays.items()
    }


def released_way(data: EvaluationSet, fnet: nn.Module, case: EvaluationCase) -> Scores:
    """The released evaluation's way: a cell after the other, pair by pair, image by image.

    For each pair both photos are decoded, aligned and shown to the FNet four times: both faces and
    their mirror images. With OpenCV, as there.

    Args:
        data: The pairs.
        fnet: The FNet.
        case: What to measure.

    Returns:
        Cosines by method and size.

    Raises:
        ModuleNotFoundError: OpenCV is missing.
    """
    pairs = data.pairs
    if pairs is None or not isinstance(data.faces, FileFaces):
        raise TypeError(f"{data.name} must hold pairs of photos")
    look = _ReleasedLook(data.faces, FaceEncoder(fnet))
    full = get_template("sphereface").size
    cells = [(HR, full), *((method, size) for method in METHODS for size in case.sizes)]
    scores: Scores = {}
    bar = tqdm(total=len(cells) * len(pairs), unit="pair", desc="the released way", delay=2)
    with bar, torch.inference_mode():
        for method, size in cells:
            cosines = []
            for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
                gallery = look.embed(first, HR, full)
                probe = look.embed(second, method, size)
                cosines.append(float(torch.nn.functional.cosine_similarity(gallery, probe, dim=0)))
                bar.update()
            scores[method, size] = np.array(cosines)
    return scores


class _ReleasedLook:
    """One face at a time, with OpenCV.

    Args:
        faces: Photos with landmarks.
        encoder: The FNet.
    """

    def __init__(self, faces: FileFaces, encoder: FaceEncoder) -> None:
        try:
            import cv2
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the released way runs on OpenCV: pip install opencv-python-headless"
            ) from error
        self.cv2: Any = cv2
        self.faces = faces
        self.encoder = encoder
        self.crop = get_template(encoder.fnet_crop or "sphereface")

    def embed(self, index: int, method: str, size: Size) -> Tensor:
        """Decode, align, degrade, enlarge, mirror and embed one face: `[2 D]`."""
        faces = self.faces
        data = np.frombuffer(faces.files.read(faces.members[index]), np.uint8)
        photo = self.cv2.imdecode(data, self.cv2.IMREAD_COLOR)
        if faces.landmarks is None:
            raise ValueError(f"there are no landmarks to align {faces.names[index]} by")
        template = self.crop if method == HR else get_template("sphereface")
        matrix = fit_similarity(faces.landmarks[index : index + 1], template)[0].numpy()
        rows, columns = template.size
        face = self.cv2.warpAffine(photo, matrix, (columns, rows), flags=self.cv2.INTER_CUBIC)
        views = [face, face[:, ::-1]]
        if method != HR:
            small = self.cv2.resize(face, size[::-1], interpolation=self.cv2.INTER_CUBIC)
            views = [self._enlarge(view, method) for view in (small, small[:, ::-1])]
        return torch.cat([self._run(view) for view in views])

    def _enlarge(self, small: NDArray[np.uint8], method: str) -> NDArray[np.uint8]:
        rows, columns = get_template("sphereface").size
        kind = self.cv2.INTER_LINEAR if method == "bilinear" else self.cv2.INTER_CUBIC
        large: NDArray[np.uint8] = self.cv2.resize(small, (columns, rows), interpolation=kind)
        margin = (self.crop.size[1] - columns) // 2  # 8 columns either side for 112x112
        if not margin:
            return large
        edge = self.cv2.BORDER_REPLICATE
        wide: NDArray[np.uint8] = self.cv2.copyMakeBorder(large, 0, 0, margin, margin, edge)
        return wide

    def _run(self, view: NDArray[np.uint8]) -> Tensor:
        rgb = torch.from_numpy(np.ascontiguousarray(view[:, :, ::-1])).permute(2, 0, 1)
        embedding: Tensor = self.encoder(rgb[None].float() / 255)
        return embedding[0]


def _some(pairs: Pairs, count: int) -> Pairs:
    """The first pairs of each kind in each fold, about `count` in all, in the list's order."""
    rank = torch.empty(len(pairs), dtype=torch.int64)
    group = 2 * pairs.fold + pairs.same
    for one in group.unique():
        members = (group == one).nonzero().flatten()
        rank[members] = torch.arange(len(members))
    return pairs.select(rank.argsort(stable=True)[:count].sort().values)
