"""YuNet, a small fast detector that OpenCV carries (Wu et al., Machine Intelligence Res. 2023)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from idloss.detection.base import Detections, as_photos, register_detector
from idloss.errors import import_extra
from idloss.weights import GitHubBlob, WeightsError
from idloss.weights.loading import CacheDir
from idloss.weights.sources import Cache

SOURCE = GitHubBlob(
    repo="ShiqiYu/libfacedetection.train",
    commit="0047ac24afb1a50a0c6105001c89d1b5b805dbf1",
    parts=(("onnx/yunet_s_640_640.onnx", "f9beb3044f3791affe1c2f0932af31927e2e4705"),),
    sha256="8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
)
"""The network, Apache-2.0; opencv_zoo has it as `face_detection_yunet_2023mar.onnx`."""


@register_detector("yunet")
class YuNet:
    """YuNet through `cv2.FaceDetectorYN`, on the CPU: faces of some 10 to 300 pixels (its README).

    Args:
        threshold: Least score.
        path: A copy of the network, which is verified; None to download it.
        cache_dir: Where it is kept then; see `idloss.weights.fetch`.

    Raises:
        ImportError: If OpenCV is not installed.
        WeightsError: If the network cannot be had.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        *,
        path: str | os.PathLike[str] | None = None,
        cache_dir: CacheDir = None,
    ) -> None:
        cv2 = import_extra("cv2", "detect", "yunet (mtcnn needs torch alone) runs in")
        (piece,) = SOURCE.pieces
        if path is None:
            try:
                (path,) = SOURCE.obtain(Cache.at(cache_dir), "yunet")
            except WeightsError as error:
                advice = f"download it by hand from {piece.url}, and pass path="
                raise type(error)(f"{str(error).partition(chr(10))[0]}\n{advice}") from error
        piece.verify(Path(path), "yunet")
        self._net = cv2.FaceDetectorYN.create(str(path), "", (320, 320), threshold, top_k=5000)
        self._one_at_a_time = threading.Lock()

    def __call__(self, images: Tensor | Sequence[Tensor]) -> list[Detections]:
        """Find the faces of photos, one after the other; see `Detector`."""
        return [self._detect(photo) for photo in as_photos(images)]

    def _detect(self, photo: Tensor) -> Detections:
        bgr = photo.flip(0).permute(1, 2, 0).contiguous().cpu().numpy()
        with self._one_at_a_time:
            self._net.setInputSize((photo.shape[2], photo.shape[1]))
            _, found = self._net.detect(bgr)
        # a row a face: left, top, width, height, five points from the right eye on, score
        faces = torch.zeros(0, 15) if found is None else torch.from_numpy(found)
        faces = faces[faces[:, 14].argsort(descending=True)]
        boxes = torch.cat((faces[:, :2], faces[:, :2] + faces[:, 2:4]), 1)
        return Detections(boxes, faces[:, 14], faces[:, 4:14].reshape(-1, 5, 2))
