"""A training step, side by side with the released loop's way of doing the same."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from idloss.benchmark.timing import in_own_process, matmul_rate, resident_peak, seconds
from idloss.data import FileFaces, align_all, open_faces
from idloss.degradation import draw_batch, get_degradation
from idloss.geometry import fit_similarity, get_template
from idloss.losses import HallucinationLoss
from idloss.registry import create_srnet
from idloss.resample import Size
from idloss.training.batches import Batch, Crops, Draw, compute_features, shuffled_batches
from idloss.training.engine import Engine, create_accelerator
from idloss.training.recipe import Recipe
from idloss.training.tasks import Hallucination, HallucinationTask

PARTS = ("data", "SR", "losses", "backward", "optimizer")
"""What a step is made of; the FNet is the better part of the losses."""


class TrainingCase(NamedTuple):
    """What `benchmark_training` measures.

    Attributes:
        data: Photos with landmarks, or CelebA, as `open_faces` takes them.
        srnet: The SRNet.
        fnet: The FNet of the identity loss.
        batch: Faces in a step.
        steps: Steps timed.
        warmup: Steps before those, in which kernels are planned and compiled.
        faces: How many of the data are used; they are read again and again.
        precision: Of our way; the released one is float32.
        compile: Of our way.
        device: `"cpu"` or `"cuda"`.
        pretrained: Load the FNet's weights; the times do not depend on them.
    """

    data: str
    srnet: str = "edsr16_64"
    fnet: str = "mobilefacenet"
    batch: int = 64
    steps: int = 12
    warmup: int = 3
    faces: int = 1024
    precision: str = "bf16"
    compile: str = "no"
    device: str = "cpu"
    pretrained: bool = False

    def recipe(self) -> Recipe:
        """The paper's recipe, carried out our way."""
        last = self.warmup + self.steps + 1  # a step is over when the next one begins
        return Recipe.parse(
            {
                "iterations": last,
                "batch_size": self.batch,
                "precision": self.precision,
                "compile": self.compile,
                "device": "cpu" if self.device == "cpu" else "auto",
                "checkpoint_every": last,
                "log_every": last,
                "trackers": (),
            },
            "the benchmark",
        )

    def photos(self) -> FileFaces:
        """The faces."""
        found = open_faces(self.data)
        return found.select(torch.arange(min(self.faces, len(found))))

    def module(self) -> Hallucination:
        """Both networks and the losses, the same in every process."""
        torch.manual_seed(0)
        criterion = HallucinationLoss(
            self.fnet, weight=0.5, crop="sphereface", pretrained=self.pretrained
        )
        return Hallucination(create_srnet(self.srnet), criterion).to(self.device)

    def order(self, recipe: Recipe) -> Iterator[tuple[Tensor, Size]]:
        """The faces and the LR size of each step, the same both ways."""
        for step, places in shuffled_batches(
            min(self.faces, len(open_faces(self.data))), self.batch, seed=recipe.seed
        ):
            if step > recipe.iterations:
                return
            drawn = draw_batch(step, self.batch, seed=recipe.seed, sizes=recipe.lr_sizes())
            yield places, drawn.size


class Measured(NamedTuple):
    """What one way of training costs.

    Attributes:
        name: Which way.
        seconds: Mean time of a step over the sizes, each as likely as the others, of the median
            times of each.
        by_size: Median time of a step at each LR size.
        parts: Median time of each of `PARTS`, measured one by one with the device's queue emptied
            in between: what overlaps in a real step does not here.
        flops: Floating-point operations of a step, mean over the sizes.
        rate: The machine's measured matrix-product rate in the way's precision.
        mebibytes: Peak memory: the device's, or the process's on a CPU.
        faces: Faces in a step.
    """

    name: str
    seconds: float
    by_size: dict[Size, float]
    parts: dict[str, float]
    flops: float
    rate: float
    mebibytes: float
    faces: int


def benchmark_training(case: TrainingCase) -> list[Measured]:
    """Train the same networks on the same faces the released way and ours.

    Args:
        case: What to measure.

    Returns:
        The released way, then ours, each measured in a process of its own.

    Raises:
        ModuleNotFoundError: OpenCV, which the released way runs on, is missing.
        ValueError: There are too few steps to see every size.
    """
    recipe = case.recipe()
    timed = {size for _, size in list(case.order(recipe))[case.warmup : -1]}
    if timed != set(recipe.lr_sizes()):
        raise ValueError(f"{case.steps} steps are too few to see every size: raise --steps")
    return [in_own_process(way, case) for way in (released_way, our_way)]


def format_training(measured: list[Measured]) -> str:
    """Lay the costs out as two Markdown tables.

    Args:
        measured: What `benchmark_training` gave.

    Returns:
        Steps, and their parts.
    """
    sizes = list(measured[0].by_size)
    shown = " | ".join(f"ms at {rows}x{columns}" for rows, columns in sizes)
    lines = [
        f"| | faces/s | speed-up | {shown} | GFLOP | share of matmul rate | peak MiB |",
        "|---|" + "---:|" * (len(sizes) + 5),
    ]
    for one in measured:
        times = " | ".join(f"{one.by_size[size] * 1e3:.0f}" for size in sizes)
        lines.append(
            f"| {one.name} | {one.faces / one.seconds:.1f} "
            f"| {measured[0].seconds / one.seconds:.2f} | {times} | {one.flops / 1e9:.0f} "
            f"| {one.flops / one.seconds / one.rate:.0%} | {one.mebibytes:.0f} |"
        )
    lines += ["", "| ms | " + " | ".join(PARTS) + " |", "|---|" + "---:|" * len(PARTS)]
    for one in measured:
        times = " | ".join(f"{one.parts[part] * 1e3:.0f}" for part in PARTS)
        lines.append(f"| {one.name} | {times} |")
    return "\n".join(lines)


def our_way(case: TrainingCase) -> Measured:
    """The engine, on faces that are aligned and whose HR features are computed already.

    Args:
        case: What to measure.

    Returns:
        What it costs.
    """
    recipe = case.recipe()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = create_accelerator(recipe, Path(folder))
        faces = align_all(case.photos())
        module = case.module()
        identity = module.criterion.identity
        assert identity is not None
        task = _Clocked(
            module,
            Crops(faces, device=accelerator.device, hold=recipe.hold_crops),
            recipe.lr_sizes(),
            get_degradation(recipe.degradation),
            seed=recipe.seed,
            device=case.device,
        )
        features = compute_features(faces, identity, accelerator.device)
        task.take_features(torch.from_numpy(features))
        engine = Engine(task, recipe, Path(folder), accelerator)
        engine.run()
    by_size = _medians(task.times, [size for _, size in case.order(recipe)], case.warmup)
    autocast = accelerator.autocast
    step = _Step(engine.model, engine.optimizer, autocast)
    place = torch.arange(case.batch) % len(faces)

    def data(size: Size) -> Batch:
        draw = Draw(1, place, slice(0, case.batch), case.batch)
        task.sizes = (size,)
        return task.batch(draw, next(task.crops.read([draw]))[1])

    return _summary("idloss", case, by_size, step, data, case.precision)


class _Clocked(HallucinationTask):
    """Notes when each batch is asked for: in between lies a step."""

    def __init__(self, *arguments: Any, device: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.device = device
        self.times: list[float] = []

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        made = super().batches(draws)
        while True:
            self.times.append(time.perf_counter())
            batch = next(made, None)
            if batch is None:
                return
            yield batch


def released_way(case: TrainingCase) -> Measured:
    """The released loop: photos read and aligned with OpenCV each time, float32, HR features anew.

    Four workers decode, align, mirror and down-sample each photo to every size (its loader.py);
    the FNet is run on HR in each step, with its graph (its train.py). The networks are ours, with
    the same weights.

    Args:
        case: What to measure.

    Returns:
        What it costs.

    Raises:
        ModuleNotFoundError: OpenCV is missing.
    """
    recipe, module, faces = case.recipe(), case.module(), case.photos()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    order = list(case.order(recipe))
    loader = DataLoader(
        _ReleasedPhotos(faces),
        batch_sampler=[places.tolist() for places, _ in order],
        num_workers=4,
        multiprocessing_context="spawn",
    )
    identity = module.criterion.identity
    assert identity is not None
    encoder = identity.encoders[0]
    optimizer = torch.optim.Adam(module.srnet.parameters(), lr=1e-4, betas=(0.9, 0.999))

    def losses(sr: Tensor, mr: Tensor, hr: Tensor) -> Tensor:
        image = F.l1_loss(sr * 2 - 1, mr * 2 - 1)
        return image + 0.5 * (1 - F.cosine_similarity(encoder(sr), encoder(hr).detach())).mean()

    forward = _ReleasedForward(module.srnet, losses)
    times = []
    module.train()
    batches = iter(loader)
    for _, size in order:
        _wait(case.device)
        times.append(time.perf_counter())
        batch = {
            name: pixels.to(case.device) for name, pixels in _pick(next(batches), size).items()
        }
        loss = forward(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # its progress bar shows the loss of every step
    by_size = _medians(times, [size for _, size in order], case.warmup)
    photos = _ReleasedPhotos(faces)

    def data(size: Size) -> Batch:
        samples = [photos[i % len(faces)] for i in range(case.batch)]
        stacked = {key: torch.stack([one[key] for one in samples]) for key in samples[0]}
        return {name: x.to(case.device) for name, x in _pick(stacked, size).items()}

    step = _Step(forward, optimizer, nullcontext)
    return _summary("the released way", case, by_size, step, data, "fp32")


class _ReleasedForward(nn.Module):
    def __init__(self, srnet: nn.Module, losses: Callable[..., Tensor]) -> None:
        super().__init__()
        self.srnet = srnet
        self.losses = losses

    def forward(self, lr: Tensor, mr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        return {"loss": self.losses(self.srnet(lr), mr, hr)}


class _ReleasedPhotos(Dataset[dict[int, Tensor]]):
    """Its `CelebADataset`: a photo at a time, aligned and made small with OpenCV.

    Args:
        faces: Photos with landmarks.
    """

    def __init__(self, faces: FileFaces) -> None:
        self.cv2()
        self.faces = faces

    @staticmethod
    def cv2() -> Any:
        """OpenCV, imported where it is used: a module does not travel to a worker."""
        try:
            import cv2
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the released way runs on OpenCV: pip install opencv-python-headless"
            ) from error
        return cv2

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        cv2, faces = self.cv2(), self.faces
        data = np.frombuffer(faces.files.read(faces.members[index]), np.uint8)
        photo = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert faces.landmarks is not None
        template = get_template("sphereface")
        matrix = fit_similarity(faces.landmarks[index : index + 1], template)[0].numpy()
        rows, columns = template.size
        face = cv2.warpAffine(photo, matrix, (columns, rows), flags=cv2.INTER_CUBIC)
        if np.random.random() > 0.5:  # noqa: NPY002 - as there, and nothing depends on it
            face = cv2.flip(face, 1)
        down = {}
        for factor in (1, 2, 4, 8, 16):
            size = (columns // factor, rows // factor)
            small = face if factor == 1 else cv2.resize(face, size, interpolation=cv2.INTER_CUBIC)
            rgb = np.ascontiguousarray(small[:, :, ::-1])
            down[factor] = torch.from_numpy(rgb).permute(2, 0, 1).float().div(255)
        return down


def _pick(down: dict[int, Tensor], size: Size) -> dict[str, Tensor]:
    """What one step uses of all sizes that were made."""
    factor = get_template("sphereface").size[0] // size[0]
    return {"lr": down[factor], "mr": down[factor // 4], "hr": down[1]}


class _Step:
    """One step in parts, for the clock.

    Args:
        model: Gives losses for a batch.
        optimizer: Its optimizer.
        autocast: Context that the forward pass runs in.
    """

    def __init__(self, model: nn.Module, optimizer: Any, autocast: Callable[[], Any]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.autocast = autocast

    def times(self, data: Callable[[], Batch], device: str) -> dict[str, float]:
        """Time of each of `PARTS`."""
        found: dict[str, Any] = {}

        def note(name: str, work: Callable[[], Any]) -> None:
            taken[name] = seconds(lambda: found.__setitem__(name, work()), device)

        taken: dict[str, float] = {}
        note("data", data)
        batch = found["data"]

        def sr_alone() -> None:
            with torch.no_grad(), self.autocast():
                _srnet(self.model)(batch["lr"])

        note("SR", sr_alone)
        note("forward", lambda: self.model(**batch)["loss"])
        note("backward", lambda: found["forward"].backward())
        note("optimizer", lambda: (self.optimizer.step(), self.optimizer.zero_grad()))
        taken["losses"] = max(0.0, taken.pop("forward") - taken["SR"])
        return taken

    def flops(self, batch: Batch) -> int:
        """Operations of a step, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.model(**batch)["loss"].backward()
        self.optimizer.zero_grad()
        return int(counter.get_total_flops())


def _srnet(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "_orig_mod", model)  # compiled
    srnet: nn.Module = inner.srnet
    return srnet


def _summary(
    name: str,
    case: TrainingCase,
    by_size: dict[Size, float],
    step: _Step,
    data: Callable[[Size], Batch],
    precision: str,
) -> Measured:
    if torch.device(case.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(case.device)
    else:
        peak = resident_peak()
    rounds = []
    flops = []
    for size in by_size:
        step.times(lambda size=size: data(size), case.device)  # type: ignore[misc]
        rounds += [
            step.times(lambda size=size: data(size), case.device)  # type: ignore[misc]
            for _ in range(3)
        ]
        flops.append(step.flops(data(size)))
    # every size was measured as often: the mean over all of them is a step's
    parts = {part: statistics.fmean(one[part] for one in rounds) for part in PARTS}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return Measured(
        name,
        statistics.fmean(by_size.values()),
        by_size,
        parts,
        statistics.fmean(flops),
        matmul_rate(case.device, dtype=dtype),
        peak / 2**20,
        case.batch,
    )


def _medians(times: list[float], sizes: list[Size], warmup: int) -> dict[Size, float]:
    """Median time of a step at each size, from the moments at which steps began."""
    taken: dict[Size, list[float]] = {}
    for index, size in enumerate(sizes[:-1]):
        if index >= warmup:
            taken.setdefault(size, []).append(times[index + 1] - times[index])
    return {size: statistics.median(taken[size]) for size in sorted(taken, reverse=True)}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
