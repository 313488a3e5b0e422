"""The engine: trains any task, on one device or many, and survives being killed."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub.utils.tqdm import tqdm
from safetensors.torch import save_file
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from idloss.training.checkpoint import Checkpoints
from idloss.training.options import RunOptions
from idloss.training.schedule import create_optimizer, create_schedule
from idloss.training.signals import stop_signals
from idloss.training.task import Batch, Draw, Task, shares, shuffled_batches
from idloss.training.tracking import VALIDATION

Validate = Callable[[nn.Module, int], dict[str, float]]
"""Judges the network after a step: figures by name. Called on the main process alone."""

GIVE_UP_AFTER = 10
"""Steps in a row that may be skipped for a loss that is not finite."""


class TrainingStoppedError(RuntimeError):
    """A run that ended before its time; its message says why, and how to go on."""


class Engine:
    """Trains a task.

    What comes out depends on the task and the options alone, not on the number of processes, the
    parts a step is computed in, or interruptions; only rounding does.

    Args:
        task: What to train; its module is moved to the accelerator's device.
        options: How.
        folder: Where checkpoints and logs go.
        accelerator: From `create_accelerator`, which the task's data are on already.
        validate: Judges the network every `validate_every` steps and at the end.
        validate_every: Steps; 0 for the end alone.

    Raises:
        ValueError: Options that do not fit together or the task.
        OSError: The disk has no room for the checkpoints.
    """

    def __init__(
        self,
        task: Task,
        options: RunOptions,
        folder: Path,
        accelerator: Accelerator,
        *,
        validate: Validate | None = None,
        validate_every: int = 0,
    ) -> None:
        self.task = task
        self.options = options
        self.folder = folder
        self.accelerator = accelerator
        self.validate = validate
        self.validate_every = validate_every
        self.shares = shares(
            options.batch_size,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            accumulate=options.accumulate,
        )
        next(shuffled_batches(len(task), options.batch_size, seed=0))  # enough faces for one
        trained = [p for p in task.module.parameters() if p.requires_grad]
        if not trained:
            kind = type(task.network).__name__
            raise ValueError(f"{kind} has nothing to train: choose a network that learns")
        if options.channels_last:
            task.module.to(memory_format=torch.channels_last)
        if options.grad_checkpointing:
            _checkpoint_activations(task.network)
        task.module.to(accelerator.device).train()
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if self.sharded:  # whole weights for whoever asks for the network
            self._twin = copy.deepcopy(task.network)
        self._place = _place_of(task.network, task.module)
        self.ema = self._average(options.ema) if options.ema else None
        optimizer = create_optimizer(trained, options)
        self.schedule = create_schedule(optimizer, options)
        self.model, self.optimizer = accelerator.prepare(task.module, optimizer)
        self.progress = _Progress(task.content)
        accelerator.register_for_checkpointing(self.progress)
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)
        self.checkpoints = Checkpoints(folder / "checkpoints", accelerator, options.keep)
        copies = 3 if options.optimizer != "sgd" else 2  # weights and moments
        weights = sum(p.numel() * p.element_size() for p in trained)
        self.checkpoint_bytes = weights * (copies + bool(options.ema)) + (1 << 20)
        self._skipped = 0

    def _average(self, decay: float) -> ModelEmaV3:
        if self.sharded:
            raise ValueError("ema is not kept of weights that FSDP shards: unset ema, or use DDP")
        return ModelEmaV3(self.task.network, decay=decay, use_warmup=True)

    def network(self) -> nn.Module:
        """The network that is kept: the moving average where there is one.

        Every process calls it; where weights are sharded, the main process gets them all.
        """
        if self.ema is not None:
            averaged: nn.Module = self.ema.module
            return averaged
        if not self.sharded:
            return self.task.network
        whole = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            own = {k: v for k, v in whole.items() if k.startswith(self._place)}
            self._twin.load_state_dict({k.removeprefix(self._place): v for k, v in own.items()})
        return self._twin

    def run(self, *, resume: bool = False) -> nn.Module:
        """Train to the last step.

        Args:
            resume: Go on from the newest checkpoint in the folder; from the start if there is none.

        Returns:
            The network, in eval mode.

        Raises:
            TrainingStoppedError: A loss was not finite, or a signal asked to stop; says how to go
                on.
            FileExistsError: The folder holds a run and `resume` is False.
            OSError: There is no room for the last checkpoint.
        """
        start = self._take_up(resume=resume)
        self._begin_logs(start)
        try:
            with stop_signals() as asked:
                self._train(start, asked)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.network().eval()

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
        if start and self._validates(start):  # the checkpoint was written first
            self._validate(start)
        self._clock = time.perf_counter(), start
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
                if self._validates(step):
                    self._validate(step)
                if stop and not last:
                    raise TrainingStoppedError(
                        f"stopped after step {step} of {options.iterations}, as asked; resume to "
                        "go on"
                    )

    def _validates(self, step: int) -> bool:
        due = self.validate_every and step % self.validate_every == 0
        return self.validate is not None and bool(due or step == self.options.iterations)

    def _take_up(self, *, resume: bool) -> int:
        steps = self.checkpoints.steps()
        if not steps:
            self.accelerator.wait_for_everyone()
            self.checkpoints.check_room(self.checkpoint_bytes * (self.options.keep + 1))
            return 0
        if not resume:
            raise FileExistsError(
                f"{self.folder} holds a run, checkpointed at step {steps[-1]}: resume it, or "
                "choose another folder"
            )
        self.checkpoints.load(steps[-1])
        if self.progress.content != self.task.content:
            raise ValueError(
                f"the run in {self.folder} was on other faces than these: give it the same data, "
                "or choose another folder"
            )
        return steps[-1]

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
        names = list(losses)
        *values, stopped = read()
        if not all(map(math.isfinite, values)):
            self._refuse(step, dict(zip(names, values, strict=True)), held)
        else:
            self._skipped = 0
            if self.options.clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(self.task.network, step=step)
            self.progress.add(names, values)
        self.optimizer.zero_grad()
        return stopped > 0

    def _refuse(self, step: int, losses: dict[str, float], batches: list[Batch]) -> None:
        process = self.accelerator.process_index
        path = self.folder / f"not-finite-step-{step:06d}-process-{process}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                f"{part}/{name}": tensor.detach().cpu().contiguous()
                for part, batch in enumerate(batches)
                for name, tensor in batch.items()
            },
            path,
        )
        self._skipped += 1
        shown = ", ".join(f"{name} {value}" for name, value in losses.items())
        what = f"step {step} has a loss that is not finite ({shown}); its batch is in {path}"
        if self.options.non_finite == "stop":
            raise TrainingStoppedError(
                f"{what}. Resume with non_finite=skip to leave it out, or lower learning_rate, set "
                "clip or take precision=fp32"
            )
        if self._skipped == GIVE_UP_AFTER:
            raise TrainingStoppedError(
                f"{what}, like those of the {GIVE_UP_AFTER - 1} steps before: the weights are "
                "lost. Resume from a checkpoint with a lower learning_rate, clip or precision=fp32"
            )
        self.accelerator.print(f"skipped: {what}")

    def _begin_logs(self, start: int) -> None:
        self.accelerator.init_trackers("logs")
        if self.accelerator.is_main_process:
            self.accelerator.get_tracker("csv").cut(start)

    def _log(self, step: int) -> str:
        then, since = self._clock
        now = time.perf_counter()
        rate = (step - since) * self.options.batch_size / max(now - then, 1e-9)
        self._clock = now, step
        means = self.progress.take_means()
        if not means:  # every step was skipped
            return ""
        values = {**means, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.accelerator.log({**values, "faces_per_second": round(rate, 2)}, step=step)
        shown = [f"{name} {value:.4f}" for name, value in means.items()]
        return ", ".join([*shown, f"{rate:.0f} faces/s"])

    def _save(self, step: int, *, must: bool) -> int | None:
        """Write a checkpoint if there is room and the weights are sound."""
        if not all(bool(_local(p).isfinite().all()) for p in self.model.parameters()):
            raise TrainingStoppedError(
                f"weights are not finite after step {step}; the checkpoints before are sound: "
                "resume with a lower learning_rate or clip"
            )
        try:
            self.checkpoints.save(step, bytes_wanted=self.checkpoint_bytes)
        except OSError as error:
            if must:
                raise
            self.accelerator.print(f"{error}. Training goes on; make room")
            return None
        return step

    def _validate(self, step: int) -> None:
        network = self.network()
        if self.accelerator.is_main_process and self.validate is not None:
            # a copy: who judges may move it, or lay its weights out anew
            figures = self.validate(copy.deepcopy(network), step)
            self.accelerator.log(
                {f"{VALIDATION}{name}": value for name, value in figures.items()}, step=step
            )
        self.accelerator.wait_for_everyone()
        self.model.train()
        self._clock = time.perf_counter(), step


class _Progress:
    """What of a run's state is neither weights nor optimizer."""

    def __init__(self, content: str) -> None:
        self.content = content
        self.sums: dict[str, float] = {}
        self.count = 0

    def add(self, names: list[str], values: list[float]) -> None:
        for name, value in zip(names, values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def take_means(self) -> dict[str, float]:
        means = {name: value / self.count for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def _place_of(network: nn.Module, module: nn.Module) -> str:
    """What the names of a network's weights begin with in the state dict of what holds it."""
    names = (name for name, one in module.named_modules() if one is network)
    return "".join(f"{name}." for name in [next(names)] if name)


def _local(parameter: Tensor) -> Tensor:
    """This process's shard of a weight, or all of it."""
    shard: Tensor = getattr(parameter, "to_local", lambda: parameter)()
    return shard.detach()


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


def _checkpoint_activations(network: nn.Module) -> None:
    """By timm's convention: the network knows where."""
    enable = getattr(network, "set_grad_checkpointing", None)
    if enable is None:
        raise ValueError(
            f"{type(network).__name__} has no set_grad_checkpointing: unset grad_checkpointing"
        )
    enable(True)
