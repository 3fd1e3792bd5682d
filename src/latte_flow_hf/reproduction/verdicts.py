# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""From repeated measurements to a verdict: pure functions.

A claim says in which range a true difference lies, for example [-0.03, infinity) for "at least as good". The runs give
a 95% interval for the same difference. The claim *holds here* if the interval lies inside the range, it *does not hold
here* if the interval lies outside, and otherwise these runs *cannot tell*.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


HOLDS = "holds here"
FAILS = "does not hold here"
UNKNOWN = "cannot tell"

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its uncertainty.

    Args:
        mean (`float`): the estimate.
        low, high (`float`): the ends of the interval; both are the mean for a number that is counted.
        count (`int`): the number of measurements.
    """

    mean: float
    low: float
    high: float
    count: int


def t_interval(differences: Sequence[float]) -> Interval:
    """The 95% interval of a mean by Student's t distribution: m +- t(n - 1) * s / sqrt(n), s with n - 1.

    It assumes that the differences are independent and about normally distributed. Pairing runs with the same seed
    removes from them what the seed does to both.

    Args:
        differences (`Sequence[float]`): n differences, one for each seed.

    Raises:
        `ValueError`: if there are fewer than two, which have no spread, or one is not finite.
    """
    if len(differences) < 2:
        raise ValueError(f"an interval needs at least two differences, got {len(differences)}; use more seeds.")
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"differences must be finite, got {list(differences)}.")
    count = len(differences)
    mean = math.fsum(differences) / count
    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half, count)


def judge(interval: Interval, low: float, high: float) -> str:
    """Compare an interval with the range [low, high] that a claim states.

    Returns:
        `str`: `HOLDS`, `FAILS` or `UNKNOWN`.

    Raises:
        `ValueError`: if the range is empty.
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}.")
    if low <= interval.low and interval.high <= high:
        return HOLDS
    if interval.high < low or interval.low > high:
        return FAILS
    return UNKNOWN


def combine(verdicts: Sequence[str]) -> str:
    """The verdict of a claim about several measures: it holds if it holds by all of them, and does not if it fails by
    one and holds by none; otherwise `UNKNOWN`."""
    if all(verdict == HOLDS for verdict in verdicts):
        return HOLDS
    return FAILS if FAILS in verdicts and HOLDS not in verdicts else UNKNOWN
