"""Two results of lmms-eval are compared score by score and answer by answer."""

import copy

import pytest

from latte_flow_hf.evaluation.understanding import compare, describe


RESULTS = {
    "results": {
        "words": {"alias": "words", "exact_match,none": 0.75, "exact_match_stderr,none": "N/A", "judge,none": None},
        "choices": {"alias": "choices", "acc,none": 0.5, "acc,strict": 0.25},
        "both": {"alias": "both", "acc,none": 0.5},
    },
    "higher_is_better": {
        "words": {"exact_match": True, "judge": True},
        "choices": {"acc": True},
        "both": {"acc": None},
    },
    "samples": {
        "words": [{"doc_id": 1, "resps": [["a cross"]]}, {"doc_id": 0, "resps": [["red"]]}],
        "choices": [{"doc_id": 0, "resps": [[(0.25, True)], [(0.5, False)]]}],
    },
}


def test_equal_results_have_no_difference():
    compared = compare(RESULTS, copy.deepcopy(RESULTS))
    equal = {"model": 0.75, "backbone": 0.75, "difference": 0.0}
    assert compared["words"] == {
        "scores": {"exact_match": equal},
        "num_answers": 2,
        "num_different": 0,
        "different": [],
    }
    assert compared["choices"]["scores"].keys() == {"acc", "acc,strict"} and compared["choices"]["num_answers"] == 1
    assert describe(compared) == [
        "words                   exact_match         model 0.7500   backbone 0.7500   difference 0",
        "words                   0 of 2 answers differ",
        "choices                 acc                 model 0.5000   backbone 0.5000   difference 0",
        "choices                 acc,strict          model 0.2500   backbone 0.2500   difference 0",
        "choices                 0 of 1 answers differ",
        "both                    acc                 model 0.5000   backbone 0.5000   difference 0",
    ]


def test_differences_are_found():
    other = copy.deepcopy(RESULTS)
    other["results"]["words"]["exact_match,none"] = 0.5
    other["samples"]["words"][1]["resps"] = [["blue"]]
    # The same choice, but not the same loss.
    other["samples"]["choices"][0]["resps"][1] = [(0.5000001, False)]
    compared = compare(RESULTS, other)
    assert compared["words"]["scores"]["exact_match"]["difference"] == 0.25
    assert compared["words"]["different"] == [{"document": 0, "model": [["red"]], "backbone": [["blue"]]}]
    assert compared["choices"]["num_different"] == 1
    assert "words                   1 of 2 answers differ" in describe(compared)


def test_results_for_different_questions_are_refused():
    other = copy.deepcopy(RESULTS)
    other["samples"]["words"][0]["doc_id"] = 7
    with pytest.raises(ValueError, match="the two results of words are for different questions"):
        compare(RESULTS, other)
