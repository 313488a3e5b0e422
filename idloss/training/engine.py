"""The engine: trains any task, on one device or many, and survives being killed."""

from __future__ import annotations

import atexit
import csv
import ctypes
import gc
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, TorchDynamoPlugin
from huggingface_hub.utils.tqdm import tqdm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from idloss.encoder import resolve_device
from idloss.errors import did_you_mean, some_of
from idloss.training.batches import Batch, Draw, shares, shuffled_batches
from idloss.training.recipe import RunOptions
from idloss.training.saving import Checkpoints, first_line, together
from idloss.training.tasks import FaceTask
from idloss.weights.files import written_whole

Validate = Callable[[nn.Module, int], dict[str, float]]
"""Judges the network after a step: figures by name. Called on the main process alone; the network
is the one that trains, and is to be left as it was."""

GIVE_UP_AFTER = 10
"""Steps in a row that may be skipped for a loss that is not finite."""

VALIDATION = "validation/"
"""What names of validation figures begin with."""

_SHARDED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


class TrainingStoppedError(RuntimeError):
    """A run that ended before its time; its message says why, and how to go on."""


def create_accelerator(options: RunOptions, folder: Path) -> Accelerator:
    """Make the Accelerator that a run's options ask for, and set the arithmetic.

    Under `torchrun` or `accelerate launch` it joins the other processes.
    """
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in options.trackers:
        if name not in available:
            raise ValueError(did_you_mean("tracker", name, available) + f". Is {name} installed?")
    device, started = resolve_device(options.device), int(os.environ.get("WORLD_SIZE", "1"))
    if device.index is not None:
        if started > 1:
            raise ValueError(
                f"device={options.device} is one device and {started} processes were started: set "
                "device=auto (and CUDA_VISIBLE_DEVICES to choose some)"
            )
        torch.cuda.set_device(device)
    # one process may train several times, each in its own arithmetic; Accelerate keeps the first
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    plugin = None
    if options.compile != "no":
        # sizes are few and known: a graph for each beats one for all
        plugin = TorchDynamoPlugin(backend="inductor", mode=options.compile, dynamic=False)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=options.precision if options.precision in ("bf16", "fp16") else "no",
        dynamo_plugin=plugin,
        log_with=[CsvTracker(folder), *options.trackers],
        project_dir=str(folder),
        # others wait while the main process validates, or computes HR features
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started and on {accelerator.device} they do not join: "
            "start one, or set device=cpu"
        )
    if started > 1 and accelerator.device.type == "cpu":
        # else gloo's threads may outlive what they use, and abort a run that is done: the last run
        # first, so the group goes, and then what an error that was dealt with still holds of it
        atexit.register(gc.collect)
        atexit.register(accelerator.state.destroy_process_group)
    if accelerator.distributed_type in _SHARDED:
        raise ValueError(
            f"weights are not sharded here ({accelerator.distributed_type.value}): launch with "
            "torchrun, or accelerate launch --multi_gpu"
        )
    if accelerator.device.type == "cuda":
        rounded = options.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = rounded
        torch.backends.cudnn.allow_tf32 = rounded
        torch.backends.cudnn.benchmark = True
    return accelerator


class Engine:
    """Trains a task; `validate` judges the network every `validate_every` steps and at the end.

    What comes out depends on the task and the options alone, not on the number of processes, the
    parts a step is computed in, or interruptions; only rounding does. Checkpoints and logs go to
    the folder.
    """

    def __init__(
        self,
        task: FaceTask,
        options: RunOptions,
        folder: Path,
        accelerator: Accelerator,
        *,
        validate: Validate | None = None,
    ) -> None:
        self.task = task
        self.options = options
        self.folder = folder
        self.accelerator = accelerator
        self.validate = validate
        process, processes = accelerator.process_index, accelerator.num_processes
        self.shares = shares(options.batch_size, process, processes, options.accumulate)
        kind = type(task.network).__name__
        next(shuffled_batches(len(task), options.batch_size, seed=0))  # enough faces for one
        trained = [p for p in task.module.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{kind} has nothing to train: choose a network that learns")
        if options.channels_last:
            task.module.to(memory_format=torch.channels_last)
        if options.grad_checkpointing:
            enable = getattr(task.network, "set_grad_checkpointing", None)  # timm's convention
            if enable is None:
                raise ValueError(f"{kind} has no set_grad_checkpointing: unset grad_checkpointing")
            enable(True)
        task.module.to(accelerator.device).train()
        if accelerator.device.type == "cpu":
            _keep_freed_memory()
        self.ema: ModelEmaV3 | None = None
        if options.ema is not None:
            try:
                self.ema = ModelEmaV3(task.network, decay=options.ema, use_warmup=True)
            except RuntimeError as error:
                raise ValueError(
                    f"ema needs a copy of {kind}, which has none ({first_line(error)}): unset ema"
                ) from error
        optimizer = create_optimizer(trained, options)
        self.schedule = create_schedule(optimizer, options)
        self.model, self.optimizer = accelerator.prepare(task.module, optimizer)
        self.losses: list[dict[str, float]] = []  # of steps since the last row of the log
        copies = 3 if options.optimizer != "sgd" else 2  # weights and moments
        weights = sum(p.numel() * p.element_size() for p in trained)
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            accelerator,
            keep=options.keep_checkpoints,
            size=weights * (copies + bool(options.ema)) + (1 << 20),
        )
        self._skipped = 0

    @property
    def network(self) -> nn.Module:
        """The network that is kept: the moving average where there is one."""
        return self.task.network if self.ema is None else self.ema.module

    def run(
        self, *, resume: bool = False, on_start: Callable[[int], object] | None = None
    ) -> nn.Module:
        """Train to the last step, from the newest whole checkpoint if there is one to `resume`.

        The main process is told by `on_start` after which step the run goes on, before it does.
        """
        start = self._take_up(resume=resume)
        self.accelerator.init_trackers("logs")

        def begin() -> None:
            self.accelerator.get_tracker("csv").cut(start)
            if on_start is not None:
                on_start(start)

        together(self.accelerator, begin)
        try:
            with _stop_signals() as asked:
                self._train(start, asked)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.network.eval()

    def _train(self, start: int, asked: list[int]) -> None:
        options, saved = self.options, start
        batches = iter(self.task.batches(self._draws(start + 1)))
        bar = tqdm(
            total=options.iterations,
            initial=start,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        if start:
            self._validate_if_due(start)  # the checkpoint was written first
        self._clock, self._first = (time.perf_counter(), start), start + 1
        with bar:
            for step in range(start + 1, options.iterations + 1):
                self.schedule.step_update(step)
                stop = self._step(step, batches, stop=bool(asked))
                last = step == options.iterations
                logs = step % options.log_every == 0 or last
                bar.update()
                if logs:
                    bar.set_postfix_str(self._log(step))
                overdue = logs and step - saved > options.checkpoint_every  # there was no room
                if step % options.checkpoint_every == 0 or overdue or last or stop:
                    saved = self._save(step, must=last or stop) or saved
                self._validate_if_due(step)
                if stop and not last:
                    where = f"step {step} of {options.iterations}"
                    raise TrainingStoppedError(f"stopped after {where}, as asked; resume to go on")

    def _take_up(self, *, resume: bool) -> int:
        """Load the newest whole checkpoint, and tell its step."""
        steps = self.checkpoints.steps()
        if not steps:
            self.accelerator.wait_for_everyone()
            self.checkpoints.check_room(self.options.keep_checkpoints + 1)
            return 0
        if not resume:
            raise FileExistsError(
                f"{self.folder} holds a run, checkpointed at step {steps[-1]}: resume it, or "
                "choose another folder"
            )
        step = self.checkpoints.newest_whole()
        if step > self.options.iterations:
            raise ValueError(
                f"the run in {self.folder} is at step {step}, beyond "
                f"iterations={self.options.iterations}: raise iterations"
            )
        progress = self.checkpoints.load(step, self.ema)
        self.losses = progress["losses"]
        for group in self.optimizer.param_groups:  # the schedule sets the rate anew
            group["weight_decay"] = self.options.weight_decay
        if progress["content"] != self.task.content:
            faces, before = self.task.crops.faces, progress.get("faces", "others")
            gone = some_of([str(fault) for fault in faces.skipped], 3)
            raise ValueError(
                f"the run in {self.folder} was on other faces than these: {before} then, "
                f"{len(faces)} now (left out: {gone}). Their order hangs on all of them: put back "
                "what is gone or changed, from a copy, or train anew in another folder"
            )
        return step

    def _draws(self, start: int) -> Iterator[Draw]:
        options = self.options
        steps = shuffled_batches(len(self.task), options.batch_size, seed=options.seed, start=start)
        for step, faces in steps:
            if step > options.iterations:
                return
            for rows in self.shares:
                yield Draw(step, faces[rows], rows, options.batch_size)

    def _step(self, step: int, batches: Iterator[Batch], *, stop: bool) -> bool:
        """One optimizer step; returns whether any process was asked to stop."""
        held: list[Batch] = []
        found: list[Tensor] = []
        parts = len(self.shares)
        for part in range(parts):
            held.append(next(batches))
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                if self.options.compile != "no":  # seconds to import
                    torch.compiler.cudagraph_mark_step_begin()
                losses = self.model(**held[-1])
                found.append(torch.stack([loss.detach().float() for loss in losses.values()]))
                if last:
                    # on its way to the host while the device is busy with the backward pass: that
                    # it is looked at before the optimizer moves costs no time
                    flag = found[0].new_full((1,), float(stop))
                    row = torch.cat((torch.stack(found).mean(0), flag))
                    read = _sent_to_host(self.accelerator.reduce(row, "mean"))
                self.accelerator.backward(losses["loss"] / parts)
        *values, stopped = read()
        figures = dict(zip(losses, values, strict=True))
        if step == self._first and not any(
            p.grad is not None and bool(p.grad.any()) for p in self.task.network.parameters()
        ):
            raise ValueError(
                f"no gradient reaches the weights of {type(self.task.network).__name__}: does its "
                "forward detach, or run under no_grad?"
            )
        if not all(map(math.isfinite, values)):
            self._refuse(step, figures, held)
        else:
            self._skipped = 0
            if self.options.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.task.network, step=step)
            self.losses.append(figures)
        self.optimizer.zero_grad()
        return stopped > 0

    def _refuse(self, step: int, losses: dict[str, float], batches: list[Batch]) -> None:
        process = self.accelerator.process_index
        path = self.folder / f"not-finite-step-{step:06d}-process-{process}.safetensors"
        tensors = {
            f"{part}/{name}": tensor.detach().cpu().contiguous()
            for part, batch in enumerate(batches)
            for name, tensor in batch.items()
        }
        kept = f"its batch is in {path}"
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            kept = f"its batch cannot be kept ({error})"
        self._skipped += 1
        shown = ", ".join(f"{name} {value}" for name, value in losses.items())
        what = f"step {step} has a loss that is not finite ({shown}); {kept}"
        calmer = "with a lower learning_rate, clip_norm or precision=fp32"
        if self.options.non_finite == "stop":
            raise TrainingStoppedError(
                f"{what}. Resume with non_finite=skip to leave it out, or {calmer}"
            )
        if self._skipped == GIVE_UP_AFTER:
            raise TrainingStoppedError(
                f"{what}, like those of the {GIVE_UP_AFTER - 1} steps before: the weights are "
                f"lost. Resume {calmer}"
            )
        self.accelerator.print(f"skipped: {what}")

    def _log(self, step: int) -> str:
        then, since = self._clock
        self._clock = time.perf_counter(), step
        rate = (step - since) * self.options.batch_size / max(self._clock[0] - then, 1e-9)
        taken, self.losses = self.losses, []
        if not taken:  # every step was skipped
            return ""
        means = {name: sum(one[name] for one in taken) / len(taken) for name in taken[0]}
        values = {**means, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.accelerator.log({**values, "faces_per_second": round(rate, 2)}, step=step)
        return ", ".join([*(f"{name} {means[name]:.4f}" for name in means), f"{rate:.0f} faces/s"])

    def _save(self, step: int, *, must: bool) -> int | None:
        """Write a checkpoint if there is room and the weights are sound."""
        if not all(bool(p.detach().isfinite().all()) for p in self.model.parameters()):
            raise TrainingStoppedError(
                f"weights are not finite after step {step}; the checkpoints before are sound: "
                "resume with a lower learning_rate or clip_norm"
            )
        try:
            faces = {"content": self.task.content, "faces": len(self.task)}
            progress = {**faces, "losses": self.losses}
            self.checkpoints.save(step, progress, self.ema)
        except OSError as error:
            if must:
                raise
            print(f"{error}. Training goes on; make room")
            return None
        return step

    def _validate_if_due(self, step: int) -> None:
        every = self.options.validate_every
        due = every and step % every == 0
        if self.validate is None or not (due or step == self.options.iterations):
            return
        figures: dict[str, float] = {}
        judge = self.validate
        together(self.accelerator, lambda: figures.update(judge(self.network.eval(), step)))
        named = {f"{VALIDATION}{name}": value for name, value in figures.items()}
        self.accelerator.log(named, step=step)  # the main process does
        self.model.train()
        self._clock = time.perf_counter(), step


class CsvTracker(GeneralTracker):
    """Writes `training.csv` and `validation.csv` into a folder, a row a step."""

    name = "csv"
    requires_logging_directory = False

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.paths = folder / "training.csv", folder / "validation.csv"
        self._waiting: dict[Path, list[list[Any]]] = {path: [] for path in self.paths}

    @property
    def tracker(self) -> Path:
        """The folder, as Accelerate wants to know it."""
        return self.folder

    def cut(self, start: int) -> None:
        """Drop the rows of a run that was cut off; what goes on after `start` writes them again."""
        for path, last in zip(self.paths, (start, start - 1), strict=True):
            if not path.exists():
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            head, *rows = text.splitlines(keepends=True) or [""]
            whole = (row for row in rows if re.fullmatch(r"\d+,.*\n", row))
            kept = [row for row in whole if int(row.split(",")[0]) <= last]
            if not kept:
                path.unlink()
            elif len(kept) < len(rows):
                with written_whole(path) as temporary:
                    temporary.write_text(head + "".join(kept), encoding="utf-8")

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Add a row of figures by name; rows that the disk has no room for wait for the next."""
        path = self.paths[any(name.startswith(VALIDATION) for name in values)]
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        waiting = self._waiting[path]
        if not size and not waiting:
            waiting.append(["step", *(name.removeprefix(VALIDATION) for name in values)])
        waiting.append([step, *values.values()])
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(waiting)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)  # no half of a row
            print(
                f"{path} cannot be written ({error}): its rows are kept and training goes on. Make "
                "room; a new run goes to another disk with another folder (--out)"
            )
        else:
            waiting.clear()


def create_optimizer(parameters: Iterable[nn.Parameter], options: RunOptions) -> Optimizer:
    """The optimizer by name, its update fused into one kernel; SGD has Nesterov's momentum."""
    optimizer: Optimizer = create_optimizer_v2(
        list(parameters),
        options.optimizer,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        momentum=0.9,
        fused=True,
    )
    return optimizer


def create_schedule(optimizer: Optimizer, options: RunOptions) -> Scheduler:
    """Timm's scheduler: `step_update(step)` before each step sets the rate by the step alone."""
    warmup: Any = {"warmup_t": options.warmup, "warmup_prefix": True, "t_in_epochs": False}
    if options.schedule == "cosine":
        decaying = max(1, options.iterations - options.warmup) + 1  # zero would be one step later
        return CosineLRScheduler(optimizer, t_initial=decaying, **warmup)
    every = options.decay_every or max(1, options.iterations // 2)
    rate = 1.0 if options.schedule == "constant" else options.decay_rate
    return StepLRScheduler(optimizer, decay_t=every, decay_rate=rate, **warmup)


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step, instead of giving the large ones back.

    Each is given back and faulted in again many times a step otherwise; that took 5 to 15 % of a
    step of EDSR 16x64 on one core, and more where threads fight for the memory map.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        most_mapped, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of ending; a second one interrupts."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sent_to_host(row: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a few numbers to the host; the answer waits for them and nothing else."""
    host = row.to("cpu", non_blocking=True)
    if row.device.type != "cuda":
        return host.tolist
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        values: list[float] = host.tolist()
        return values

    return read
