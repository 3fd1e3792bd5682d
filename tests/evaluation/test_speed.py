"""The speed harness: what it counts, keeps and refuses. No timings: those are what it reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from latte_flow_hf.cli import app
from latte_flow_hf.evaluation import speed
from latte_flow_hf.evaluation.contestants import KINDS, fill, make_contestant, named_parameters
from latte_flow_hf.evaluation.speed import Suite, count_flops, of_a_picture, run_suite, summarise


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = BENCHMARKS / "speed_tiny.yaml"


@pytest.fixture(scope="module")
def tiny() -> Suite:
    return Suite.from_yaml(TINY)


@pytest.fixture(scope="module")
def latte(tiny) -> Suite:
    """The contestants of one process alone."""
    names = ("latte-k2", "latte-k1")
    return replace(tiny, contestants={name: tiny.contestants[name] for name in names}, ratios=[], rounds=1)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return run_suite(tiny, folder), folder


def test_every_kind_has_its_turns_and_is_reported(tiny, measured):
    results, folder = measured
    assert {given["kind"] for given in tiny.contestants.values()} == set(KINDS)
    for name in tiny.contestants:
        turns, facts = results["rounds"][name], results["facts"][name]
        assert [len(turn["steps"]) for turn in turns] == [4, 4]
        assert all(second > 0 for turn in turns for second in turn["steps"])
        assert facts["extrapolated"] == (name != "dit")
        assert facts["flops"]["steps"][1] > 0 and 0 < facts["step_parameters"] <= facts["parameters"]
        if name != "floor-k2":
            assert all(turn["decode"] > 0 for turn in turns) and facts["flops"]["decode"] > 0
    assert all(results["rounds"][name][0]["prefill"] > 0 for name in ("latte-k1", "janus", "embedded"))

    assert json.loads((folder / "results.json").read_text()) == results
    report = (folder / "results.md").read_text()
    assert all(report.count(f"| {name} |") == 1 for name in tiny.contestants)
    assert report.count("is not at its published size") == len(tiny.contestants) - 1
    assert "| loop flops | latte-k2 / latte-k1 |" in report and "at most 0.55 | yes |" in report
    assert Image.open(folder / "results.png").width > 500
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md", "results.png"]
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_a_run_goes_on_where_it_was_stopped(latte, tmp_path):
    first = run_suite(replace(latte, rounds=2), tmp_path)
    stopped = json.loads((tmp_path / "results.json").read_text())
    del stopped["summary"], stopped["rounds"]["latte-k1"][1]
    (tmp_path / "results.json").write_text(json.dumps(stopped))
    again = run_suite(replace(latte, rounds=3), tmp_path)
    assert again["rounds"]["latte-k2"][:2] == first["rounds"]["latte-k2"]
    assert again["rounds"]["latte-k1"][0] == first["rounds"]["latte-k1"][0]
    assert again["rounds"]["latte-k1"][1] != first["rounds"]["latte-k1"][1]
    assert {len(turns) for turns in again["rounds"].values()} == {3}


def test_results_of_another_suite_or_state_are_not_mixed(latte, tmp_path, monkeypatch):
    run_suite(latte, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"another suite \(\['measured_steps'\]\)"):
        run_suite(replace(latte, measured_steps=2), tmp_path)
    monkeypatch.setattr(speed, "__version__", "another")
    with pytest.raises(ValueError, match=r"another environment \(\['versions'\]\)"):
        run_suite(latte, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_processes_make_room_for_each_other(tiny, tmp_path, monkeypatch):
    """Room for one family at a time: the first one's process ends before the second's starts."""
    names = ("latte-k2", "embedded")
    suite = replace(tiny, contestants={name: tiny.contestants[name] for name in names}, ratios=[], rounds=2)
    events = []
    start, stop = speed._Processes._start, speed._Processes._stop
    room = lambda self: speed.HEADROOM_BYTES + (0 if self.live else 10**9)  # noqa: E731
    monkeypatch.setattr(speed._Processes, "_available", room)
    monkeypatch.setattr(speed._Processes, "_start", lambda self, family: (start(self, family), events.append("start")))
    monkeypatch.setattr(speed._Processes, "_stop", lambda self, family: (stop(self, family), events.append("stop")))
    results = run_suite(suite, tmp_path)
    # The second round runs backwards: who is there stays there.
    assert events == ["start", "stop", "start", "stop", "start", "stop"]
    assert {len(turns) for turns in results["rounds"].values()} == {2}


def test_what_does_not_fit_is_refused_before_anything_runs(latte, tmp_path, monkeypatch):
    monkeypatch.setattr(speed._Processes, "_available", lambda self: speed.HEADROOM_BYTES)
    with pytest.raises(ValueError, match=r"contestants \['latte-k2', 'latte-k1'\] need about"):
        run_suite(latte, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_contestant_that_fails_is_named_and_the_rest_is_kept(latte, tmp_path):
    odd = {**latte.contestants["latte-k1"], "pixels": 70}
    suite = replace(latte, contestants={"good": latte.contestants["latte-k2"], "odd": odd})
    with pytest.raises(RuntimeError, match=r"(?s)contestant 'odd' failed:.*multiple of 32, got 70"):
        run_suite(suite, tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["rounds"]["good"]) == 1


def test_flops_of_a_quarter_of_the_layers(tiny):
    """28 layers of a width at which what the experts share no longer counts; the floor is known in closed form."""
    width, ff = 256, 1024
    backbone = {
        **tiny.contestants["latte-k2"]["sizes"]["backbone"],
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": 28,
        "vocab_size": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }
    sizes = {**tiny.contestants["latte-k2"]["sizes"], "backbone": backbone}
    pool, flops = {}, {}
    for kind, num_experts in (("latte_flow", 1), ("latte_flow", 4), ("floor", 4)):
        contestant = make_contestant(kind, {"kind": kind, "num_experts": num_experts, "sizes": sizes})
        networks = contestant.networks()
        fill(networks, pool, "cpu", torch.float32)
        with torch.no_grad():
            flops[kind, num_experts] = count_flops(contestant.prepare(networks), 4)
    loops = {key: sum(parts["steps"]) for key, parts in flops.items()}
    # A little below a quarter: the last layer of a group hands no scores on.
    assert 0.24 <= loops["latte_flow", 4] / loops["latte_flow", 1] <= 0.26
    layer = 2 * width * width + 2 * width * (width // 2) + 3 * width * ff
    assert flops["floor", 4]["steps"] == [2 * 2 * 64 * (7 * layer + 2 * width * 4)] * 4
    assert loops["floor", 4] < loops["latte_flow", 4]
    assert flops["latte_flow", 1]["decode"] == flops["latte_flow", 4]["decode"] > 0


def test_groupings_of_the_same_layers_share_their_weights(latte):
    pool = {}
    found = []
    for contestant in latte.made().values():
        networks = contestant.networks()
        fill(networks, pool, "cpu", torch.float32)
        found.append({name: parameter.data_ptr() for name, _, _, parameter in named_parameters(networks)})
        assert not any(parameter.is_meta for *_, parameter in named_parameters(networks))
    common = set(found[0]) & set(found[1])
    assert all(found[0][name] == found[1][name] for name in common)
    # With one group, the third layer has a gate too: all that the other lacks.
    assert {name.split(".")[-2] for name in set(found[0]) ^ set(found[1])} == {"residual_gate"}
    layers = [weights for name, weights in pool.items() if "gate_proj" in name and "tower" in name]
    assert len({weights.data_ptr() for weights in layers}) == len(layers) == 4


@pytest.mark.parametrize(
    ("kind", "part", "millions"),
    [
        # Qwen2-VL-2B: 28 layers of 46.8 M, each with a modulation of 9.4 M beside it, and embeddings of 233 M.
        ("latte_flow", "model", 28 * (46.8 + 56.3) + 233),
        # DiT-XL/2 has 675 M; diffusers gives each of the 28 layers an embedder of label and timestep (2.78 M).
        ("dit", "transformer", 675 + 27 * 2.78),
        ("sana", "transformer", 592),
        # 24 layers of 51.4 M, embeddings of 210 M, heads and VQ autoencoder of about 110 M.
        ("janus", "model", 24 * 51.4 + 210 + 125),
    ],
)
def test_published_sizes(kind, part, millions):
    networks = make_contestant(kind, {"kind": kind}).networks()
    parameters = [parameter for *_, parameter in named_parameters({part: networks[part]})]
    assert all(parameter.is_meta for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) / 1e6 == pytest.approx(millions, rel=0.02)


def test_a_step_runs_one_expert():
    counts = {}
    for num_experts in (1, 4, 14):
        contestant = make_contestant("latte", {"kind": "latte_flow", "num_experts": num_experts})
        modules = contestant.step_modules(contestant.networks())
        counts[num_experts] = sum(p.numel() for module in modules for p in module.parameters())
    assert counts[4] / counts[1] == pytest.approx(1 / 4, rel=0.03)
    assert counts[14] / counts[1] == pytest.approx(1 / 14, rel=0.15)


def test_a_picture_is_put_together_from_its_parts():
    parts = {"prefill": 1.0, "steps": [5.0, 2.0, 4.0, 3.0], "decode": 10.0}
    few = of_a_picture(parts, {"steps": 40, "batch": 2})
    assert few == {"prefill": 0.5, "loop": (5 + 39 * 3) / 2, "step": 1.5, "decode": 5.0, "picture": (11 + 122) / 2}
    whole = of_a_picture(parts, {"steps": 4, "batch": 1})
    assert whole["loop"] == 14 and whole["picture"] == 25


def test_ratios_are_taken_within_rounds(latte):
    """Both sides twice as slow in the second round: the ratio does not spread."""
    facts = {"steps": 2, "batch": 1, "step_parameters": 7, "flops": {"prefill": 0, "steps": [6, 6], "decode": 0}}
    turn = lambda second: {"prefill": 0.0, "steps": [second] * 2, "decode": 0.0, "peak_bytes": None}  # noqa: E731
    results = {
        "facts": dict.fromkeys(latte.contestants, facts),
        "rounds": {"latte-k2": [turn(1.0), turn(2.0)], "latte-k1": [turn(4.0), turn(8.0)]},
    }
    ratio = {"of": "loop", "contestant": "latte-k2", "over": "latte-k1", "at_most": 0.2}
    found = summarise(replace(latte, ratios=[ratio, {**ratio, "of": "loop_flops", "at_most": 1}]), results)
    assert found["ratios"][0] == {**ratio, "median": 0.25, "min": 0.25, "max": 0.25, "met": False}
    assert found["ratios"][1]["median"] == 1 and found["ratios"][1]["met"]
    assert found["contestants"]["latte-k1"]["seconds"]["loop"] == {"median": 12.0, "min": 8.0, "max": 16.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ({"rounds": 2.5}, "rounds must be"),
        ({"measured_steps": 1}, "measured_steps must be a whole number of at least 2"),
        ({"threads": 0}, "threads must be"),
        ({"dtype": "float31"}, "dtype must be one of torch's"),
        ({"device": "abacus"}, "device must be"),
        ({"contestants": {}}, "contestants must name at least one"),
        ({"contestants": {"a": {"kind": "crayon"}}}, r"kind must be one of \['latte_flow', 'floor', .*'crayon'"),
        ({"contestants": {"a": {"kind": "dit", "num_experts": 4}}}, r"fields of 'dit' are .*\['num_experts'\]"),
        ({"contestants": {"a": {"kind": "dit", "steps": 0}}}, "'a': steps must be a positive whole number, got 0"),
        ({"contestants": {"a": {"kind": "dit", "sizes": {"x": {}}}}}, r"may name \['transformer', 'vae'\], got \['x'"),
        ({"contestants": {"a": {"kind": "latte_flow", "num_experts": 3}}}, "num_experts must divide"),
        ({"ratios": [{"of": "loop", "contestant": "a", "over": "latte-k1"}]}, "unknown contestant 'a'; known are"),
        ({"ratios": [{"of": "mood", "contestant": "latte-k1", "over": "latte-k1"}]}, "a ratio is of one of"),
        ({"ratios": [{"of": "loop"}]}, "a ratio has"),
        ({"speed": "high"}, "expected name, contestants and others of"),
    ],
)
def test_bad_suites_end_in_one_line_and_write_nothing(changed, words, tmp_path):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**yaml.safe_load(TINY.read_text()), "ratios": [], **changed}))
    with pytest.raises(ValueError, match=words):
        run_suite(Suite.from_yaml(suite), tmp_path / "out")
    result = CliRunner().invoke(app, ["bench", str(suite), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_are_valid(path):
    given = yaml.safe_load(path.read_text())
    suite = Suite(**{**given, "device": "cpu"})
    assert suite.steps_of(next(iter(suite.made().values()))) >= 2
