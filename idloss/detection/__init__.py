"""Face detectors: from photos to boxes, scores and the five points that alignment needs."""

from idloss.detection.base import (
    Detections,
    Detector,
    create_detector,
    list_detectors,
    register_detector,
)
from idloss.detection.mtcnn import MTCNN
from idloss.detection.yunet import YuNet

__all__ = [
    "MTCNN",
    "Detections",
    "Detector",
    "YuNet",
    "create_detector",
    "list_detectors",
    "register_detector",
]
