"""What a run leaves on disk: checkpoints, whole or not there at all, and the trained network."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import is_model
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from idloss.create import create_fnet, create_srnet
from idloss.weights.files import file_sha256, sync

_CHECKPOINT = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial"
_HASHES = "sha256.json"
_PROGRESS = "progress.json"
_AVERAGE = "average.safetensors"
_NO_DISK = 10_000  # more than there are processes
_UNFIT = (pickle.UnpicklingError, SafetensorError, KeyError, TypeError, RuntimeError)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INPUT_FACTS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("num_classes", "pool_size", "first_conv", "classifier"),
)
"""What a saved network keeps of its `pretrained_cfg`: the rest told whose weights it began with."""
Kind = Literal["srnet", "fnet"]
_CREATE: Mapping[str, Callable[..., nn.Module]] = {"srnet": create_srnet, "fnet": create_fnet}


@dataclass(frozen=True)
class Checkpoints:
    """The newest few states of a run, each a folder that is renamed into place when complete.

    Accelerate writes weights, optimizer, scaler and the random numbers of each process. Its own
    rotation deletes the oldest state before it writes the next, and in place: killed then, a run
    would have none. Nothing is read back that could run code, and nothing whose hash has changed.
    One takes about `size` bytes, and `keep` of them stay.
    """

    folder: Path
    accelerator: Accelerator
    keep: int
    size: int

    def steps(self) -> list[int]:
        """Steps that there are checkpoints of, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, progress: Mapping[str, Any], ema: ModelEmaV3 | None) -> None:
        """Write a checkpoint, then drop those that are too old; every process calls it.

        An OSError reaches every process if any could not write its part; nothing of it is left
        then, and earlier checkpoints are untouched.
        """
        target = self._path(step)
        partial = target.with_name(target.name + _PARTIAL)

        def write() -> None:
            self.check_room()
            self.accelerator.save_state(str(partial))
            if self.accelerator.is_main_process:
                (partial / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
                if ema is not None:
                    save_file(plain_state(ema.module), partial / _AVERAGE)

        def settle() -> None:
            hashes = {path.name: file_sha256(path) for path in partial.iterdir()}
            (partial / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                sync(path)
            shutil.rmtree(target, ignore_errors=True)  # one that was damaged
            partial.replace(target)
            sync(self.folder)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self._path(old))

        try:
            together(self.accelerator, self._drop_partial)
            together(self.accelerator, write, everywhere=True)
            together(self.accelerator, settle)
        except OSError as error:
            if self.accelerator.is_main_process:
                self._drop_partial()
            raise OSError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({error}); "
                "earlier ones are whole"
            ) from error

    def newest_whole(self) -> int:
        """The newest step whose files are all as they were written; says which were passed over."""
        whole, damaged = 0, []
        if self.accelerator.is_main_process:
            self._drop_partial()
            for step in reversed(self.steps()):
                wrong = self._damage(self._path(step))
                if not wrong:
                    whole = step
                    break
                damaged.append(f"{self._path(step)}: {wrong}")
        told = torch.tensor([float(whole)], device=self.accelerator.device)
        whole = int(self.accelerator.reduce(told, "sum").item())
        if not whole:
            raise OSError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(damaged)}): train anew in "
                "another folder"
            )
        if damaged:
            print(f"damaged: {'; '.join(damaged)}. Going on from step {whole}")
        return whole

    def load(self, step: int, ema: ModelEmaV3 | None) -> dict[str, Any]:
        """Take a state up again, into everything that Accelerate has prepared; gives `progress`."""
        path = self._path(step)
        scaler = self.accelerator.scaler
        if not (path / "scaler.pt").is_file():  # it was of another precision
            self.accelerator.scaler = None
        try:
            self.accelerator.load_state(str(path))
            if ema is not None:
                ema.module.load_state_dict(load_file(path / _AVERAGE))
            progress: dict[str, Any] = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        except _UNFIT as error:
            raise OSError(f"{path} is no checkpoint of this run: {first_line(error)}") from error
        finally:
            self.accelerator.scaler = scaler
        return progress

    def check_room(self, count: int = 1) -> None:
        """Raise OSError unless the disk has room for some checkpoints."""
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free, wanted = shutil.disk_usage(place).free, count * self.size
        if free < wanted:
            raise OSError(
                f"{self.folder} has {free >> 20} MiB free and {wanted >> 20} are needed: make "
                "room, lower keep_checkpoints, or choose another folder"
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _drop_partial(self) -> None:
        for left in self.folder.glob(f"*{_PARTIAL}"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)

    def _damage(self, path: Path) -> str:
        """What is wrong with a checkpoint's files; empty if nothing is."""
        try:
            hashes = json.loads((path / _HASHES).read_text(encoding="utf-8"))
            wrong = [name for name, value in hashes.items() if file_sha256(path / name) != value]
        except (OSError, ValueError, AttributeError) as error:
            return str(error)
        return f"{', '.join(wrong)} changed" if wrong else ""


def together(
    accelerator: Accelerator, work: Callable[[], object], *, everywhere: bool = False
) -> None:
    """Do something on the main process, or on each: what fails on one is raised by all.

    Nobody then waits for a process that has given up. Where the disk failed it is an OSError.
    """
    failure: Exception | None = None
    try:
        if everywhere or accelerator.is_main_process:
            work()
    except Exception as error:
        failure = error
        # the disk's errors, for which torch and safetensors have their own words
        words = ("iostream", "streamwriter", "unexpected pos", "i/o error")
        if any(word in str(error).lower() for word in words):
            failure = OSError(str(error))
            failure.__cause__ = error
    sort = 0 if failure is None else 1 if isinstance(failure, OSError) else _NO_DISK
    sorts = torch.tensor([float(sort)], device=accelerator.device)
    failed = int(accelerator.reduce(sorts, "sum").item())
    if failure is not None:
        raise failure
    if failed:
        kind = OSError if failed < _NO_DISK else RuntimeError
        raise kind("another process failed and says why")


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """A network's state as safetensors takes it: contiguous, nothing shared, by its own names."""
    plain = torch.contiguous_format
    state = network.state_dict().items()
    return {_own_name(key): value.detach().cpu().clone(memory_format=plain) for key, value in state}


def _own_name(key: str) -> str:
    return key.replace("_orig_mod.", "")


def open_trained(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Open what `train` or `train_fnet` saved, whoever built the network.

    Args:
        folder: `FOLDER/model` of the run, or `FOLDER`.
        network: A network built as the trained one was, needed for one that no registry knows; it
            gets the weights.

    Returns:
        The network, in eval mode.

    Raises:
        FileNotFoundError: There is no saved network.
        ValueError: Its files are damaged, or it needs `network`, or does not fit it.
    """
    folder = Path(folder)
    folder = folder if (folder / CONFIG).is_file() else folder / "model"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no saved network ({CONFIG} is missing)")
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["idloss"]
        kind, registered, name = told["kind"], told["registered"], told["class"]
        create = _CREATE[kind]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not that of a trained network: {error!r}"
        ) from error
    if network is None:
        if not registered:
            raise ValueError(
                f"{folder} holds the weights of a {name}, which is not registered: build one and "
                "give it to open_trained(folder, network)"
            )
        return create(f"local-dir:{folder}", pretrained=True).eval()
    network = unwrapped(network)
    own_names = {_own_name(key): key for key in network.state_dict()}
    try:
        state = load_file(folder / WEIGHTS)
        network.load_state_dict({own_names.get(key, key): value for key, value in state.items()})
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"the weights in {folder} are of a {name} and do not fit {name_of(network)}: {error}"
        ) from error
    if kind == "srnet":
        create_srnet(network, crop=told.get("crop", "auto"))
    return network.eval()


def unwrapped(network: nn.Module) -> nn.Module:
    """A network without what torch.compile and data parallelism wrap around it."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while hasattr(network, "_orig_mod") or isinstance(network, parallel):
        network = network._orig_mod if hasattr(network, "_orig_mod") else network.module  # type: ignore[assignment]
    return network


def save_network(network: nn.Module, folder: Path, told: Mapping[str, Any]) -> None:
    """Save a network in the Hub's layout, as timm has it, with what is told of its run.

    It is written beside `folder` and then takes its place.
    """
    cfg = cfg_of(network)
    unregistered = f"{told['class']} (not registered)"
    config: dict[str, Any] = {
        "architecture": cfg["architecture"] if told["registered"] else unregistered,
        "num_classes": getattr(network, "num_classes", None),
        "num_features": getattr(network, "num_features", None),
        "model_args": getattr(network, "_model_args", {}),  # what timm built it with
        "pretrained_cfg": {key: cfg[key] for key in INPUT_FACTS if cfg.get(key) is not None},
        "idloss": told,
    }
    config = {key: value for key, value in config.items() if value is not None}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(plain_state(network), partial / WEIGHTS, {"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


@torch.no_grad()
def try_to_save(network: nn.Module, folder: Path, told: Mapping[str, Any], probe: Tensor) -> str:
    """Save and open a network before its first step, not after its last.

    Returns why the registry does not open it; empty if it does, and gives the same for `probe`.
    """
    trial = folder.with_name(f"{folder.name}.trial")
    training = network.training
    try:
        with torch.random.fork_rng(devices=[]):
            why_not = _why_not_registered(network.eval(), trial, told, probe)
        if why_not:
            save_network(network, trial, {**told, "registered": False})
            open_trained(trial, network)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{name_of(network)} cannot be saved: {error}") from error
    finally:
        network.train(training)
        for left in trial.parent.glob(f"{trial.name}*"):
            shutil.rmtree(left, ignore_errors=True)
    return why_not


def _why_not_registered(
    network: nn.Module, trial: Path, told: Mapping[str, Any], probe: Tensor
) -> str:
    architecture = cfg_of(network).get("architecture")
    if not is_model(str(architecture)):
        return f"{name_of(network)} is not registered"
    try:
        save_network(network, trial, told)
        opened = open_trained(trial).to(probe.device)
        if not torch.allclose(opened(probe), network(probe), 1e-3, 1e-4):
            return f"{architecture} was built with other settings than its own"
    except Exception as error:  # whatever it is, the other way is left
        return f"it is no {architecture} ({first_line(error)})"
    same = getattr(opened, "crop", None) == getattr(network, "crop", None)
    return "" if same else f"its crop is not that of {architecture}"


def name_of(one: object) -> str:
    """Module and name of a thing's class, or of a function."""
    kind = one if callable(one) and hasattr(one, "__qualname__") else type(one)
    return f"{kind.__module__}.{kind.__qualname__}"


def cfg_of(network: nn.Module) -> dict[str, Any]:
    """A network's `pretrained_cfg`, empty if it has none."""
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    return dict(cfg if isinstance(cfg, Mapping) else cfg.to_dict())
