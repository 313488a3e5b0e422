"""What is left to chance in a batch: its size, who is mirrored, and a seed for each face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_PURPOSE = 0  # sets these numbers apart from others that are drawn from the same seed


class BatchDraw(NamedTuple):
    """What was drawn for a batch.

    Attributes:
        size: Rows and columns of LR, one size for all.
        mirrored: Which faces are flipped, bool `[count]`.
        seeds: Of each face's degradation, from 0 to 2^64 - 1.
    """

    size: tuple[int, int]
    mirrored: Tensor
    seeds: tuple[int, ...]


def draw_batch(step: int, count: int, *, seed: int, sizes: Sequence[tuple[int, int]]) -> BatchDraw:
    """Draw a batch's size, mirrorings and seeds.

    They depend on the arguments alone, so that a resumed run and any number of processes see the
    same. Seed and step are hashed together by numpy's SeedSequence, the step as its spawn key:
    neighbouring steps and seeds have nothing in common.

    Args:
        step: Which, not negative.
        count: Faces of the whole batch, over all processes.
        seed: Of the run, not negative.
        sizes: To choose from, each as likely.

    Returns:
        The draw; a face is mirrored with probability 0.5, as in the paper's released code.

    Raises:
        ValueError: There are no sizes, or a number is negative.
    """
    if not sizes:
        raise ValueError("sizes is empty: give at least one, such as (28, 24)")
    for name, value in (("step", step), ("count", count), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSE, step)))
    height, width = sizes[int(rng.integers(len(sizes)))]
    mirrored = torch.from_numpy(rng.random(count) < 0.5)
    seeds = rng.integers(1 << 64, size=count, dtype=np.uint64)
    return BatchDraw((height, width), mirrored, tuple(seeds.tolist()))


def mirror(hr: Tensor, flags: Tensor) -> Tensor:
    """Flip some faces from left to right.

    Args:
        hr: Images `[B, C, H, W]`.
        flags: Which to flip, bool `[B]`, on the same device.

    Returns:
        Images `[B, C, H, W]`.

    Raises:
        ValueError: There is not one flag for each face.
    """
    if flags.shape != hr.shape[:1]:
        raise ValueError(f"flags must be [{len(hr)}], one for each face, got {list(flags.shape)}")
    return torch.where(flags[:, None, None, None], hr.flip(-1), hr)


def sizes_of(factors: Sequence[int], hr_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """LR sizes for down-sampling factors.

    Args:
        factors: Above zero, each a divisor of both sides.
        hr_size: Rows and columns of HR.

    Returns:
        Rows and columns for each factor.

    Raises:
        ValueError: A factor does not divide the crop.
    """
    height, width = hr_size
    for factor in factors:
        if factor < 1 or height % factor or width % factor:
            raise ValueError(
                f"factor {factor} does not divide {height}x{width}; use --sizes, or a factor such "
                "as 4, 8 or 16"
            )
    return tuple((height // factor, width // factor) for factor in factors)
