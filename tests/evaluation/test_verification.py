import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from idloss.data.pairs import contiguous_folds
from idloss.evaluation import verification
from idloss.evaluation.protocols import PROTOCOLS
from idloss.evaluation.verification import (
    FAR_TARGETS,
    PAPER_RULE,
    SPHEREFACE_RULE,
    STANDARD_RULE,
    bootstrap,
    bootstrap_accuracy,
    centred_scores,
    kfold,
    pair_scores,
    rejecting_threshold,
    roc,
    summarise,
    verify,
)


def random_pairs(count, width=24, noise=1.0, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.5
    left = rng.standard_normal((count, width))
    other = rng.standard_normal((count, width))
    right = np.where(same[:, None], left, other) + noise * rng.standard_normal((count, width))
    return left + offset, right + offset, same


GRIDS = {
    "paper": np.linspace(-10000, 10000, 10001) / 10000,
    "sphereface": np.array([step / 10000 for step in range(-10000, 10001)]),
    "standard": np.arange(0, 4, 0.01),
}


def slow_kfold(scores_of, same, rule):
    """Each protocol as its authors state it; `scores_of` a fold's training pairs `[N]`."""
    accuracies, thresholds = [], []
    grid = GRIDS[rule.name]
    for train, test in KFold(n_splits=10, shuffle=False).split(same):
        scores = scores_of(train)

        def answers(limits, places, scores=scores):
            values, truth, limits = scores[places], same[places], np.reshape(limits, (-1, 1))
            if rule.name == "standard":
                return (values < limits) == truth
            if rule.name == "paper":
                return (values > limits) == truth
            return np.where(truth, values > limits, values < limits)

        found = answers(grid, train).sum(1)
        best = grid[found == found.max()]
        chosen = {"standard": best[0], "paper": best[-1], "sphereface": best.mean()}[rule.name]
        thresholds.append(chosen)
        accuracies.append(answers(chosen, test).mean())
    return accuracies, thresholds


RULES = [protocol.rule for protocol in PROTOCOLS.values()]


def test_paper_protocol_equals_released_code(golden):
    result = kfold(golden["kfold_scores"], golden["kfold_labels"])
    np.testing.assert_array_equal(result.accuracies, golden["kfold_acc"])
    np.testing.assert_array_equal(result.thresholds, golden["kfold_thresholds"])
    assert result.correct.mean() == pytest.approx(golden["kfold_acc"].mean())


def test_released_cosine_of_flip_concatenated_features(golden):
    features = np.concatenate((golden["sface_feat"], golden["sface_feat_flip"]), axis=1)
    scores = pair_scores(features[:4], features[4:])
    np.testing.assert_allclose(scores, golden["pair_cosine"], atol=2e-6)


@pytest.mark.parametrize(
    ("rule", "offset"),
    [(PAPER_RULE, 0.0), (SPHEREFACE_RULE, 3.0), (STANDARD_RULE, 3.0)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_protocols_equal_their_slow_statement(rule, offset):
    left, right, same = random_pairs(240, noise=2.0, offset=offset)

    def scores_of(train):
        mean = np.concatenate((left[train], right[train])).mean(0)
        sides = (side - mean if rule.name == "sphereface" else side for side in (left, right))
        a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        return ((a - b) ** 2).sum(1) if rule.name == "standard" else (a * b).sum(1)

    accuracies, thresholds = slow_kfold(scores_of, same, rule)
    result = verify(left, right, same, rule)
    np.testing.assert_array_equal(result.accuracies, accuracies)
    np.testing.assert_allclose(result.thresholds, thresholds, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_scores_that_tie_with_thresholds(rule):
    """Scores on the grid itself: the comparisons' strictness is all that counts."""
    rng = np.random.default_rng(1)
    grid = rule.grid()
    scores = grid[rng.integers(grid.size // 2, grid.size // 2 + 12, size=200)]
    same = rng.random(200) < 0.5
    accuracies, thresholds = slow_kfold(lambda _: scores, same, rule)
    result = kfold(scores, same, rule)
    np.testing.assert_array_equal(result.accuracies, accuracies)
    np.testing.assert_array_equal(result.thresholds, thresholds)


def test_sphereface_survives_embeddings_that_lie_close_together():
    left, right, _ = random_pairs(200, noise=0.5)
    shift = 1e5 * np.random.default_rng(3).standard_normal(24)
    folds = contiguous_folds(200)
    shifted = centred_scores(left + shift, right + shift, folds)
    np.testing.assert_allclose(shifted, centred_scores(left, right, folds), atol=1e-8)


def test_folds_may_be_given_in_any_order():
    left, right, same = random_pairs(300, noise=2.0)
    order = np.random.default_rng(0).permutation(300)
    plain = verify(left, right, same, PAPER_RULE)
    folds = contiguous_folds(300).numpy()[order]
    mixed = verify(left[order], right[order], same[order], PAPER_RULE, folds=folds)
    np.testing.assert_array_equal(mixed.accuracies, plain.accuracies)
    np.testing.assert_array_equal(mixed.correct, plain.correct[order])


def test_zero_embedding_has_cosine_zero():
    left, right = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 0.0], [3.0, 4.0]]])
    np.testing.assert_allclose(pair_scores(left, right), [0, 1])
    np.testing.assert_allclose(pair_scores(left, right), torch.cosine_similarity(left, right))


def test_summary_names_and_orders_everything():
    left, right, same = random_pairs(1000, noise=1.5)
    scores = pair_scores(left, right)
    result = kfold(scores, same)
    summary = summarise(scores, same, result, draws=200, seed=3)
    names = ["tar@far=0.1", "tar@far=0.01", "tar@far=0.001", "tar@far=0.0001"]
    assert list(summary) == ["accuracy", "auc", "eer", *names]
    for found in summary.values():
        assert found.repeats == 10
        assert found.low <= found.mean <= found.high
        assert found.boot_low <= found.value <= found.boot_high
    assert summary["accuracy"].value == result.accuracies.mean()
    assert summary["auc"].value == pytest.approx(roc_auc_score(same, scores))
    folds = [roc_auc_score(same[part], scores[part]) for part in np.split(np.arange(1000), 10)]
    assert summary["auc"].mean == pytest.approx(np.mean(folds))
    assert summary["auc"].std == pytest.approx(np.std(folds))
    interval = stats.t.interval(0.95, 9, np.mean(folds), stats.sem(folds))
    assert (summary["auc"].low, summary["auc"].high) == pytest.approx(interval)


GOOD = np.ones((20, 4))
BAD = np.where(np.arange(80).reshape(20, 4) == 30, np.inf, GOOD)
SAME = [0, 1] * 10


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        (kfold, ([0.1, np.nan] * 10, SAME), r"score \[1\] is nan"),
        (kfold, ([2.0] * 20, SAME), "are no cosine, which the rule 'paper' judges"),
        (kfold, ([0.1] * 20, [1, -1] * 10), "pair 1 has .*-1"),
        (kfold, ([0.1] * 19, SAME), r"\[20\].*got \[19\]"),
        (kfold, ([0.1] * 4, SAME[:4]), "4 pairs cannot be cut into 10 folds"),
        (verify, (GOOD, BAD, SAME, STANDARD_RULE), r"right embedding \[7, 2\] is inf"),
        (verify, (GOOD, GOOD[1:], SAME, SPHEREFACE_RULE), r"\[20, 4\] and \[19, 4\]"),
        (verify, (GOOD, GOOD, SAME, PAPER_RULE, [0, 2] * 10), "without gaps"),
        (roc, ([1, 2, 3, 4], [1, 1, 1, 1]), "all 4 pairs have the label 1"),
    ],
)
def test_bad_pairs_are_named(call, arguments, says):
    with pytest.raises(ValueError, match=says):
        call(*arguments)


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


@pytest.mark.parametrize(
    ("scores", "auc", "eer", "tar"),
    [([0.9, 0.8, 0.2, 0.1], 1, 0, 1), ([0.1, 0.2, 0.8, 0.9], 0, 1, 0), ([0.5] * 4, 0.5, 0.5, 0)],
)
def test_roc_ends(scores, auc, eer, tar):
    curve = roc(scores, [1, 1, 0, 0])
    assert (curve.auc, curve.eer, curve.tar_at(1e-4)) == (auc, eer, tar)


@pytest.mark.parametrize("block_bytes", [1, verification.BLOCK_BYTES])
def test_bootstrap_equals_resampling_one_by_one(monkeypatch, block_bytes):
    """Samples rebuilt from the same seed and judged by scikit-learn."""
    monkeypatch.setattr(verification, "BLOCK_BYTES", block_bytes)
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
