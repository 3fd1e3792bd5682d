"""Intervals against closed forms and scipy's own test; verdicts at the borders of their ranges."""

import math

import pytest
from scipy import stats

from latte_flow_hf.reproduction.verdicts import FAILS, HOLDS, UNKNOWN, Interval, combine, judge, t_interval


def test_interval_of_three_by_hand():
    # The mean of 1, 2, 3 is 2 and its standard error 1 / sqrt(3); t(2) at 97.5% is 4.30265.
    interval = t_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2.0, 3)
    assert interval.high - 2.0 == pytest.approx(4.302652729696 / math.sqrt(3)) == pytest.approx(2.0 - interval.low)


def test_interval_is_that_of_scipys_paired_test():
    first, second = [0.41, 0.52, 0.38, 0.47], [0.33, 0.49, 0.35, 0.36]
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    interval = t_interval([a - b for a, b in zip(first, second)])
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_interval_without_spread():
    assert t_interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5, 2)
    with pytest.raises(ValueError, match="at least two differences, got 1; use more seeds"):
        t_interval([0.5])
    with pytest.raises(ValueError, match="must be finite"):
        t_interval([0.5, math.nan])


@pytest.mark.parametrize(
    ("ends", "low", "high", "verdict"),
    [
        ((-0.02, 0.10), -0.03, math.inf, HOLDS),
        ((-0.03, -0.01), -0.03, math.inf, HOLDS),
        ((-0.04, 0.10), -0.03, math.inf, UNKNOWN),
        ((-0.20, -0.04), -0.03, math.inf, FAILS),
        ((-0.02, 0.02), -0.03, 0.03, HOLDS),
        ((-0.02, 0.04), -0.03, 0.03, UNKNOWN),
        ((0.04, 0.05), -0.03, 0.03, FAILS),
        ((-0.20, -0.03), -math.inf, -0.03, HOLDS),
        ((-0.02, 0.20), -math.inf, -0.03, FAILS),
    ],
)
def test_verdict_follows_from_interval_and_range(ends, low, high, verdict):
    assert judge(Interval(sum(ends) / 2, *ends, 3), low, high) == verdict


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="low must not be above high"):
        judge(Interval(0, 0, 0, 1), 1, 0)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([HOLDS, UNKNOWN], UNKNOWN),
        ([FAILS, FAILS], FAILS),
        ([UNKNOWN, FAILS], FAILS),
        ([HOLDS, FAILS], UNKNOWN),
        ([UNKNOWN, UNKNOWN], UNKNOWN),
        ([HOLDS], HOLDS),
    ],
)
def test_a_claim_holds_by_all_measures_or_not(verdicts, expected):
    assert combine(verdicts) == combine(verdicts[::-1]) == expected
