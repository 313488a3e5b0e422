"""What a run is about: a module to train, and batches for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


class Draw(NamedTuple):
    """The share of one step's batch that one process computes in one go.

    Attributes:
        step: Which step, counted from 1.
        faces: Positions of its faces in the data, int64 `[rows.stop - rows.start]`.
        rows: Where they stand in the step's whole batch.
        total: Faces of the whole batch. Random numbers are drawn for all of it, so that they do
            not depend on how it is shared out.
    """

    step: int
    faces: Tensor
    rows: slice
    total: int


class Task(Protocol):
    """A module to train and where its batches come from.

    Attributes:
        module: What is trained, and what may be compiled and wrapped. Its `forward(**batch)` gives
            losses by name, scalars that are means over the faces; `"loss"` is minimised.
        network: The part of `module` that is kept: averaged, validated, saved.
        content: What its data are, as a hash: a run is not resumed on others.
    """

    @property
    def module(self) -> nn.Module: ...  # noqa: D102
    @property
    def network(self) -> nn.Module: ...  # noqa: D102
    @property
    def content(self) -> str: ...  # noqa: D102

    def __len__(self) -> int:
        """Faces there are to draw from."""

    def batches(self, draws: Iterable[Draw]) -> Iterator[Batch]:
        """Inputs of `module`, one batch for each draw, made of the draw alone."""


def generator_for(seed: int, *words: int) -> torch.Generator:
    """Random numbers that depend on nothing but some whole numbers.

    Args:
        seed: Of the run.
        *words: What the numbers are for: a purpose, a step.

    Returns:
        A generator on the CPU.
    """
    state = np.random.SeedSequence((seed, *words)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def shuffled_batches(
    faces: int, batch_size: int, *, seed: int, start: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Steps from `start` on, with the faces of each: shuffled anew each epoch, for ever.

    A last batch of an epoch that is not full is dropped, as in the paper's released code.

    Args:
        faces: How many there are.
        batch_size: How many a step takes.
        seed: Of the run.
        start: First step wanted, counted from 1.

    Yields:
        The step, and int64 positions `[batch_size]`.

    Raises:
        ValueError: There are too few faces for a batch.
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


_EPOCH = 1  # purpose of the numbers that shuffle an epoch


def shares(count: int, *, process: int, processes: int, accumulate: int) -> list[slice]:
    """The rows of a batch that one process computes, one slice for each go.

    Args:
        count: Faces of the batch.
        process: Which process, from 0.
        processes: How many there are.
        accumulate: Parts that each computes its share in.

    Returns:
        `accumulate` slices of equal length; those of all processes cover the batch.

    Raises:
        ValueError: The batch cannot be shared out evenly.
    """
    parts = processes * accumulate
    if count % parts:
        raise ValueError(
            f"batch_size={count} cannot be shared evenly by {processes} processes with "
            f"accumulate={accumulate}: make it a multiple of {parts}"
        )
    size = count // parts
    first = process * accumulate
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(accumulate)]
