import re
from importlib.util import find_spec

import pytest
from minilfw import mini_lfw

from idloss.benchmark import (
    EvaluationCase,
    LossCase,
    SearchCase,
    benchmark_evaluation,
    benchmark_loss,
    benchmark_search,
    format_evaluation,
    format_search,
    format_timings,
)
from idloss.evaluation.results import HR


def test_loss_table_covers_every_way_and_counts_the_work():
    case = LossCase("mobilefacenet", batch=2, crop=None, sr_size=(28, 28), hr_size=(112, 112))
    timings = {t.name: t for t in benchmark_loss(case, rounds=1)}
    assert len(timings) == 4
    bare, ours = timings["bare arithmetic"], timings["IdentityPreservedLoss"]
    cached = timings["loss, target_features"]
    assert ours.flops == bare.flops  # no network pass beyond the unavoidable ones
    assert cached.flops < ours.flops  # no HR forward
    assert all(t.seconds > 0 and 0 < t.share < 1.5 and t.mebibytes >= 0 for t in timings.values())
    table = format_timings(list(timings.values()))
    assert table.count("\n") == 5
    assert "peak MiB" in table


def test_both_ways_of_evaluating_agree(tmp_path, monkeypatch):
    # in this process: what is looked at is the answers, not the memory
    monkeypatch.setattr("idloss.benchmark.evaluation.in_own_process", lambda f, *rest: f(*rest))
    data = mini_lfw(tmp_path, people=3, photos=3)
    case = EvaluationCase(str(data), "mobilefacenet", ((7, 6), (14, 12)), pairs=8, pretrained=False)
    released, ours, single = benchmark_evaluation(case)
    cells = {(HR, (112, 96))} | {(m, s) for m in ("bilinear", "bicubic") for s in case.sizes}
    assert set(released.scores) == set(ours.scores) == cells
    assert released.images == 2 * 8 * 5
    assert single.images == 2 * 8 * 3
    assert all(one.seconds > 0 and one.mebibytes > 50 for one in (released, ours, single))
    table = format_evaluation([released, ours, single])
    assert table.count("|\n") == 5
    apart = float(re.search(r"differ by (\S+) at most", table)[1])
    assert apart <= 2e-3  # OpenCV's warp places pixels to 1/32


def test_search_is_timed_with_what_is_installed():
    case = SearchCase(gallery=300, probes=20, width=8, k=3)
    searched = benchmark_search(case, rounds=1)
    assert "610 people, 10 draws" in searched[0].name
    ways = ["idloss", "FAISS"] if find_spec("faiss") else ["idloss"]
    assert [one.name for one in searched[1:]] == [f"3 best of 300, {way}" for way in ways]
    assert all(one.seconds > 0 for one in searched)
    assert searched[1].cosines == 6000
    assert format_search(searched).count("\n") == 1 + len(searched)


def test_evaluation_needs_pairs(tmp_path):
    data = mini_lfw(tmp_path, people=3, photos=3)
    (data / "pairs.txt").unlink()
    with pytest.raises(ValueError, match=r"no pairs; put pairs\.txt"):
        EvaluationCase(str(data)).open()
