import numpy as np
import pytest
import torch

from idloss.detection import Detections, create_detector, list_detectors, register_detector
from idloss.detection.base import DETECTORS, as_photos

GREY = torch.full((1, 20, 30), 0.5)


def test_a_third_detector_is_a_decorated_function(monkeypatch):
    monkeypatch.delitem(DETECTORS, "middle", raising=False)

    @register_detector("middle")
    def middle(size=10.0):
        def detect(images):
            points = torch.zeros(1, 5, 2)
            return [
                Detections(torch.tensor([[0, 0, size, size]]), torch.ones(1), points)
                for _ in as_photos(images)
            ]

        return detect

    assert {"middle", "mtcnn", "yunet"} <= set(list_detectors())
    (found,) = create_detector("middle", size=4)(GREY)
    assert len(found) == 1
    assert found.boxes[0, 2] == 4
    with pytest.raises(ValueError, match=r"unknown detector 'mtcn'\. Did you mean 'mtcnn'"):
        create_detector("mtcn")
    monkeypatch.delitem(DETECTORS, "middle")


def test_photos_are_8_bit_rgb():
    photos = as_photos([GREY, torch.full((3, 4, 5), 7, dtype=torch.uint8)])
    assert [photo.dtype for photo in photos] == [torch.uint8] * 2
    assert photos[0].shape == (3, 20, 30)
    assert (photos[0] == 128).all()
    assert len(as_photos(GREY)) == 1
    assert len(as_photos(torch.rand(2, 3, 4, 5))) == 2
    assert as_photos([]) == []


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (np.zeros((3, 4, 4)), TypeError, r"photo 0 must be a torch.Tensor, got ndarray"),
        (torch.rand(4, 9, 9), ValueError, r"without its alpha channel, got \[4, 9, 9\]"),
        (torch.rand(9, 9), ValueError, r"must be \[3, H, W\]"),
        (torch.rand(3, 0, 9), ValueError, r"got \[3, 0, 9\]"),
        (255 * torch.rand(3, 9, 9), ValueError, r"spans .* and must be in \[0, 1\]"),
        (torch.full((3, 9, 9), torch.nan), ValueError, r"spans \[nan, nan\]"),
        (torch.zeros(3, 9, 9, dtype=torch.int16), TypeError, r"got torch.int16"),
    ],
)
def test_what_is_no_photo_is_refused(image, error, said):
    with pytest.raises(error, match=said):
        as_photos([image])
