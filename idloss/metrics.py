"""What restored faces are measured by: IDS, the identity kept, and the grid of an up-sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idloss.geometry import Template
from idloss.losses import IdentityPreservedLoss
from idloss.resample import check_images

FNET = "mobilefacenet"
"""Who judges where nothing is said: small and MIT; `edsr16_64_id` was trained with it."""
BATCH = 16
"""Pictures embedded at once."""


class IdentitySimilarity(nn.Module):
    """Cosine of the embeddings of restored faces and of their references: IDS.

    What is shown to the FNet (asked in sczhou/CodeFormer#313: the face cut out, or the whole
    picture?) changes the figure, so `crop` has no default. A recogniser is trained on faces in one
    place of one crop, and is to see them there: name the template that the pictures, or crops, are
    aligned to, and the FNet's own crop is cut out of them; `"ffhq"` is right for whole pictures of
    FFHQ, CelebA-HQ and CelebA-Test. `crop=None` squeezes the whole picture, hair and background
    too, into the FNet's input.

    Which recogniser (asked in TencentARC/GFPGAN#256: which ArcFace, which backbone, trained on
    what?) changes it too: figures of two FNets cannot be compared, neither can those of one that
    was the loss in training, which flatters who was trained with it. Write the FNet's name with
    its tag beside every figure.

    Used as metrics of torchmetrics are, on one process; the pictures' values of several are to be
    gathered. It has no parameters and an empty `state_dict()`.

    Args:
        fnet: What `IdentityPreservedLoss` takes: a name, a module, or several of them.
        crop: Template the pictures are aligned to (`"ffhq"`, `"arcface"`, `"sphereface"`, ...), or
            `None` to squeeze them into the FNet's input.
        value_range: Lowest and highest value of the pictures.
        **encoder_options: Passed on to `FaceEncoder`, such as `flip=True` or `channel_order`;
            pictures that are enlarged are so by `interpolation="bicubic"`.

    Example:
        >>> ids = IdentitySimilarity("mobilefacenet", crop="ffhq")
        >>> for restored, reference in loader:
        ...     ids.update(restored, reference)
        >>> ids.compute(), ids.deviation(), ids.values
    """

    higher_is_better = True

    def __init__(
        self,
        fnet: str | nn.Module | Sequence[str | nn.Module] | Mapping[Any, float] = FNET,
        *,
        crop: str | Template | None,
        value_range: tuple[float, float] = (0.0, 1.0),
        **encoder_options: Any,
    ) -> None:
        super().__init__()
        options = {"interpolation": "bicubic", **encoder_options}
        self.distance = IdentityPreservedLoss(
            fnet, crop=crop, value_range=value_range, reduction="none", **options
        )
        self.eval()
        self._seen: list[Tensor] = []

    @torch.no_grad()
    def forward(self, restored: Tensor, reference: Tensor) -> Tensor:
        """`update`, and the similarity of each picture of this batch alone, `[B]`."""
        values: Tensor = 1 - self.distance(restored, reference)
        self._seen.append(values.cpu())
        return values

    def update(self, restored: Tensor, reference: Tensor) -> None:
        """Take pictures in.

        Args:
            restored: Restored faces `[B, 3, h, w]` of any size, in `value_range`.
            reference: Faces of the same people, `[B, 3, H, W]` of any size, in the same order.

        Raises:
            ValueError: If the batch is empty or the two do not go in pairs.
        """
        self(restored, reference)

    @property
    def values(self) -> Tensor:
        """The similarity of each picture so far, `[N]` in [-1, 1], on the CPU."""
        return torch.cat(self._seen) if self._seen else torch.empty(0)

    def compute(self) -> Tensor:
        """Their mean, a scalar; a ValueError before any picture was taken in."""
        return self._of_some().mean()

    def deviation(self) -> Tensor:
        """Their standard deviation around that mean, a scalar."""
        return self._of_some().std(correction=0)

    def reset(self) -> None:
        """Forget all pictures."""
        self._seen.clear()

    def _of_some(self) -> Tensor:
        if not self._seen:
            raise ValueError("no picture was taken in: call update(restored, reference) first")
        return self.values


def identity_similarity(
    restored: Tensor,
    reference: Tensor,
    *,
    crop: str | Template | None,
    fnet: Any = FNET,
    **options: Any,
) -> Tensor:
    """`IdentitySimilarity` of two sets of pictures, in one call.

    Args:
        restored: Restored faces `[N, 3, h, w]`.
        reference: Faces of the same people, `[N, 3, H, W]`, in the same order.
        crop: Template the pictures are aligned to; see `IdentitySimilarity`.
        fnet: The face recogniser.
        **options: What else `IdentitySimilarity` takes.

    Returns:
        The cosine of each picture, `[N]`; `.mean()` is IDS.

    Raises:
        ValueError: If the two do not go in pairs.
    """
    if len(restored) != len(reference):
        raise ValueError(f"{len(restored)} restored pictures and {len(reference)} references")
    metric = IdentitySimilarity(fnet, crop=crop, **options).to(restored.device)
    for some, others in zip(restored.split(BATCH), reference.split(BATCH), strict=True):
        metric.update(some, others)
    return metric.values


def grid_ratio(images: Tensor, period: int = 4) -> float:
    """How much the grid of an up-sampler stands out of what pictures hold beside it.

    The energy of the mean spectrum at the up-sampler's frequencies, in relation to that near by
    (the median, two and three bins away): 1 is no grid. EDSR x4 leaves one, and an identity loss
    deepens it (Lai, He and Lam, ICIP 2019, section 4.3, believe that recognition would gain
    without it).

    Args:
        images: Pictures `[B, 3, H, W]`, sides of whole periods, four at least.
        period: Pixels of SR to one of LR.

    Returns:
        The ratio, the same whatever the range of the images.

    Raises:
        ValueError: The images are no RGB, too small, or do not hold whole periods.
    """
    check_images(images)
    rows, columns = images.shape[-2:]
    if rows % period or columns % period or min(rows, columns) < 4 * period:
        raise ValueError(f"{rows}x{columns} images have no grid of {period} pixels to measure")
    grey = images.float().mean(dim=1)
    window = [torch.hann_window(side, device=grey.device) for side in (rows, columns)]
    grey = (grey - grey.mean(dim=(1, 2), keepdim=True)) * torch.outer(*window)
    power = torch.fft.fft2(grey).abs().square().mean(dim=0)
    on: list[float] = []
    beside: list[float] = []
    for place in range(1, period * period):
        row, column = (place // period) * rows // period, (place % period) * columns // period
        around = power.roll((3 - row, 3 - column), (0, 1))[:7, :7].clone()
        on.append(around[3, 3].item())
        around[2:5, 2:5] = math.nan
        beside.append(around.nanmedian().item())
    return sum(on) / sum(beside)
