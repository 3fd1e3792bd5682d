"""Values between measured points, and gains that are better when larger."""

import math

import pytest

from latte_flow_hf.reproduction.measures import ACCURACY, FRECHET, mean_and_spread, value_at_step


def point(step, accuracy, frechet):
    return {"step": step, "accuracy": {"all": accuracy, "digit": 0.0}, "frechet": frechet}


POINTS = [point(100, 0.1, 8.0), point(200, 0.3, 4.0), point(400, 0.4, 2.0)]


def test_values_are_linear_over_the_logarithm_of_the_steps():
    assert [value_at_step(POINTS, step, ACCURACY) for step in (100, 200, 400)] == [0.1, 0.3, 0.4]
    assert value_at_step(POINTS, 100 * math.sqrt(2), ACCURACY) == pytest.approx(0.2)
    assert value_at_step(POINTS, 200 * math.sqrt(2), FRECHET) == pytest.approx(3.0)
    for step in (99, 401):
        with pytest.raises(ValueError, match="step must be from 100 to 400"):
            value_at_step(POINTS, step, ACCURACY)


def test_a_gain_is_positive_if_the_first_is_better():
    assert ACCURACY.gain(0.5, over=0.4) == pytest.approx(0.1) and ACCURACY.describe(0.1) == "+10.0 points"
    assert FRECHET.gain(2.0, over=4.0) == pytest.approx(math.log(2)) and FRECHET.describe(math.log(2)) == "x 0.50"
    assert ACCURACY.describe_range(-0.005, 0.032) == "-0.5 to +3.2 points"
    assert FRECHET.describe_range(0.0, math.log(2)) == "x 0.50 to 1.00"
    with pytest.raises(ValueError, match="must be positive"):
        FRECHET.gain(0.0, over=4.0)


def test_distances_have_a_geometric_mean():
    assert ACCURACY.mean([0.1, 0.3]) == pytest.approx(0.2) and FRECHET.mean([1.0, 100.0]) == pytest.approx(10.0)


def test_spread_needs_two_seeds():
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_and_spread([1.0]) == (1.0, None)
