"""Made-up results in which each claim holds, fails, or cannot be told."""

import copy
import re

from latte_flow_hf.reproduction.claims import judge_claims
from latte_flow_hf.reproduction.plan import Plan
from latte_flow_hf.reproduction.verdicts import FAILS, HOLDS, UNKNOWN


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
            if cell["num_inference_steps"] == 20:
                cell["accuracy"]["all"], cell["frechet"] = 0.2, 5.0
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
    # The Fréchet distances are equal, too.
    claim = judge_claims(make_evidence(k1=0.01, k4=0.01))[0]
    assert claim.verdict == UNKNOWN and [finding.verdict for finding in claim.findings] == [UNKNOWN] * 2
    assert all("both accuracies are below 5%" in finding.text for finding in claim.findings)
    assert judge_claims(make_evidence(k1=0.01, k4=0.1))[0].verdict == HOLDS
    # Over the whole training, its end tells whether anything was learned: here the mean is 4.7% and the end 10%.
    convergence = judge_claims(make_evidence(**{"k4": 0.1, "k4-none": 0.03}))[6]
    assert convergence.verdict == HOLDS and "compares nothing" not in convergence.findings[0].text


def test_findings_tell_values_and_intervals(make_evidence):
    claims = judge_claims(make_evidence(k1=0.15))
    first = claims[0].findings
    number = r"[+-]?\d+(?:\.\d+)?"
    assert re.fullmatch(
        rf"accuracy: {number}% against {number}%, \+6{number} points "
        rf"\(95% interval {number} to {number} points, 3 seeds\)",
        first[0].text,
    )
    assert re.fullmatch(
        rf"Fréchet distance: {number} against {number}, x 0\.19 \(95% interval x {number} to {number}, 3 seeds\)",
        first[1].text,
    )
    assert claims[2].findings[0].text == "operations of K = 1 over K = 4: x 4.00 (counted)"
    assert claims[3].findings[0].text.startswith("time of K = 1 over K = 4: x 3.00")


def test_what_was_not_trained_or_measured_is_told(make_evidence, make_settings):
    evidence = make_evidence(k1=0.15)
    del evidence.runs["k8"]
    evidence.plan = Plan(evidence.plan.settings.model_copy(update={"grid": None}), "cpu", evidence.plan.step_flops, {})
    claims = judge_claims(evidence)
    assert claims[4].findings[0].text == "not trained: K = 8" and claims[4].verdict == UNKNOWN
    assert claims[9].findings[0].text.startswith("not measured") and claims[9].verdict == UNKNOWN
