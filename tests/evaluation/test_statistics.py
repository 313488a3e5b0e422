import numpy as np
import pytest
from scipy import stats

from idloss.evaluation.statistics import (
    estimate,
    sign_test,
    student_t_quantile,
    student_t_two_sided,
)


@pytest.mark.parametrize("degrees", [1, 2, 3.5, 9, 120])
def test_student_t_equals_scipy(degrees):
    for t in (0.0, 0.3, 1.0, 2.5, 12.0, 500.0):
        assert student_t_two_sided(t, degrees) == pytest.approx(
            2 * stats.t.sf(t, degrees), rel=1e-10
        )
    for level in (0.5, 0.9, 0.95, 0.999):
        assert student_t_quantile(level, degrees) == pytest.approx(
            stats.t.ppf((1 + level) / 2, degrees), rel=1e-9
        )


def test_sign_test_equals_scipy():
    for wins, losses in ((0, 0), (3, 3), (10, 3), (1, 40), (700, 640), (2500, 3100)):
        expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_estimate_of_one_repeat_has_no_interval():
    only = estimate([0.7])
    assert only.value == 0.7
    assert np.isnan(only.low)
    with pytest.raises(ValueError, match="level must lie"):
        estimate([0.1, 0.2], level=95)
    with pytest.raises(ValueError, match="R >= 1"):
        estimate([])
