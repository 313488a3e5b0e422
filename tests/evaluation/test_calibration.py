from hashlib import sha256

import numpy as np
import pytest
import torch
from nets import TinySRNet
from tinybench import run

from idloss.evaluation import HR, Calibration, Cell, Results, write_calibration
from idloss.evaluation.calibration import THRESHOLDS, count_reached, identity, zoo_tables


def test_pairs_are_counted_at_each_threshold():
    rng = np.random.default_rng(0)
    gallery, probes = rng.standard_normal((2, 900, 4)).astype(np.float32)
    labels = rng.integers(0, 40, 900)
    first, second = rng.integers(0, 900, (2, 700))
    same = labels[first] == labels[second]
    counted = count_reached(gallery, probes, first, second, same, labels)
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (gallery, probes)]
    cosines = unit[0].astype(np.float64) @ unit[1].T
    listed = cosines[first, second]
    rows, columns = np.unique(first), np.unique(second)
    others = cosines[np.ix_(rows, columns)][labels[rows][:, None] != labels[columns]]
    for place, threshold in enumerate(THRESHOLDS):
        assert counted["mates"][place] == np.sum(listed[same] >= threshold)
        close = np.sum(others >= threshold + 1e-6), np.sum(others >= threshold - 1e-6)
        assert close[0] <= counted["strangers"][place] <= close[1]  # computed in float32
    assert counted["mates"][0] == same.sum()
    nobody = np.where(np.arange(900) == first[0], -1, labels)
    for unknown in (None, nobody):  # only the listed pairs are known to be of two
        few = count_reached(gallery, probes, first, second, same, unknown)
        assert few["strangers"][0] == (~same).sum()
        assert few["strangers"][40] == np.sum(listed[~same] >= THRESHOLDS[40])


@pytest.fixture
def table(data, fnet, srnets, tmp_path):
    results = run(data, {"f": fnet}, srnets)
    (path,) = write_calibration(results, tmp_path)
    return results, path


def asked(path, fnet, srnet, *about, **options):
    return Calibration([path]).odds(identity(fnet), identity(srnet), *about, **options)


def test_a_run_writes_what_verify_reads(table, fnet, srnets):
    results, path = table
    cell = Cell("verification", "f", "tiny", 14, 12)
    counts = results.arrays[cell]
    cosine = float(THRESHOLDS[45]) + 0.007
    for rows, told in (([112, 14], cell), ([27.4, 130], cell)):
        odds = asked(path, fnet, srnets["tiny"], rows, cosine)
        assert odds.size == (told.height, told.width)
        assert odds.fmr == pytest.approx(counts["strangers"][45] / counts["strangers"][0], abs=1e-4)
        assert odds.tmr == pytest.approx(counts["mates"][45] / counts["mates"][0], abs=1e-4)
    assert asked(path, fnet, srnets["tiny"], [28, 112], 0.5).size == (28, 24)
    assert asked(path, fnet, TinySRNet().eval(), [200, 130], 0.5).size == (112, 96)
    lowest = asked(path, fnet, srnets["tiny"], [200, 130], -1.1)
    assert (lowest.fmr, lowest.tmr) == (1, 1)
    # what was not measured is not made up: both small, smaller than all, other weights, treatment
    assert asked(path, fnet, srnets["tiny"], [14, 14], 0.5) is None
    assert asked(path, fnet, srnets["tiny"], [13, 112], 0.5) is None
    assert asked(path, fnet, TinySRNet().eval(), [14, 112], 0.5) is None
    assert asked(path, fnet, srnets["tiny"], [14, 112], 0.5, protocol="standard") is None
    with torch.no_grad():
        fnet.head.bias += 1
    assert asked(path, fnet, srnets["tiny"], [14, 112], 0.5) is None


def test_interpolations_are_told_apart(table, fnet, srnets):
    results, path = table
    for name in ("bilinear", "bicubic"):
        counts = results.arrays[Cell("verification", "f", name, 14, 12)]["strangers"]
        odds = asked(path, fnet, srnets[name], [14, 112], 0.5)
        assert odds.fmr == pytest.approx(counts[36] / counts[0], abs=1e-4)
    assert THRESHOLDS[36] == 0.5


def test_in_words(table, fnet, srnets):
    odds = asked(table[1], fnet, srnets["tiny"], [14, 112], 1.01)
    assert "of drawn with one face at 14x12" in str(odds)
    assert f"{int(table[0].arrays[Cell('verification', 'f', HR, 112, 96)]['strangers'][0])}" in str(
        odds
    )


def test_both_faces_small(data, fnet, srnets, tmp_path):
    (path,) = write_calibration(run(data, {"f": fnet}, srnets, probe="both"), tmp_path)
    odds = asked(path, fnet, srnets["tiny"], [14, 30], 0.5)
    assert odds.size == (14, 12)
    assert "with both faces at 14x12" in str(odds)
    assert asked(path, fnet, srnets["tiny"], [14, 112], 0.5) is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: "",
        lambda text: "task,fnet\nverification,f\n",
        lambda text: text.replace("# networks: {", "# networks: ["),
        lambda text: text.replace("f,tiny,14,12,-1,1,1\n", ""),
        lambda text: text.replace("0.96,", "nought,"),
        lambda text: "\n".join(line for line in text.split("\n") if ",hr," not in line),
    ],
)
def test_what_is_no_table_is_refused(table, harm):
    path = table[1]
    path.write_text(harm(path.read_text()))
    with pytest.raises(ValueError, match=r"is no calibration\.csv of idloss evaluate"):
        Calibration([path])


def test_runs_without_pairs_have_none(tmp_path):
    assert write_calibration(Results(), tmp_path) == []
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fnet", ["mobilefacenet", "mobilefacenet_relu6"])
def test_the_zoos_tables(fnet):
    zoo = Calibration(zoo_tables())
    weights = {one for _, nets, _ in zoo._tables for arch, one in nets.values() if arch == fnet}
    assert weights
    bicubic = ("interpolation_bicubic", sha256().hexdigest())
    for judge in weights:
        for rows, size in (((14, 112), 14), ((14, 20), 14), ((60, 130), 56), ((130, 200), 112)):
            cosines = np.arange(-2, 10) / 10
            odds = [zoo.odds((fnet, judge), bicubic, rows, cosine) for cosine in cosines]
            assert {one.size[0] for one in odds} == {size}
            rates = [(one.fmr, one.tmr) for one in odds]
            assert rates == sorted(rates, reverse=True)
            assert rates[0][0] > 0.7
            assert rates[-1][0] < 0.2  # of two blurred faces, strangers are as alike as that
