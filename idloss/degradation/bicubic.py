"""The paper's degradation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from idloss.degradation.base import check_faces, check_seeds
from idloss.resample import resize, to_float


class BicubicDegradation:
    """OpenCV's bicubic down-sampling of 8-bit images to 8 bits (paper, section 4.1)."""

    def __call__(self, hr: Tensor, size: tuple[int, int], *, seeds: Sequence[int]) -> Tensor:
        """Make faces small; nothing is left to chance, so the seeds do not matter.

        Args:
            hr: uint8 RGB `[B, 3, H, W]`.
            size: Rows and columns of LR.
            seeds: A whole number from 0 to 2^64 - 1 for each face.

        Returns:
            LR, float32 RGB `[B, 3, *size]` in [0, 1], multiples of 1/255, on the device of `hr`.

        Raises:
            TypeError: The faces are not uint8.
            ValueError: They are not `[B, 3, H, W]`, the seeds do not fit, or the size is not two
                positive numbers.
        """
        check_faces(hr)
        check_seeds(seeds, len(hr))
        return to_float(resize(hr, size))
