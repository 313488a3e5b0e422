"""What detectors share: the pictures they take, the faces they give, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from idloss.plugins import Registry
from idloss.resample import to_uint8


@dataclass(frozen=True)
class Detections:
    """The faces of one photo, the surest first.

    Coordinates are `(x, y)` in pixels of the photo with the centre of the first pixel at (0, 0), as
    in `idloss.geometry`, whose order the five points have.

    Args:
        boxes: Left, top, right and bottom, float32 `[N, 4]`; they may reach out of the photo.
        scores: How sure the detector is, float32 `[N]` in 0 to 1.
        landmarks: Eyes, tip of the nose and corners of the mouth, float32 `[N, 5, 2]`.
    """

    boxes: Tensor
    scores: Tensor
    landmarks: Tensor

    def __len__(self) -> int:
        return len(self.boxes)


class Detector(Protocol):
    """Whatever finds faces."""

    def __call__(self, images: Tensor | Sequence[Tensor]) -> list[Detections]:
        """Faces of each photo, on the CPU.

        Args:
            images: Photos, RGB or grey, uint8 or floating point in [0, 1]: a batch `[B, 3, H, W]`,
                one `[3, H, W]`, or several of any sizes.

        Returns:
            One `Detections` a photo.
        """


DETECTORS: Final[Registry[Callable[..., Detector]]] = Registry("detector")
"""What makes each detector, by its name."""


register_detector = DETECTORS.named
"""Let `create_detector` make a detector by a name; decorates its class or function."""
list_detectors = DETECTORS.names
"""Names of the face detectors, plug-ins' included."""


def create_detector(
    detector: str | Detector = "mtcnn", *, device: torch.device | None = None, **options: Any
) -> Detector:
    """Make a face detector.

    Args:
        detector: One of `list_detectors()`, or a detector, which is given back.
        device: Where one that is a module goes; None to leave it.
        **options: Its own, such as `min_face=12` of `mtcnn`.

    Returns:
        The detector: photos to a list of `Detections`.

    Raises:
        ValueError: If no detector has the name.
        WeightsError: If its weights cannot be had.
    """
    made = DETECTORS.find(detector)(**options) if isinstance(detector, str) else detector
    if device is not None and isinstance(made, nn.Module):
        made.to(device)
    return made


def as_photos(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Photos as a detector takes them, as uint8 RGB `[3, H, W]` each; others are refused."""
    if isinstance(images, Tensor) and images.ndim == 3:
        images = [images]
    return [_as_photo(image, place) for place, image in enumerate(images)]


def _as_photo(image: object, place: int) -> Tensor:
    if not isinstance(image, Tensor):
        kind = type(image).__name__
        raise TypeError(
            f"photo {place} must be a torch.Tensor, got {kind}; files are read by "
            "idloss.data.faces.decode_image"
        )
    if image.ndim != 3 or len(image) not in (1, 3) or not image.numel():
        alpha = ", without its alpha channel" if image.ndim == 3 and len(image) in (2, 4) else ""
        shape = list(image.shape)
        raise ValueError(f"photo {place} must be [3, H, W] or grey [1, H, W]{alpha}, got {shape}")
    if image.is_floating_point():
        low, high = (float(end) for end in image.aminmax())
        if not (low >= -0.25 and high <= 1.25):  # a resampler may overshoot; NaN compares false
            raise ValueError(f"photo {place} spans [{low:.3g}, {high:.3g}] and must be in [0, 1]")
        image = to_uint8(image)
    elif image.dtype != torch.uint8:
        raise TypeError(f"photo {place} must be uint8 or floating point, got {image.dtype}")
    return image.expand(3, -1, -1)
