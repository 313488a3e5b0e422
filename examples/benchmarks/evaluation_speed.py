"""`idloss evaluate` beside the released evaluation: the same pairs, cosines and table.

    python examples/benchmarks/evaluation_speed.py lfw.tar

The released way takes a cell of the table after the other, pair by pair, image by image: for each
pair both photos are decoded, aligned and shown to the FNet four times, both faces and their mirror
images, with OpenCV. Our way is all that `idloss evaluate` does but writing files, its cache empty.
Each runs in a process of its own; ours runs at one size too, whose memory tells whether it grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, NamedTuple

import cv2
import numpy as np
import torch
import typer
from huggingface_hub.utils.tqdm import tqdm
from numpy.typing import NDArray
from released import read_aligned, to_tensor
from timing import in_own_process, peak_mebibytes, table
from torch import Tensor, nn

from idloss import FaceEncoder, create_fnet, create_srnet
from idloss.data import EvaluationSet, FileFaces, open_evaluation
from idloss.evaluation import HR, PAPER_SIZES, evaluate
from idloss.geometry import get_template
from idloss.resample import Size, parse_size

METHODS = ("bilinear", "bicubic")
Sizes = tuple[Size, ...]
Scores = dict[tuple[str, Size], NDArray[np.float64]]
Way = Callable[[EvaluationSet, nn.Module, Sizes], Scores]


class Measured(NamedTuple):
    """What one way costs, without imports and lists: two faces for each pair and cell."""

    name: str
    seconds: float
    images: int
    mebibytes: float
    scores: Scores


def measure(
    name: str, way: Way, sizes: Sizes, data: str, fnet: str, count: int | None, pretrained: bool
) -> Measured:
    """Run one way in this process, on `count` pairs of LFW (None for all)."""
    found = open_evaluation(data)
    if found.pairs is None:
        raise ValueError(f"{data} has no pairs; put pairs.txt beside it")
    if count is not None:  # from all over the list, which goes from fold to fold
        places = torch.linspace(0, len(found.pairs) - 1, count).long()
        found = replace(found, pairs=found.pairs.select(places))
    torch.manual_seed(0)  # random weights are the same in every process
    network = create_fnet(fnet, pretrained=pretrained)
    start = time.perf_counter()
    scores = way(found, network, sizes)
    taken = time.perf_counter() - start
    images = 2 * sum(map(len, scores.values()))
    return Measured(name, taken, images, peak_mebibytes(), scores)


def our_way(data: EvaluationSet, fnet: nn.Module, sizes: Sizes) -> Scores:
    """Cosines by method and size, from `idloss.evaluation.evaluate`."""
    srnets = {name: create_srnet(name) for name in METHODS}
    results = evaluate(data, {"fnet": fnet}, srnets, sizes, device="cpu", cache=False)
    return {
        (cell.srnet, (cell.height, cell.width)): arrays["scores"].astype(np.float64)
        for cell, arrays in results.arrays.items()
    }


def released_way(data: EvaluationSet, fnet: nn.Module, sizes: Sizes) -> Scores:
    """Cosines by method and size, image by image."""
    pairs, faces = data.pairs, data.faces
    if pairs is None or not isinstance(faces, FileFaces):
        raise TypeError(f"{data.name} must hold pairs of photos")
    encoder = FaceEncoder(fnet)
    full = get_template("sphereface").size
    cells = [(HR, full), *((method, size) for method in METHODS for size in sizes)]
    scores: Scores = {}
    bar = tqdm(total=len(cells) * len(pairs), unit="pair", desc="the released way", delay=2)
    with bar, torch.inference_mode():
        for method, size in cells:
            cosines = []
            for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
                gallery = embed(faces, first, encoder, HR, full)
                probe = embed(faces, second, encoder, method, size)
                cosines.append(float(torch.nn.functional.cosine_similarity(gallery, probe, dim=0)))
                bar.update()
            scores[method, size] = np.array(cosines)
    return scores


def embed(faces: FileFaces, index: int, encoder: FaceEncoder, method: str, size: Size) -> Tensor:
    """Decode, align, degrade, enlarge, mirror and embed one face: `[2 D]`."""
    own = encoder.fnet_crop or get_template("sphereface")
    if method == HR:
        face = read_aligned(faces, index, own)
        views = [face, face[:, ::-1]]
    else:
        face = read_aligned(faces, index, get_template("sphereface"))
        rows, columns = face.shape[:2]
        margin = (own.size[1] - columns) // 2  # 8 columns either side for 112x112
        kind = cv2.INTER_LINEAR if method == "bilinear" else cv2.INTER_CUBIC
        small = cv2.resize(face, size[::-1], interpolation=cv2.INTER_CUBIC)
        views = [
            cv2.copyMakeBorder(
                cv2.resize(view, (columns, rows), interpolation=kind),
                *(0, 0, margin, margin),
                cv2.BORDER_REPLICATE,
            )
            for view in (small, small[:, ::-1])
        ]
    return torch.cat([encoder(to_tensor(view)[None])[0] for view in views])


def compare(
    data: str,
    fnet: str = "mobilefacenet",
    sizes: Sizes = PAPER_SIZES["verification"],
    count: int | None = None,
    pretrained: bool = True,
) -> list[Measured]:
    """The released way, ours, and ours at a single size."""
    ways = {
        "the released way": (released_way, sizes),
        f"idloss, {len(sizes)} sizes": (our_way, sizes),
        "idloss, 1 size": (our_way, sizes[-1:]),
    }
    return [
        in_own_process(measure, name, *way, data, fnet, count, pretrained)
        for name, way in ways.items()
    ]


def show(measured: list[Measured]) -> str:
    """The costs as a table, and the largest difference between the two ways' cosines."""
    reference, ours = measured[:2]
    rows = []
    for one in measured:
        rate = one.images / one.seconds
        gain = rate * reference.seconds / reference.images
        numbers = f"{one.seconds:.1f} | {rate:.1f} | {gain:.2f} | {one.mebibytes:.0f}"
        rows.append(f"{one.name} | {numbers}")
    apart = max(np.abs(row - ours.scores[cell]).max() for cell, row in reference.scores.items())
    shown = table(" | s | images/s | speed-up | peak MiB", rows)
    return f"{shown}\n\nThe cosines of the two ways differ by {apart:.4f} at most."


def main(
    data: Annotated[str, typer.Argument(help="LFW, with pairs.txt and landmarks beside it.")],
    fnet: str = "mobilefacenet",
    size: Annotated[list[str] | None, typer.Option(help="[default: those of Table 1]")] = None,
    pairs: Annotated[int | None, typer.Option(min=20, help="[default: all]")] = None,
    pretrained: Annotated[bool, typer.Option(help="Times do not depend on weights.")] = True,
) -> None:
    """Print the table."""
    sizes = tuple(map(parse_size, size)) if size else PAPER_SIZES["verification"]
    print(show(compare(data, fnet, sizes, pairs, pretrained)))


if __name__ == "__main__":
    typer.run(main)
