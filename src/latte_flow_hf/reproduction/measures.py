# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Quality over training: what is compared, between measured points, and as gains that are better when larger."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A measure of quality.

    Args:
        name (`str`): `"accuracy"` or `"frechet"`.
        label (`str`): for readers.
        margin (`float`): the smallest gain that matters.
    """

    name: str
    label: str
    margin: float

    def value(self, point: dict[str, Any]) -> float:
        """The share of correct images of all prompts (0 to 1), or the Fréchet distance."""
        return point["accuracy"]["all"] if self.name == "accuracy" else point["frechet"]

    def gain(self, value: float, over: float) -> float:
        """How much better `value` is than `over`: the difference of shares, or the log of the ratio of distances.

        Raises:
            `ValueError`: if a distance is not positive.
        """
        if self.name == "accuracy":
            return value - over
        if not min(value, over) > 0:
            raise ValueError(f"a Fréchet distance must be positive to be compared, got {value} and {over}.")
        return math.log(over / value)

    def mean(self, values: Sequence[float]) -> float:
        """The mean of shares, or the geometric mean of distances, which large ones do not dominate."""
        return statistics.fmean(values) if self.name == "accuracy" else statistics.geometric_mean(values)

    def describe(self, gain: float) -> str:
        """A gain for readers: `+3.2 points`, or `x 0.87`, the ratio of the distances."""
        return f"{100 * gain:+.1f} points" if self.name == "accuracy" else f"x {math.exp(-gain):.2f}"

    def describe_range(self, low: float, high: float) -> str:
        """A range of gains for readers: `-0.5 to +3.2 points`, or `x 0.80 to 0.95`; ratios fall as gains rise."""
        if self.name == "accuracy":
            return f"{100 * low:+.1f} to {100 * high:+.1f} points"
        return f"x {math.exp(-high):.2f} to {math.exp(-low):.2f}"


# Chosen: three points are about the standard error of an accuracy over three seeds and 200 prompts; the Fréchet
# distance of so few images varies by some per cent.
ACCURACY = Measure("accuracy", "accuracy", 0.03)
FRECHET = Measure("frechet", "Fréchet distance", math.log(1.1))
MEASURES = (ACCURACY, FRECHET)


def value_at_step(points: Sequence[dict[str, Any]], step: float, measure: Measure) -> float:
    """The value of a measure after `step` steps, linear between the measured points over the logarithm of the steps.

    Raises:
        `ValueError`: if `step` is before the first point or after the last one.
    """
    steps = [point["step"] for point in points]
    if not steps[0] <= step <= steps[-1]:
        raise ValueError(f"step must be from {steps[0]} to {steps[-1]}, the measured ones, got {step}.")
    values = [measure.value(point) for point in points]
    return float(np.interp(math.log(step), np.log(steps), values))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the standard deviation (with n - 1) of a value over the seeds; `None` for a single seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
