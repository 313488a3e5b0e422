"""The Accelerator of a run: device, processes, arithmetic, trackers."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

from idloss.errors import did_you_mean
from idloss.training.options import RunOptions
from idloss.training.tracking import CsvTracker


def create_accelerator(options: RunOptions, folder: Path) -> Accelerator:
    """Make the Accelerator that a run's options ask for, and set the arithmetic.

    Under `torchrun` or `accelerate launch` it joins the other processes.

    Args:
        options: Device, precision, compilation and trackers.
        folder: Where logs go.

    Returns:
        The Accelerator.

    Raises:
        ValueError: A tracker is unknown or not installed, or the device lacks the precision.
    """
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in options.trackers:
        if name not in available:
            raise ValueError(did_you_mean("tracker", name, available) + f". Is {name} installed?")
    # one process may train several times, each in its own arithmetic; Accelerate keeps the first
    alone = not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    plugin = None
    if options.compile != "no":
        # sizes are few and known: a graph for each beats one for all
        plugin = TorchDynamoPlugin(backend="inductor", mode=options.compile, dynamic=False)
    accelerator = Accelerator(
        cpu=options.device == "cpu",
        mixed_precision=options.precision if options.precision in ("bf16", "fp16") else "no",
        dynamo_plugin=plugin,
        log_with=[CsvTracker(folder), *options.trackers],
        project_dir=str(folder),
        # others wait while the main process validates, or computes HR features
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.device.type == "cuda":
        rounded = options.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = rounded
        torch.backends.cudnn.allow_tf32 = rounded
        torch.backends.cudnn.benchmark = True
    return accelerator
