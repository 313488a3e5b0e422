"""What a degradation is, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Degradation(Protocol):
    """From HR to LR."""

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small.

        Args:
            hr: uint8 RGB `[B, 3, H, W]`.
            size: Rows and columns of LR.
            seeds: A whole number from 0 to 2^64 - 1 for each face. What happens to a face depends
                on it alone, not on the rest of the batch or the device.

        Returns:
            LR, float32 RGB `[B, 3, *size]` in [0, 1], on the device of `hr`.
        """


def check_faces(faces: Tensor) -> None:
    """Refuse what is not a batch of 8-bit colour images.

    Args:
        faces: uint8 RGB `[B, 3, H, W]`.

    Raises:
        TypeError: They are not uint8.
        ValueError: They are not `[B, 3, H, W]`.
    """
    if faces.dtype != torch.uint8:
        raise TypeError(
            f"faces must be uint8, got {faces.dtype}; idloss.resample.to_uint8 makes them so"
        )
    if faces.ndim != 4 or faces.shape[1] != 3:
        raise ValueError(f"faces must be [B, 3, H, W], got {list(faces.shape)}")


def check_seeds(seeds: Sequence[int], faces: int) -> None:
    """Refuse seeds that do not fit the faces.

    Args:
        seeds: From 0 to 2^64 - 1.
        faces: How many there are.

    Raises:
        ValueError: There is not one for each face, or one is out of range.
    """
    if len(seeds) != faces:
        raise ValueError(f"{len(seeds)} seeds for {faces} faces: give one for each")
    for seed in seeds:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"a seed must be from 0 to 2^64 - 1, got {seed}")
