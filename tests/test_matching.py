from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import TinySRNet, tiny_fnet
from tinybench import SIZES, drawn_pairs, run
from torch import nn

from idloss import create_fnet, create_srnet
from idloss.data.files import DataError
from idloss.detection import Detections
from idloss.evaluation import HR, Cell, get_protocol, write_calibration
from idloss.evaluation.embedding import prepare_probe
from idloss.geometry import get_template
from idloss.matching import FaceMatcher

POINTS = torch.tensor(get_template("sphereface").points)


INPUT = {"input_size": (3, 112, 96), "mean": (0.5,) * 3, "std": (0.5,) * 3}


class Hidden(nn.Module):
    """A network whose numbers torch does not see."""

    def __init__(self, factor):
        super().__init__()
        self.answer = lambda x: (x * factor).cos().mean((2, 3))

    def forward(self, x):
        return self.answer(x)


@pytest.fixture
def nets():
    torch.manual_seed(1)
    return TinySRNet().eval(), create_fnet(tiny_fnet(size=(112, 96)))


def test_faces_are_treated_as_the_bench_treats_them(nets, tmp_path):
    srnet, fnet = nets
    data = drawn_pairs()
    results = run(data, {"f": fnet}, {"s": srnet}, cache=False)
    (table,) = write_calibration(results, tmp_path)
    matcher = FaceMatcher(srnet, fnet, crop="sphereface", tables=[table], device="cpu")
    crops = data.faces.crops_at(torch.arange(len(data.faces)), get_template("sphereface"))
    full = [one for (one,) in matcher.find(list(crops))]
    cells = {Cell("verification", "f", HR, 112, 96): full}
    for size in SIZES:
        probes = prepare_probe(crops, size, get_protocol("paper"))
        cells[Cell("verification", "f", "s", *size)] = [f for (f,) in matcher.find(list(probes))]
    for cell, faces in cells.items():
        counts = results.arrays[cell]["strangers"]
        for place, score in enumerate(results.arrays[cell]["scores"]):
            one = full[data.pairs.first[place]]
            cosine, odds = matcher.compare(one, faces[data.pairs.second[place]])
            assert cosine == pytest.approx(score, abs=2e-6)
            assert odds.size == (cell.height, cell.width)
            assert counts[-1] / counts[0] <= odds.fmr <= 1


def test_photos_and_what_is_a_face_of_how_many_rows(nets):
    faces = torch.stack([POINTS * 1.5 + 20, POINTS * 0.25 + 5])
    boxes = torch.cat((faces.amin(1), faces.amax(1)), 1)
    matcher = FaceMatcher(*nets, lambda photos: [Detections(boxes, torch.ones(2), faces)] * 2)
    photo = torch.randint(0, 255, (3, 220, 200), dtype=torch.uint8)
    (large, small), again = matcher.find([photo, photo])
    assert (large.rows, small.rows) == (pytest.approx(168), pytest.approx(28))
    assert large.box == tuple(boxes[0].tolist())
    assert large.embedding.norm() == pytest.approx(1)
    assert matcher.compare(large, again[0]) == (pytest.approx(1), None)
    assert matcher.compare(small, large)[0] < 0.999


def test_settings_tell_embeddings_apart(nets):
    def settings(*given, **options):
        return FaceMatcher(*given, **{"device": "cpu", "crop": "sphereface"} | options).settings

    same = settings(*nets)
    assert settings(*nets) == same
    assert settings("bicubic", nets[1]) != settings("bilinear", nets[1]) != same
    assert settings(nets[0], create_fnet(tiny_fnet(seed=3, size=(112, 96)))) != same
    assert settings(*nets, crop="arcface") != same
    assert settings(*nets, lambda photos: [], crop=None) != same
    finders = [SimpleNamespace(min_face=size) for size in (12, 20)]
    one, other = (settings(*nets, finder, crop=None) for finder in finders)
    assert one != other
    hidden = [create_fnet(Hidden(factor), **INPUT, crop="sphereface") for factor in (1, 2)]
    one, other = (settings(nets[0], fnet) for fnet in hidden)
    assert one != other


def test_crops_that_lack_what_the_networks_want_are_told(nets):
    with pytest.warns(UserWarning, match="makes 'ffhq' crops, of which crop=arcface holds 56%"):
        FaceMatcher(create_srnet("bicubic", crop="ffhq"), nets[1], crop="arcface", device="cpu")


def test_crops_of_other_shapes_are_refused_and_large_ones_shrunk(nets):
    matcher = FaceMatcher(*nets, crop="arcface", device="cpu")
    large = np.full((3, 224, 224), 90, np.uint8)
    ((face,),) = matcher.find([torch.from_numpy(large)])
    assert face.rows == 224
    ((small,),) = matcher.find([torch.from_numpy(large[:, :28, :28])])
    assert small.rows == 28
    with pytest.raises(DataError, match=r"a\.png: 112x96 is no arcface crop"):
        matcher.find([torch.zeros(3, 112, 96, dtype=torch.uint8)], ["a.png"])
