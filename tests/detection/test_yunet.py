import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from idloss import weights
from idloss.detection import YuNet, create_detector
from idloss.weights.files import Piece


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"mtcnn needs torch alone.*'idloss\[detect\]'"):
        create_detector("yunet")


def test_the_network_is_pinned(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(weights.UnreachableError, match=r"yunet_s_640_640\.onnx.*\n.*path="):
        YuNet(cache_dir=tmp_path)
    (tmp_path / "other.onnx").write_bytes(b"no network")
    with pytest.raises(weights.NotAsPromisedError, match="not the pinned file"):
        YuNet(path=tmp_path / "other.onnx")


def test_rows_of_opencv_become_detections(tmp_path, monkeypatch):
    row = np.arange(15, dtype=np.float32)
    seen = []

    class Net:
        def setInputSize(self, size):  # noqa: N802
            seen.append(size)

        def detect(self, bgr):
            seen.append(bgr[0, 0].tolist())
            rows = np.stack([row, row]) * [[1], [2]]
            return 1, None if bgr.max() == 0 else rows.astype(np.float32)

    detectors = SimpleNamespace(create=lambda *_, **__: Net())
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(FaceDetectorYN=detectors))
    monkeypatch.setattr(Piece, "verify", lambda *_: None)
    detector = YuNet(path=tmp_path)
    red = torch.zeros(3, 5, 7, dtype=torch.uint8)
    red[0] = 200
    nothing, found = detector([0 * red, red])
    assert seen == [(7, 5), [0, 0, 0], (7, 5), [0, 0, 200]]
    assert nothing.landmarks.shape == (0, 5, 2)
    assert found.scores.tolist() == [28, 14]
    assert found.boxes[1].tolist() == [0, 1, 2, 4]
    assert found.landmarks[1].flatten().tolist() == list(range(4, 14))
