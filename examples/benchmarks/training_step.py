"""A training step beside the released loop's way of doing the same.

    python examples/benchmarks/training_step.py celeba_wild.tar --steps 10

The same networks with the same weights, the same faces and sizes in the same order, each way in a
process of its own. The released loop reads, aligns, mirrors and down-samples photos with OpenCV in
four workers (its loader.py), computes in float32 and runs the FNet on HR in every step (its
train.py). Ours is `idloss.training.train` on faces aligned before, its HR features computed before.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import torch
import typer
from released import read_aligned, to_tensor
from timing import count_flops, in_own_process, matmul_rate, now, peak_mebibytes, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from idloss import HallucinationLoss, create_srnet
from idloss.data import FileFaces, align_all, open_faces
from idloss.degradation import BicubicDegradation, draw_batch
from idloss.geometry import get_template
from idloss.resample import Size
from idloss.training import Recipe, load_recipe, train

SIZES: tuple[Size, ...] = ((28, 24), (14, 12), (7, 6))  # the paper's, section 4.1


class Case(NamedTuple):
    """What is measured; precision and compile are of our way, the released one is float32."""

    data: str
    srnet: str = "edsr16_64"
    fnet: str = "mobilefacenet"
    batch: int = 64
    steps: int = 12
    precision: str = "bf16"
    compile: str = "no"
    device: str = "cpu"
    warmup: int = 3  # steps before the timed ones, in which kernels are planned and compiled
    faces: int = 1024  # of the data, read again and again
    workers: int = 4  # that read photos, the released way

    @property
    def last(self) -> int:
        """Steps in all: a step is over when the next one begins."""
        return self.warmup + self.steps + 1

    def photos(self) -> FileFaces:
        """The faces."""
        found = open_faces(self.data)
        if not isinstance(found, FileFaces):
            raise TypeError(f"{self.data} holds crops, and the released way reads photos")
        return found.select(torch.arange(min(self.faces, len(found))))

    def networks(self) -> tuple[nn.Module, HallucinationLoss]:
        """SRNet and losses with random weights, the same in every process."""
        torch.manual_seed(0)
        criterion = HallucinationLoss(
            self.fnet, weight=0.5, crop="sphereface", pretrained=False
        ).to(self.device)
        return create_srnet(self.srnet).to(self.device), criterion

    def sizes(self) -> list[Size]:
        """The LR size of each step, as training draws it."""
        steps = range(1, self.last + 1)
        return [draw_batch(step, self.batch, seed=0, sizes=SIZES).size for step in steps]


class Measured(NamedTuple):
    """What one way costs: median time of a step at each LR size, mean operations, peak memory."""

    name: str
    by_size: dict[Size, float]
    flops: float
    rate: float
    mebibytes: float

    @property
    def seconds(self) -> float:
        """Of a step: the mean over the sizes, each as likely as the others."""
        return statistics.fmean(self.by_size.values())


class _ClockedDegradation(BicubicDegradation):
    """Notes when each batch is made small: between two of them lies a step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        self.times.append(time.perf_counter())
        return super().__call__(hr, size, seeds=seeds)


def our_way(case: Case) -> Measured:
    """The engine, on faces that are aligned and whose HR features are computed already."""
    fields = (
        f"iterations={case.last} checkpoint_every={case.last} log_every={case.last} trackers=[]"
        f" batch_size={case.batch} precision={case.precision} compile={case.compile}"
        f" device={case.device} seed=0"
    )
    recipe = load_recipe("paper_edsr16_64_id", fields.split(), Recipe)
    srnet, criterion = case.networks()
    faces, clock = align_all(case.photos()), _ClockedDegradation()
    with tempfile.TemporaryDirectory(prefix="idloss-") as out:
        train(recipe, out, faces=faces, srnet=srnet, criterion=criterion, degradation=clock)
    return summary("idloss", case, clock.times, stored=True, precision=case.precision)


def released_way(case: Case) -> Measured:
    """Photos read and aligned each time, float32, HR features anew."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    faces = case.photos()
    srnet, criterion = case.networks()
    encoder: Any = criterion.identity.encoders[0] if criterion.identity else None
    rng = np.random.default_rng(0)
    places = [rng.integers(len(faces), size=case.batch).tolist() for _ in range(case.last)]
    loader = DataLoader(
        _ReleasedPhotos(faces),
        batch_sampler=places,
        num_workers=case.workers,
        multiprocessing_context="spawn",
    )
    optimizer = torch.optim.Adam(srnet.parameters(), lr=1e-4, betas=(0.9, 0.999))
    times = []
    batches = iter(loader)
    for size in case.sizes():
        times.append(now(case.device))
        down = {factor: pixels.to(case.device) for factor, pixels in next(batches).items()}
        factor = down[1].shape[-2] // size[0]
        sr = srnet(down[factor])
        identity = 1 - F.cosine_similarity(encoder(sr), encoder(down[1]).detach())
        # it computes on [-1, 1]
        loss = F.l1_loss(sr * 2 - 1, down[factor // 4] * 2 - 1) + 0.5 * identity.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # its progress bar shows the loss of every step
    return summary("the released way", case, times, stored=False, precision="fp32")


class _ReleasedPhotos(Dataset[dict[int, Tensor]]):
    """Its `CelebADataset`: a photo at a time, aligned and made small with OpenCV."""

    def __init__(self, faces: FileFaces) -> None:
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        """RGB in [0, 1] at each factor, `[3, H, W]`; the released loop uses two or three."""
        face = read_aligned(self.faces, index, get_template("sphereface"))
        if np.random.random() > 0.5:  # noqa: NPY002 - as there, and nothing depends on it
            face = cv2.flip(face, 1)
        rows, columns = face.shape[:2]
        down = {}
        for factor in (1, 2, 4, 8, 16):
            size = (columns // factor, rows // factor)
            small = face if factor == 1 else cv2.resize(face, size, interpolation=cv2.INTER_CUBIC)
            down[factor] = to_tensor(small)
        return down


def summary(
    name: str, case: Case, times: Sequence[float], *, stored: bool, precision: str
) -> Measured:
    """Median time of a step at each size, from the moments at which steps began."""
    mebibytes = peak_mebibytes(case.device)
    by_size: dict[Size, list[float]] = {size: [] for size in SIZES}
    steps = list(zip(case.sizes(), pairwise(times), strict=False))
    for size, (start, end) in steps[case.warmup :]:
        by_size[size].append(end - start)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return Measured(
        name,
        {size: statistics.median(taken) for size, taken in by_size.items()},
        statistics.fmean(step_flops(case, size, stored=stored) for size in SIZES),
        matmul_rate(case.device, dtype),
        mebibytes,
    )


def step_flops(case: Case, size: Size, *, stored: bool) -> int:
    """Operations of a step, forward and backward; with stored HR features the FNet sees SR only."""
    srnet, criterion = case.networks()
    lr = torch.rand(case.batch, 3, *size, device=case.device)
    hr = torch.rand(case.batch, 3, *get_template("sphereface").size, device=case.device)
    identity = criterion.identity
    features = identity.embed(hr) if stored and identity is not None else None
    return count_flops(lambda: criterion(srnet(lr), hr, target_features=features)[0].backward())


def compare(case: Case) -> list[Measured]:
    """The released way, then ours."""
    if set(case.sizes()[case.warmup : -1]) != set(SIZES):
        raise ValueError(f"{case.steps} steps are too few to see every size: raise --steps")
    return [in_own_process(way, case) for way in (released_way, our_way)]


def show(case: Case, measured: list[Measured]) -> str:
    """The costs as a table."""
    head = " | faces/s | speed-up" + "".join(f" | ms at {h}x{w}" for h, w in SIZES)
    rows = [
        f"{one.name} | {case.batch / one.seconds:.1f} | {measured[0].seconds / one.seconds:.2f}"
        + "".join(f" | {one.by_size[size] * 1e3:.0f}" for size in SIZES)
        + f" | {one.flops / 1e9:.0f} | {one.flops / one.seconds / one.rate:.0%}"
        + f" | {one.mebibytes:.0f}"
        for one in measured
    ]
    return table(head + " | GFLOP | share of matmul rate | peak MiB", rows)


def main(
    data: Annotated[Path, typer.Argument(help="Photos with landmarks, or CelebA.")],
    srnet: str = "edsr16_64",
    fnet: str = "mobilefacenet",
    batch: int = 64,
    steps: int = 12,
    precision: Annotated[str, typer.Option(help="Of our way: fp32, tf32, bf16, fp16.")] = "bf16",
    compile_mode: Annotated[
        str, typer.Option("--compile", help="Of our way: no, default, reduce-overhead, ...")
    ] = "no",
    device: str = "cpu",
) -> None:
    """Print the table."""
    case = Case(str(data), srnet, fnet, batch, steps, precision, compile_mode, device)
    print(show(case, compare(case)))


if __name__ == "__main__":
    typer.run(main)
