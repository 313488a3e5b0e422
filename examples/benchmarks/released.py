"""How the paper's released code reads a face: one at a time, with OpenCV."""

from __future__ import annotations

import cv2  # pip install opencv-python-headless
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from idloss.data import FileFaces
from idloss.geometry import Template, fit_similarity


def read_aligned(faces: FileFaces, index: int, template: Template) -> NDArray[np.uint8]:
    """Decode a photo and align it to a template: BGR `[H, W, 3]`."""
    if faces.landmarks is None:
        raise ValueError(f"there are no landmarks to align {faces.names[index]} by")
    data = np.frombuffer(faces.files.read(faces.members[index]), np.uint8)
    photo = cv2.imdecode(data, cv2.IMREAD_COLOR)
    matrix = fit_similarity(faces.landmarks[index : index + 1], template)[0].numpy()
    rows, columns = template.size
    face: NDArray[np.uint8] = cv2.warpAffine(photo, matrix, (columns, rows), flags=cv2.INTER_CUBIC)
    return face


def to_tensor(bgr: NDArray[np.uint8]) -> Tensor:
    """RGB in [0, 1], `[3, H, W]`."""
    return torch.from_numpy(bgr[:, :, ::-1].transpose(2, 0, 1).copy()).float() / 255
