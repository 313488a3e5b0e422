import sys

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar

from idloss.evaluation.statistics import estimate, mcnemar, paired_t, sign_test


# the usual printed table of Student's t (Fisher and Yates, Table III)
@pytest.mark.parametrize(("count", "t"), [(2, 12.7062), (10, 2.2622)])
def test_interval_is_students(count, t):
    repeats = np.random.default_rng(0).random(count)
    found = estimate(repeats)
    reach = t * repeats.std(ddof=1) / np.sqrt(count)
    low, high = repeats.mean() - reach, repeats.mean() + reach
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_estimates_of_little(monkeypatch):
    only = estimate([0.7])
    assert only.value == 0.7
    assert np.isnan(only.low)
    with pytest.raises(ValueError, match="R >= 1"):
        estimate([])
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'idloss\[eval\]'"):
        estimate([0.1, 0.2])


@pytest.mark.parametrize("rates", [(0.8, 0.8), (0.8, 0.83), (0.99, 0.5), (1, 1)])
def test_mcnemar_equals_statsmodels(rates):
    rng = np.random.default_rng(0)
    a, b = (rng.random(3000) < rate for rate in rates)
    only_a, only_b, p = mcnemar(a, b)
    table = [[(a & b).sum(), only_a], [only_b, (~a & ~b).sum()]]
    expected = reference_mcnemar(table, exact=True).pvalue if only_a + only_b else 1
    assert p == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert p == sign_test(only_a, only_b)
    assert (only_a, only_b) == ((a & ~b).sum(), (~a & b).sum())


def test_paired_t_equals_scipy():
    rng = np.random.default_rng(0)
    a = rng.random(10)
    for shift in (0, 0.01, 0.5):
        b = a + shift + 0.02 * rng.standard_normal(10)
        assert paired_t(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert (paired_t(a, a), paired_t(a, a + 0.1)) == (1, 0)
    with pytest.raises(ValueError, match="two draws"):
        paired_t([0.1], [0.2])
    with pytest.raises(ValueError, match=r"figure \[1\] is nan"):
        paired_t([0.1, np.nan], [0.2, 0.3])
