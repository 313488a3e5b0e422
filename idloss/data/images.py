"""Image files to tensors."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from idloss.data.faults import DataError, Fault


def decode_image(data: bytes, name: str) -> Tensor:
    """Decode an image file to RGB, upright after its EXIF orientation as `cv2.imread` does.

    Pillow, OpenCV and torchvision carry the same libjpeg-turbo and agree to the last bit; Pillow
    is the one that refuses a file cut short (OpenCV paints the rest grey) and that torchvision,
    whose own decoder is to be removed, goes on depending on.

    Args:
        data: the bytes of a JPEG, PNG or another format that Pillow reads.
        name: what to call it in an error.

    Returns:
        uint8 RGB `[3, H, W]`.

    Raises:
        DataError: the bytes are no whole 8-bit image; names it.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            mode = opened.mode
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError([Fault(name, f"unreadable image ({error})")]) from error
    # I, I;16 and F hold more than 8 bits, which Pillow clips rather than scales
    if mode[0] in "IF":
        raise DataError([Fault(name, f"expected 8 bits a channel, got Pillow mode {mode!r}")])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
