"""Made-up results in which each claim holds, fails, or cannot be told."""

import copy
import math

import pytest

from latte_flow_hf.reproduction.claims import Evidence, judge_claims
from latte_flow_hf.reproduction.plan import Plan
from latte_flow_hf.reproduction.verdicts import FAILS, HOLDS, UNKNOWN


VARIANTS = [{"num_experts": number} for number in (1, 2, 4, 8)]
VARIANTS += [{"num_experts": 4, "residual_attention": mode} for mode in ("probabilities", None)]
GRID = {"num_experts": [4], "num_inference_steps": [5, 20, 40], "guidance_scale": [1.0, 4.0, 6.0]}
# Accuracy after all steps; after half as many it is half of it, and so on.
ACCURACIES = {"k1": 0.3, "k2": 0.42, "k4": 0.8, "k8": 0.5, "k4-probabilities": 0.8, "k4-none": 0.6}


@pytest.fixture
def make_evidence(make_settings):
    """Results of all variants with a little noise; arguments replace accuracies at the end of the budget."""

    def make(seeds=(1, 2, 3), times=(30.0, 10.0, 9.8), **accuracies) -> Evidence:
        settings = make_settings(variants=VARIANTS, seeds=list(seeds), grid=GRID, num_points=4)
        step_flops = {variant.name: 8000 // variant.num_experts for variant in settings.variants}
        plan = Plan(
            settings.model_copy(update={"budget": 8000.0 * 800}), "cpu", step_flops, dict.fromkeys(step_flops, 1)
        )
        results = {}
        for name, (variant, seed) in settings.runs.items():
            final = {**ACCURACIES, **accuracies}[variant.name] + 0.002 * math.sin(7 * seed + len(name))
            points = [
                {"step": step, "accuracy": {"all": final / 2**i}, "frechet": 4.0 / (final / 2**i + 1e-9)}
                for step, i in zip(plan.points(variant), reversed(range(4)))
            ]
            cells = [
                {
                    "num_inference_steps": n,
                    "guidance_scale": g,
                    "accuracy": {"all": 0.4 if n == 5 else final},
                    "frechet": 3.0,
                }
                for n in GRID["num_inference_steps"]
                for g in GRID["guidance_scale"]
            ]
            results[name] = {
                "points": points,
                "grid": cells if variant.name == "k4" else [],
                "understanding": {"num_questions": 9, "num_equal_answers": 9, "are_logits_equal": True},
            }
        vanilla, main, plain = times
        milliseconds = {**dict.fromkeys(step_flops, main), "k1": vanilla, "k4": main, "k4-none": plain}
        rounds = {name: [{"wall": value * (1 + 0.003 * i)} for i in range(5)] for name, value in milliseconds.items()}
        flops = {name: {"loop": flops, "image": flops + 9} for name, flops in step_flops.items()}
        return Evidence(plan, results, {"rounds": {"1": rounds}, "flops": flops})

    return make


def verdicts(evidence) -> list[str]:
    return [claim.verdict for claim in judge_claims(evidence)]


def test_every_claim_can_hold(make_evidence):
    # After the steps of K = 1, K = 4 has a quarter of its 80%, which is less than 30%.
    assert verdicts(make_evidence(k1=0.15, k2=0.42, k4=0.8, k8=0.5)) == [HOLDS] * 11


def test_every_claim_of_quality_can_fail(make_evidence):
    evidence = make_evidence(times=(20.0, 10.0, 8.0), **{"k1": 0.9, "k2": 0.1, "k4": 0.5, "k8": 1.0, "k4-none": 0.7})
    evidence.runs["k4-probabilities"] = copy.deepcopy(evidence.runs["k4"])
    evidence.runs["k8"] = copy.deepcopy(evidence.runs["k4"])
    for run in evidence.runs["k4"]:
        for cell in run["grid"]:
            cell["accuracy"]["all"] -= 0.2 * (cell["num_inference_steps"] == 20)
    evidence.runs["k2"][1]["understanding"]["are_logits_equal"] = False
    evidence.timing["flops"]["k1"]["loop"] //= 2
    assert verdicts(evidence) == [FAILS] * 11


def test_one_seed_decides_nothing_about_quality(make_evidence):
    claims = judge_claims(make_evidence(seeds=(1,), k1=0.15))
    by_seed = [claim for claim in claims if "seed" in claim.findings[0].text]
    assert len(by_seed) == 7 and {claim.verdict for claim in by_seed} == {UNKNOWN}
    # Counts, times and bits need no seeds.
    assert [claim.verdict for claim in claims if claim not in by_seed] == [HOLDS] * 4


def test_seeds_that_disagree_cannot_tell(make_evidence):
    evidence = make_evidence(k1=0.15)
    for point in evidence.runs["k4"][1]["points"]:
        point["accuracy"]["all"], point["frechet"] = 0.01, 400.0
    assert judge_claims(evidence)[0].verdict == UNKNOWN


def test_two_models_that_have_learned_nothing_are_not_equally_good(make_evidence):
    claim = judge_claims(make_evidence(k1=0.01, k4=0.01))[0]
    assert claim.findings[0].verdict == UNKNOWN and "compares nothing" in claim.findings[0].text


def test_findings_tell_values_and_intervals(make_evidence):
    claims = judge_claims(make_evidence(k1=0.15))
    first = claims[0].findings
    assert (
        first[0].text.startswith("accuracy: 80.") and "against 1" in first[0].text and "points (95%" in first[0].text
    )
    assert "Fréchet distance: " in first[1].text and ", x 0.1" in first[1].text and "3 seeds" in first[1].text
    assert claims[2].findings[0].text == "operations of K = 1 over K = 4: x 4.00 (counted)"
    assert claims[3].findings[0].text.startswith("time of K = 1 over K = 4: x 3.00")


def test_what_was_not_trained_or_measured_is_told(make_evidence, make_settings):
    evidence = make_evidence(k1=0.15)
    del evidence.runs["k8"]
    evidence.plan = Plan(evidence.plan.settings.model_copy(update={"grid": None}), "cpu", evidence.plan.step_flops, {})
    claims = judge_claims(evidence)
    assert claims[4].findings[0].text == "not trained: K = 8" and claims[4].verdict == UNKNOWN
    assert claims[9].findings[0].text.startswith("not measured") and claims[9].verdict == UNKNOWN
