from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from eosin.errors import PredictionsError
from eosin.evaluation.proportions import clopper_pearson, wilson


@pytest.mark.parametrize(("successes", "n"), [(584, 646), (2876, 3154), (1, 7), (0, 12), (12, 12), (50, 100), (1, 1)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_intervals_equal_statsmodels(successes: int, n: int, level: float) -> None:
    for ours, theirs in ((wilson, "wilson"), (clopper_pearson, "beta")):
        interval = ours(successes, n, level=level)
        low, high = proportion_confint(successes, n, alpha=1 - level, method=theirs)
        assert interval.low == pytest.approx(np.nan_to_num(low, nan=0.0), abs=1e-12)
        assert interval.high == pytest.approx(np.nan_to_num(high, nan=1.0), abs=1e-12)
        assert (interval.point, interval.n, interval.clusters) == (successes / n, n, n)


def test_clopper_pearson_never_covers_too_little() -> None:
    n = 20
    intervals = [clopper_pearson(k, n) for k in range(n + 1)]
    for truth in np.linspace(0.01, 0.99, 99):
        hit = np.array([interval.low <= truth <= interval.high for interval in intervals])
        assert stats.binom(n, truth).pmf(np.arange(n + 1))[hit].sum() >= 0.95


def test_what_is_no_proportion_is_refused() -> None:
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(PredictionsError, match="no proportion"):
            wilson(successes, n)
    with pytest.raises(PredictionsError, match="level"):
        clopper_pearson(1, 2, level=95)
