"""The faces of each step: which they are, their crops, their HR features."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from idloss import __version__
from idloss.data import DataError, Faces, Fault
from idloss.encoder import FaceEncoder
from idloss.errors import some_of
from idloss.evaluation.cache import digest_network
from idloss.geometry import get_template
from idloss.losses import IdentityPreservedLoss
from idloss.resample import to_float
from idloss.training.recipe import RunOptions
from idloss.weights.files import written_whole

Batch = Mapping[str, Tensor]

_EPOCH = 1  # purpose of the numbers that shuffle an epoch
DEVICE_SHARE = 1 / 3
"""Of a GPU's free memory that crops may take; networks and activations need the rest."""
FEATURE_BATCH = 64
ALIKE = 0.99
"""Least cosine of a stored feature with one of today, whatever the device and its rounding."""


class Draw(NamedTuple):
    """The share of one step's batch that one process computes in one go.

    `faces`, int64 `[B]`, are positions in the data, and `rows` where they stand in the step's whole
    batch of `total` faces: random numbers are drawn for all of it, so that they do not depend on
    how it is shared out. Steps are counted from 1.
    """

    step: int
    faces: Tensor
    rows: slice
    total: int


def generator_for(seed: int, *words: int) -> torch.Generator:
    """Random numbers on the CPU that depend on a run's seed and on what they are for alone."""
    state = np.random.SeedSequence((seed, *words)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def shuffled_batches(
    faces: int, batch_size: int, *, seed: int, start: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Steps from `start` on and their faces, int64 `[batch_size]`, shuffled anew each epoch.

    A last batch of an epoch that is not full is dropped, as in the paper's released code.
    """
    if faces < batch_size:
        raise ValueError(f"{faces} faces do not fill a batch: lower batch_size={batch_size}")
    in_epoch = faces // batch_size
    step = start
    while True:
        epoch, first = divmod(step - 1, in_epoch)
        order = torch.randperm(faces, generator=generator_for(seed, _EPOCH, epoch))
        for batch in order[: in_epoch * batch_size].split(batch_size)[first:]:
            yield step, batch
            step += 1


def shares(count: int, process: int, processes: int, accumulate: int) -> list[slice]:
    """The rows of a batch that one process computes, `accumulate` slices of equal length."""
    parts = processes * accumulate
    if count % parts:
        raise ValueError(
            f"batch_size={count} cannot be shared evenly by {processes} processes with "
            f"accumulate={accumulate}: make it a multiple of {parts}"
        )
    size = count // parts
    first = process * accumulate * size
    return [slice(start, start + size) for start in range(first, first + accumulate * size, size)]


class Crops:
    """Reads the crops of draws, ahead of time where they come from disk; photos are aligned."""

    def __init__(self, faces: Faces, recipe: RunOptions, device: torch.device) -> None:
        crop, hold = recipe.crop, recipe.hold_crops
        if faces.crop not in (None, crop):
            raise ValueError(
                f"the faces are aligned to {faces.crop!r} and the recipe says crop={crop}: set "
                f"crop={faces.crop}, or prepare them anew"
            )
        self.faces = faces
        self.recipe = recipe
        self.template = get_template(crop)
        self.device = device
        self.resident: Tensor | None = None
        self._unusable: dict[int, Fault] = {}
        if faces.crop is None and hold == "device":
            raise ValueError("hold_crops=device needs prepared faces: run 'idloss prepare'")
        if faces.crop and (hold == "device" or (hold == "auto" and self._fits())):
            self.resident = faces.crops_at(torch.arange(len(faces))).to(device)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        height, width = self.template.size
        return len(self.faces) * 3 * height * width < free * DEVICE_SHARE

    def read(self, draws: Iterable[Draw]) -> Iterator[tuple[Draw, Tensor]]:
        """Each draw with its crops, uint8 RGB `[B, 3, H, W]`, on the device."""
        if self.resident is not None:
            for draw in draws:
                yield draw, self.resident.index_select(0, draw.faces.to(self.device))
            return
        on_gpu = self.device.type == "cuda"
        workers = self.recipe.workers
        if self.faces.crop is not None:
            # a copy within the host's memory is faster than a worker's answer
            workers = min(workers, 1) if on_gpu else 0
        loader = DataLoader(
            _Reader(self.faces, self.template.name),
            sampler=draws,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=on_gpu,
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # its seeds of workers are not to come from the run's
        )
        for draw, crops, faults in loader:
            if faults:
                draw = self._mend(draw, crops, faults)
            yield draw, crops.to(self.device, non_blocking=True)

    def _mend(self, draw: Draw, crops: Tensor, faults: Mapping[int, Fault]) -> Draw:
        """Put the next usable face in the place of each that is not, in `crops` and in the draw."""
        new = {face: fault for face, fault in faults.items() if face not in self._unusable}
        if not self.recipe.skip_missing:
            raise DataError(
                new.values(),
                "Put back what is gone, or set skip_missing=true for what is damaged, and go on. "
                "Mended faces are other data: train on them in another folder.",
            )
        self._unusable |= new
        if new:
            shown = some_of([str(fault) for fault in new.values()])
            warnings.warn(f"replaced by the next faces: {shown}", UserWarning, stacklevel=2)
        faces = draw.faces.clone()
        for row, face in enumerate(draw.faces.tolist()):
            if face in faults:
                faces[row], crops[row] = self._next_usable(face)
        return draw._replace(faces=faces)

    def _next_usable(self, face: int) -> tuple[int, Tensor]:
        count = len(self.faces)
        for place in ((face + step) % count for step in range(1, count)):
            if place not in self._unusable:
                found: dict[int, Fault] = {}
                [crop] = self.faces.crops_at(torch.tensor([place]), self.template, faults=found)
                if not found:
                    return place, crop
                self._unusable |= found
        raise DataError(self._unusable.values(), "No face is left to train on.")


@dataclass(frozen=True)
class _Reader(Dataset[tuple[Draw, Tensor, dict[int, Fault]]]):
    """The crops of a draw, and what is wrong with whom: an error would not survive the way."""

    faces: Faces
    crop: str

    def __getitem__(self, draw: Draw) -> tuple[Draw, Tensor, dict[int, Fault]]:
        faults: dict[int, Fault] = {}
        return draw, self.faces.crops_at(draw.faces, self.crop, faults=faults), faults


def _as_it_is(read: Any) -> Any:
    return read


def check_crop(encoder: FaceEncoder, crop: str) -> None:
    """Find out before training whether crops of a template hold what an FNet wants to see."""
    doubt = encoder.border_complaint(get_template(crop))
    if doubt is not None and encoder.fnet_crop is not None:
        wanted = encoder.fnet_crop.name
        raise ValueError(
            f"FNet and crop do not fit: {doubt}: prepare the faces with --crop {wanted} and set "
            f"crop={wanted}"
        )


def stored_features(
    faces: Faces, identity: IdentityPreservedLoss, device: torch.device, *, progress: bool = True
) -> Tensor:
    """HR features of all crops and of their mirror images, float32 `[2, N, D]`.

    Those of prepared faces are kept beside them by a hash of the data, the FNets and how these are
    fed, so that other data or another FNet never meet features that are not theirs. Where that is
    not possible they stay in memory.
    """
    folder: Path | None = getattr(faces, "folder", None)
    if folder is None:
        return compute_features(faces, identity, device, progress=progress)
    key, why_not = features_key(faces.content, identity), "an FNet that cannot be told from others"
    path = folder / f"features-{key}.npy"
    if key is not None and path.is_file():
        try:
            return _kept_features(path, faces, identity, device)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is made anew", stacklevel=2)
    features = compute_features(faces, identity, device, progress=progress)
    if key is not None:
        try:
            with written_whole(path) as temporary, temporary.open("wb") as file:
                np.save(file, features.numpy())
            return torch.from_numpy(np.load(path, mmap_mode="c"))
        except OSError as error:
            why_not = f"{error}: to keep them, prepare the faces into another folder"
    warnings.warn(
        f"HR features cannot be kept in {folder} and serve this run alone: {why_not}", stacklevel=2
    )
    return features


def _kept_features(
    path: Path, faces: Faces, identity: IdentityPreservedLoss, device: torch.device
) -> Tensor:
    """Features from the disk, once those of a few faces are what they are today."""
    stored = torch.from_numpy(np.load(path, mmap_mode="c"))
    if stored.shape != (2, len(faces), identity.num_features) or stored.dtype != torch.float32:
        raise ValueError(f"{stored.dtype} {list(stored.shape)}")
    places = torch.linspace(0, len(faces) - 1, min(8, len(faces))).long()
    today = _embed_both(faces, places, identity, device)
    likeness = torch.cosine_similarity(stored[:, places], today, dim=-1)
    if not bool((likeness > ALIKE).all()):
        raise ValueError(f"faces have a cosine of {likeness.min():.3f} with what is stored")
    return stored


def features_key(content: str, identity: IdentityPreservedLoss) -> str | None:
    """A name for HR features: what faces, what FNets, how fed; None if an FNet cannot be told."""
    parts: list[object] = [__version__, content, identity.value_range]
    for encoder in identity.encoders:
        assert isinstance(encoder, FaceEncoder)
        fnet = digest_network(encoder.fnet)
        if fnet is None:
            return None
        parts.append(
            (fnet, encoder.crop, encoder.interpolation, encoder.flip, encoder.channel_order)
        )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compute_features(
    faces: Faces, identity: IdentityPreservedLoss, device: torch.device, *, progress: bool = True
) -> Tensor:
    """Embed every crop and its mirror image, float32 `[2, N, D]`."""
    features = torch.empty(2, len(faces), identity.num_features)
    bar = tqdm(total=len(faces), desc="HR features", unit="face", delay=2, disable=not progress)
    with bar:
        for places in torch.arange(len(faces)).split(FEATURE_BATCH):
            features[:, places] = _embed_both(faces, places, identity, device)
            bar.update(len(places))
    return features


@torch.no_grad()
def _embed_both(
    faces: Faces, places: Tensor, identity: IdentityPreservedLoss, device: torch.device
) -> Tensor:
    hr = to_float(faces.crops_at(places).to(device))
    both: Tensor = identity.embed(torch.cat((hr, hr.flip(-1))))
    return both.float().cpu().reshape(2, len(places), -1)
