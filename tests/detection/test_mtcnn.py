import re

import pytest
import torch

from idloss import weights
from idloss.detection import MTCNN
from idloss.detection import mtcnn as module
from idloss.resample import resize

# what timesler/facenet-pytorch (787da06) finds with thresholds 0.6, 0.7, 0.7 and min_face_size 20
PUBLISHED = {
    "Aaron_Peirsol/Aaron_Peirsol_0001.jpg": (
        [82.39, 70.43, 167.08, 184.87],
        0.99993,
        [[106.55, 114.33], [146.93, 113.56], [128.86, 140.93], [108.75, 154.2], [148.76, 153.37]],
    ),
    "Abdullah_Gul/Abdullah_Gul_0013.jpg": (
        [90.56, 71.86, 181.16, 188.25],
        0.99989,
        [[108.48, 112.63], [149.82, 112.29], [124.84, 133.42], [111.13, 155.3], [147.62, 155.94]],
    ),
    "Venus_Williams/Venus_Williams_0002.jpg": (
        [83.77, 70.06, 168.66, 189.23],
        0.99965,
        [[112.42, 116.1], [150.36, 115.9], [133.89, 137.77], [114.41, 160.02], [149.56, 158.6]],
    ),
    "Zinedine_Zidane/Zinedine_Zidane_0004.jpg": (
        [83.34, 65.84, 177.9, 186.03],
        0.99987,
        [[106.05, 114.67], [148.61, 109.03], [128.07, 143.07], [115.12, 162.25], [153.99, 156.87]],
    ),
}


@pytest.fixture(scope="session")
def photos(photo):
    return [photo(name) for name in PUBLISHED]


def assert_same(found, others):
    for one, other in zip(found, others, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.landmarks, other.landmarks, atol=1e-3, rtol=0)


def test_agrees_with_the_published_implementation(mtcnn_cache, photos):
    plain = MTCNN(cache_dir=mtcnn_cache, refine=False)
    for found, (box, score, points) in zip(plain(photos), PUBLISHED.values(), strict=True):
        assert len(found) == 1
        torch.testing.assert_close(found.boxes[0], torch.tensor(box), atol=0.01, rtol=0)
        assert found.scores[0] == pytest.approx(score, abs=2e-5)
        beyond = torch.tensor(points) - found.landmarks[0]
        assert beyond.min() > -0.01  # the fraction of a pixel that it forgets it cut off
        assert beyond.max() < 1


def test_points_are_where_the_paper_has_them(mtcnn, photos, shared):
    lines = shared("data/lfw_landmarks.csv").read_text().splitlines()
    rows = {row[0]: row[1:] for row in (line.split(",") for line in lines)}
    marked = torch.tensor([[float(value) for value in rows[name]] for name in PUBLISHED])
    found = torch.stack([found.landmarks[0] for found in mtcnn(photos)])
    apart = found - marked.view(-1, 5, 2)
    assert apart.norm(dim=-1).median() < 1.5
    assert apart.mean((0, 1)).abs().max() < 0.5


def test_many_faces_and_any_mix_of_photos(mtcnn, photos, monkeypatch):
    rows = [torch.cat(photos[:2], 2), torch.cat(photos[2:], 2)]
    group = torch.cat(rows, 1)[:, :483, :491]
    mixed = [photos[0], group, photos[1][:, :201], photos[2] / 255, torch.zeros(3, 250, 250)]
    found = mtcnn(mixed)
    assert [len(one) for one in found] == [1, 4, 1, 1, 0]
    assert (found[1].scores.diff() <= 0).all()
    assert_same(found, [mtcnn(one)[0] for one in mixed])
    monkeypatch.setattr(module, "_STRIP", 4000)  # P-Net sees the photos in strips
    monkeypatch.setattr(module, "_BATCH", 7)
    assert_same(mtcnn(mixed), found)
    assert_same(mtcnn(torch.stack(photos)), mtcnn(photos))


def test_grey_photos(mtcnn, photos):
    grey = (photos[0] / 255).mean(0, keepdim=True)
    (found,) = mtcnn(grey)
    torch.testing.assert_close(found.landmarks, mtcnn(photos[0])[0].landmarks, atol=4, rtol=0)


def test_faces_of_twelve_pixels_and_cut_ones(mtcnn, mtcnn_cache, photos):
    small = torch.stack(photos)
    small = resize(small, (42, 42), convention="antialias")
    found = MTCNN(min_face=12, cache_dir=mtcnn_cache)(small)
    assert [len(one) for one in found] == [1] * 4
    wanted = torch.tensor([points for *_, points in PUBLISHED.values()])
    seen = torch.stack([one.landmarks[0] for one in found])
    assert ((seen + 0.5) * 250 / 42 - 0.5 - wanted).abs().mean() < 3
    (cut,) = mtcnn(photos[0][:, :, 100:])  # its left border goes through the face
    assert len(cut) == 1


@pytest.mark.parametrize("size", [(1, 1), (11, 300), (12, 12), (20, 4000), (37, 64)])
def test_no_face(size):
    """Also for networks that say "face" of whatever they see, inside the photo or out of it."""
    torch.manual_seed(0)
    sure = MTCNN(thresholds=(1e-6, 1e-6, 1e-6), min_face=12, pretrained=False)
    doubting = MTCNN(thresholds=(0.999, 0.999, 0.999), min_face=12, pretrained=False)
    image = torch.rand(2, 3, *size)
    for found in doubting(image):
        assert found.boxes.shape == (0, 4)
        assert found.scores.shape == (0,)
        assert found.landmarks.shape == (0, 5, 2)
    for found in sure(image):
        assert found.landmarks.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_face": 11}, "min_face must be 12 pixels or more, got 11"),
        ({"min_face": float("nan")}, "min_face must be"),
        ({"thresholds": (0.6, 0.7)}, "thresholds must be three numbers"),
        ({"thresholds": (0.6, 0.7, 1.0)}, "thresholds must be three numbers"),
        ({"factor": 1.0}, "factor must lie in"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        MTCNN(**options, pretrained=False)


def test_frozen():
    detector = MTCNN(pretrained=False)
    assert not detector.training
    assert not any(weight.requires_grad for weight in detector.parameters())


def test_weights_are_pinned(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(weights.UnreachableError, match=r"idloss fetch mtcnn_pnet\.widerface"):
        MTCNN(cache_dir=tmp_path)
    other = tmp_path / "pnet.pt"
    other.write_bytes(b"something else")
    with pytest.raises(weights.NotAsPromisedError, match=re.escape(str(other))):
        weights.add("mtcnn_pnet.widerface", other, cache_dir=tmp_path)
