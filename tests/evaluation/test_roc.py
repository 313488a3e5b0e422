import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from idloss.evaluation.bootstrap import bootstrap, bootstrap_accuracy
from idloss.evaluation.kfold import kfold
from idloss.evaluation.roc import FAR_TARGETS, rejecting_threshold, roc


@pytest.mark.parametrize("levels", [None, 15])
def test_roc_figures_equal_scikit_learn(levels):
    rng = np.random.default_rng(0)
    same = rng.random(3000) < 0.4
    scores = same * 0.8 + rng.standard_normal(3000)
    if levels:  # many ties
        scores = np.round(scores * levels / 6)
    curve = roc(scores, same)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(curve.far, far)
    np.testing.assert_allclose(curve.tar, tar)
    assert curve.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    for target in (*FAR_TARGETS, 0.5, 1.0):
        expected = tar[far <= target].max()
        assert curve.tar_at(target) == pytest.approx(expected)
        threshold = rejecting_threshold(scores[~same], target)
        assert (scores[same] > threshold).mean() == pytest.approx(expected)
        assert (scores[~same] > threshold).mean() <= target
    # the rate at which FAR and FRR meet, found by bisection along the same straight lines
    walk = np.linspace(0, len(far) - 1, 400001)
    far_line, frr_line = (np.interp(walk, np.arange(len(far)), y) for y in (far, 1 - tar))
    assert curve.eer == pytest.approx(far_line[np.abs(far_line - frr_line).argmin()], abs=1e-4)


def test_roc_ends():
    same = np.array([1, 1, 0, 0])
    perfect = roc([0.9, 0.8, 0.2, 0.1], same)
    assert (perfect.auc, perfect.eer, perfect.tar_at(1e-4)) == (1, 0, 1)
    reversed_ = roc([0.1, 0.2, 0.8, 0.9], same)
    assert (reversed_.auc, reversed_.eer, reversed_.tar_at(1e-4)) == (0, 1, 0)
    constant = roc([0.5] * 4, same)
    assert (constant.auc, constant.eer, constant.tar_at(0.1)) == (0.5, 0.5, 0)


def test_bootstrap_equals_resampling_one_by_one():
    """Samples rebuilt from the same seed and judged by scikit-learn."""
    rng = np.random.default_rng(0)
    same = rng.random(200) < 0.5
    scores = same * 1.0 + rng.standard_normal(200)
    found = bootstrap(scores, same, draws=20, seed=7)
    order = np.argsort(-scores, kind="stable")
    streams = np.random.default_rng(7).spawn(2)
    classes = [np.flatnonzero(same[order]), np.flatnonzero(~same[order])]
    picks = [
        places[stream.integers(places.size, size=(20, places.size))]
        for places, stream in zip(classes, streams, strict=True)
    ]
    for draw in range(20):
        sample = order[np.concatenate([pick[draw] for pick in picks])]
        assert found["auc"][draw] == pytest.approx(roc_auc_score(same[sample], scores[sample]))
        expected = roc(scores[sample], same[sample])
        assert found["eer"][draw] == pytest.approx(expected.eer)
        for target in FAR_TARGETS:
            assert found[f"tar@far={target:g}"][draw] == pytest.approx(expected.tar_at(target))


def test_bootstrap_is_seeded_and_independent_of_block_size():
    same = np.arange(300) % 2 == 0
    scores = same + np.random.default_rng(0).standard_normal(300)
    whole = bootstrap(scores, same, draws=30, seed=1)
    blocks = bootstrap(scores, same, draws=30, seed=1, block_bytes=1)
    other = bootstrap(scores, same, draws=30, seed=2)
    for name, figures in whole.items():
        np.testing.assert_allclose(blocks[name], figures, rtol=1e-12)
    assert not np.array_equal(whole["auc"], other["auc"])


def test_bootstrap_agrees_with_theory():
    """The spread of a mean of right answers is known."""
    rng = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    scores = same * 1.5 + rng.standard_normal(2000)
    result = kfold(scores / 10, same)
    sampled = bootstrap_accuracy(result, draws=4000, seed=0)
    p = result.accuracies
    expected = np.sqrt((p * (1 - p) / 200).mean() / 10)
    assert sampled.mean() == pytest.approx(result.accuracy, abs=3 * expected / np.sqrt(4000))
    assert sampled.std() == pytest.approx(expected, rel=0.05)
