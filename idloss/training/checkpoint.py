"""Checkpoints that are whole or not there at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from idloss.weights.files import sync

_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial"


class Checkpoints:
    """The newest few states of a run, each a folder that is renamed into place when complete.

    Accelerate writes what is in them: weights, optimizer, scaler, random numbers of each process,
    and the objects registered with it.

    Args:
        folder: Where they are.
        accelerator: Of the run.
        keep: How many stay.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps that there are whole checkpoints of, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.folder / f"step-{step:06d}"

    def save(self, step: int, *, bytes_wanted: int = 0) -> None:
        """Write a checkpoint, then drop those that are too old.

        Every process calls it.

        Args:
            step: The step that was completed last.
            bytes_wanted: What it will take, about.

        Raises:
            OSError: On every process, if any could not write its part; nothing of it is left, and
                earlier checkpoints are untouched.
        """
        target = self.path(step)
        partial = target.with_name(target.name + _PARTIAL)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        failure = None
        try:
            self.check_room(bytes_wanted)
            self.accelerator.save_state(str(partial))
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_about_writing(error):
                raise
            failure = error
        if self._anywhere(failure is not None):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} "
                f"({failure or 'another process failed'}); earlier ones are whole"
            ) from failure
        if self.accelerator.is_main_process:
            _sync_all(partial)
            partial.replace(target)
            sync(self.folder)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
            for left in self.folder.glob(f"*{_PARTIAL}"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, step: int) -> None:
        """Take a state up again, into everything that Accelerate has prepared.

        Args:
            step: One of `steps()`.
        """
        self.accelerator.load_state(str(self.path(step)))

    def check_room(self, bytes_wanted: int) -> None:
        """See whether the disk has room.

        Args:
            bytes_wanted: For what is to be written.

        Raises:
            OSError: It has not.
        """
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(place).free
        if free < bytes_wanted:
            raise OSError(
                f"{self.folder} has {free >> 20} MiB free and {bytes_wanted >> 20} are needed: "
                "make room, or lower keep"
            )

    def _anywhere(self, here: bool) -> bool:
        flag = torch.tensor([float(here)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())


def _is_about_writing(error: Exception) -> bool:
    """Whether it is an error of the disk, for which torch and safetensors have their own words."""
    words = ("iostream", "streamwriter", "unexpected pos", "i/o error")
    return isinstance(error, OSError) or any(word in str(error).lower() for word in words)


def _sync_all(folder: Path) -> None:
    """See to it that a folder's files are on the disk before its name says so."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
