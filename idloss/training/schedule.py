"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn
from torch.optim import Optimizer

from idloss.training.options import RunOptions


def create_optimizer(parameters: Iterable[nn.Parameter], options: RunOptions) -> Optimizer:
    """Make the optimizer, its update fused into one kernel.

    Args:
        parameters: What is trained.
        options: Which optimizer, its rate and weight decay.

    Returns:
        The optimizer.
    """
    common: dict[str, Any] = {
        "lr": options.learning_rate,
        "weight_decay": options.weight_decay,
        "fused": True,
    }
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, **common)


def create_schedule(optimizer: Optimizer, options: RunOptions) -> Scheduler:
    """Make the schedule, which depends on the step alone and so has no state to keep.

    Args:
        optimizer: Whose rate it sets, with `schedule.step_update(step)` before each step.
        options: Which schedule.

    Returns:
        timm's scheduler.
    """
    warmup: dict[str, Any] = {
        "warmup_t": options.warmup,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if options.schedule == "cosine":
        decaying = max(1, options.iterations - options.warmup) + 1  # zero would be one step later
        return CosineLRScheduler(optimizer, t_initial=decaying, **warmup)
    constant = options.schedule == "constant"
    every = options.decay_every or max(1, options.iterations // 2)
    rate = 1.0 if constant else options.decay_rate
    return StepLRScheduler(optimizer, decay_t=every, decay_rate=rate, **warmup)
