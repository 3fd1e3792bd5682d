# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The claims of the paper, each judged by the results."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .measures import ACCURACY, FRECHET, MEASURES, Measure, value_at_step
from .plan import Plan
from .settings import Variant
from .verdicts import FAILS, HOLDS, UNKNOWN, Interval, combine, judge, t_interval


# Chosen: what nobody notices in a time per image, and what "about" means for a factor.
TIME_MARGIN = 1.05
ABOUT = 1.25
# Chosen: below this, neither of two models has learned to draw what is asked for, and their difference says nothing.
MIN_ACCURACY = 0.05
# The paper: "flat from about 20 steps up for guidance of about 4 and more".
FLAT_STEPS, FLAT_GUIDANCE = 20, 4.0

VANILLA, MAIN, LARGER, SMALLER = (Variant(num_experts=number) for number in (1, 4, 2, 8))
PROBABILITIES = Variant(num_experts=4, residual_attention="probabilities")
NO_RESIDUAL = Variant(num_experts=4, residual_attention=None)

Values = Callable[[Measure, dict[str, Any], dict[str, Any]], tuple[float, float]]


@dataclass(frozen=True)
class Finding:
    """What one measure says: `text` with the estimate and its interval, and a verdict."""

    text: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Args:
        statement (`str`): the claim.
        criterion (`str`): what is compared, and when it holds.
        findings (`list[Finding]`): one for each measure.
    """

    statement: str
    criterion: str
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        return combine([finding.verdict for finding in self.findings])


class Evidence:
    """The results, by variant and seed.

    Args:
        plan ([`Plan`]): the plan.
        results (`dict`): what `runs.run` returns, by the name of the run.
        timing (`dict`): what `timing.measure_timing` returns.
        drawn_distance (`float`): what `quality.distance_of_drawn_images` returns.
    """

    def __init__(self, plan: Plan, results: dict[str, dict], timing: dict[str, Any], drawn_distance: float):
        self.plan, self.timing, self.drawn_distance = plan, timing, drawn_distance
        self.runs: dict[str, list[dict]] = {variant.name: [] for variant in plan.settings.variants}
        for name, (variant, _) in plan.settings.runs.items():
            self.runs[variant.name].append(results[name])

    def missing(self, *variants: Variant) -> list[Finding]:
        """A finding for variants that were not trained; empty if all were."""
        labels = [variant.label for variant in variants if variant.name not in self.runs]
        return [Finding(f"not trained: {'; '.join(labels)}", UNKNOWN)] if labels else []

    def compare(
        self,
        first: Variant,
        second: Variant,
        values: Values,
        low: float,
        high: float,
        learned: Values | None = None,
    ) -> list[Finding]:
        """Findings about the gain of one variant over another, which a claim states to be from `low` to `high` times
        the margin of the measure. `values` takes a measure and the runs of both with the same seed; `learned` gives
        the accuracies that tell whether anything was learned, those of `values` if left out."""
        if missing := self.missing(first, second):
            return missing
        runs = list(zip(self.runs[first.name], self.runs[second.name]))
        pairs = {measure: [values(measure, *pair) for pair in runs] for measure in MEASURES}
        accuracies = [(learned or values)(ACCURACY, *pair) for pair in runs]
        return quality_findings(pairs, accuracies, low, high)

    def time_ratios(self, first: Variant, second: Variant) -> Interval:
        """The logarithm of the ratio of their times per image, one image at a time, within each round."""
        size = str(min(self.plan.settings.timing.batch_sizes))
        rounds = self.timing["rounds"][size]
        pairs = zip(rounds[first.name], rounds[second.name])
        return t_interval([math.log(a["wall"] / b["wall"]) for a, b in pairs])


def quality_findings(
    pairs: dict[Measure, list[tuple[float, float]]], accuracies: list[tuple[float, float]], low: float, high: float
) -> list[Finding]:
    """A finding for each measure. `pairs` has a pair of values for each seed, `low` and `high` are in units of the
    margin of the measure. If `accuracies` say that neither network has learned to draw what is asked for, no measure
    decides anything."""
    findings = [quality_finding(measure, pairs[measure], low, high) for measure in MEASURES]
    if max(ACCURACY.mean(column) for column in zip(*accuracies)) >= MIN_ACCURACY:
        return findings
    note = f"both accuracies are below {MIN_ACCURACY:.0%}, which compares nothing"
    return [Finding(f"{finding.text}; {note}", UNKNOWN) for finding in findings]


def quality_finding(measure: Measure, pairs: Sequence[tuple[float, float]], low: float, high: float) -> Finding:
    """Judge the gains of pairs of values, one for each seed, against a range in units of the measure's margin."""
    gains = [measure.gain(value, over) for value, over in pairs]
    first, second = (measure.mean(column) for column in zip(*pairs))
    both = f"{first:.1%} against {second:.1%}" if measure is ACCURACY else f"{first:.3g} against {second:.3g}"
    text = f"{measure.label}: {both}, {measure.describe(sum(gains) / len(gains))}"
    if len(gains) < 2:
        return Finding(f"{text} (one seed: no spread)", UNKNOWN)
    interval = t_interval(gains)
    text += f" (95% interval {measure.describe_range(interval.low, interval.high)}, {len(gains)} seeds)"
    return Finding(text, judge(interval, low * measure.margin, high * measure.margin))


def ratio_finding(name: str, interval: Interval, low: float, high: float, how: str) -> Finding:
    """Judge a ratio, whose logarithm has the `interval`, against the range from `low` to `high`."""
    text = f"{name}: x {math.exp(interval.mean):.2f}"
    if interval.low < interval.high:
        text += f" (95% interval {math.exp(interval.low):.2f} to {math.exp(interval.high):.2f}, {how})"
    else:
        text += f" ({how})"
    return Finding(text, judge(interval, math.log(low) if low > 0 else -math.inf, math.log(high)))


def at_equal_compute(measure: Measure, first: dict, second: dict) -> tuple[float, float]:
    """The values at the end of both runs."""
    return measure.value(first["points"][-1]), measure.value(second["points"][-1])


def at_equal_steps(measure: Measure, first: dict, second: dict) -> tuple[float, float]:
    """The values after the steps of the run that has fewer."""
    step = min(run["points"][-1]["step"] for run in (first, second))
    return value_at_step(first["points"], step, measure), value_at_step(second["points"], step, measure)


def over_training(measure: Measure, first: dict, second: dict) -> tuple[float, float]:
    """The means over all measured points: the mean height of the curves over the logarithm of the operations."""
    means = [measure.mean([measure.value(point) for point in run["points"]]) for run in (first, second)]
    return means[0], means[1]


def judge_claims(evidence: Evidence) -> list[Claim]:
    """All claims, in the order of the report."""
    infinity = math.inf
    margins = f"{100 * ACCURACY.margin:.0f} points of accuracy and {math.expm1(FRECHET.margin):.0%} of the distance"
    at_least = f"holds if it is not worse by more than {margins}"
    compare = evidence.compare
    return [
        Claim(
            "At equal training compute, K = 4 is at least as good as the vanilla network, K = 1.",
            f"at the end of the budget; {at_least}",
            compare(MAIN, VANILLA, at_equal_compute, -1, infinity),
        ),
        Claim(
            "At an equal number of training steps, K = 4 is at least as good as K = 1 (convergence figure).",
            f"at the last step of K = 1, K = 4 between its points; {at_least}",
            compare(MAIN, VANILLA, at_equal_steps, -1, infinity),
        ),
        Claim(
            "The operations of sampling fall by a factor of about K.",
            "all steps of an image, K = 1 over K = 4; holds from 3.6 to 4.4",
            evidence.missing(VANILLA, MAIN) or [_flops_finding(evidence)],
        ),
        Claim(
            "The time per image falls by a factor of about 3 for K = 4 (0.158 s to 0.052 s).",
            f"one image at a time, K = 1 over K = 4; holds from {3 / ABOUT:.1f} to {3 * ABOUT:.2f}",
            evidence.missing(VANILLA, MAIN)
            or [_time_finding(evidence, "time of K = 1 over K = 4", VANILLA, MAIN, 3 / ABOUT, 3 * ABOUT)],
        ),
        Claim(
            "Too small groups lose quality: K = 8 is worse than K = 4.",
            f"at equal steps, as in the paper's ablation; holds if it is worse by more than {margins}",
            compare(SMALLER, MAIN, at_equal_steps, -infinity, -1),
        ),
        Claim(
            "Larger groups are near or slightly better: K = 2 is at least as good as K = 4.",
            f"at equal steps, as in the paper's ablation; {at_least}",
            compare(LARGER, MAIN, at_equal_steps, -1, infinity),
        ),
        Claim(
            "Residual attention speeds up convergence (scores).",
            "K = 4 with scores and without, mean over all points of training; holds if it is better at all",
            compare(MAIN, NO_RESIDUAL, over_training, 0, infinity, at_equal_compute),
        ),
        Claim(
            "Residual attention speeds up convergence (probabilities).",
            "K = 4 with probabilities and without, mean over all points of training; holds if it is better at all",
            compare(PROBABILITIES, NO_RESIDUAL, over_training, 0, infinity, at_equal_compute),
        ),
        Claim(
            "Residual attention costs nothing noticeable at inference.",
            f"one image at a time, K = 4 with scores over K = 4 without; holds up to {TIME_MARGIN}",
            evidence.missing(MAIN, NO_RESIDUAL)
            or [_time_finding(evidence, "time with over time without", MAIN, NO_RESIDUAL, 0, TIME_MARGIN)],
        ),
        Claim(
            "Quality is flat from about 20 steps up for guidance of 4 and more.",
            "K = 4, 20 steps against the most steps, mean over guidance of 4 and more; holds if they differ by "
            f"less than {margins}",
            _flat_findings(evidence),
        ),
        Claim(
            "Understanding is exactly that of the frozen backbone.",
            "logits equal to the bit, and the same answers, for every trained model; holds if all are",
            [_understanding_finding(evidence)],
        ),
    ]


def _time_finding(evidence: Evidence, name: str, first: Variant, second: Variant, low: float, high: float) -> Finding:
    interval = evidence.time_ratios(first, second)
    return ratio_finding(name, interval, low, high, f"{interval.count} rounds")


def _flops_finding(evidence: Evidence) -> Finding:
    flops = evidence.timing["flops"]
    ratio = math.log(flops[VANILLA.name]["loop"] / flops[MAIN.name]["loop"])
    expected = MAIN.num_experts / VANILLA.num_experts
    interval = Interval(ratio, ratio, ratio, 1)
    return ratio_finding("operations of K = 1 over K = 4", interval, 0.9 * expected, 1.1 * expected, "counted")


def _flat_findings(evidence: Evidence) -> list[Finding]:
    grid = evidence.plan.settings.grid
    if missing := evidence.missing(MAIN):
        return missing
    scales = [] if grid is None else [scale for scale in grid.guidance_scale if scale >= FLAT_GUIDANCE]
    steps = [] if grid is None else grid.num_inference_steps
    if grid is None or MAIN.num_experts not in grid.num_experts or not scales or FLAT_STEPS not in steps:
        return [
            Finding("not measured: the recipe has no grid with K = 4, 20 steps and guidance of 4 and more", UNKNOWN)
        ]
    most = max(steps)
    if most == FLAT_STEPS:
        return [Finding("not measured: the grid has no more than 20 steps", UNKNOWN)]

    def mean(run: dict, steps: int, measure: Measure) -> float:
        cells = [
            cell for cell in run["grid"] if cell["num_inference_steps"] == steps and cell["guidance_scale"] in scales
        ]
        return measure.mean([measure.value(cell) for cell in cells])

    runs = evidence.runs[MAIN.name]
    pairs = {
        measure: [(mean(run, FLAT_STEPS, measure), mean(run, most, measure)) for run in runs] for measure in MEASURES
    }
    return quality_findings(pairs, pairs[ACCURACY], -1, 1)


def _understanding_finding(evidence: Evidence) -> Finding:
    found = [run["understanding"] for runs in evidence.runs.values() for run in runs]
    questions, equal = (sum(item[name] for item in found) for name in ("num_questions", "num_equal_answers"))
    num_exact = sum(item["are_logits_equal"] for item in found)
    text = f"logits equal to the bit for {num_exact} of {len(found)} models, {equal} of {questions} answers equal"
    return Finding(text, HOLDS if num_exact == len(found) and equal == questions else FAILS)
