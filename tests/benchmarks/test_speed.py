"""The speed benchmark: what it counts, keeps and refuses. It tests no times: those are what the benchmark reports."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import latte_flow_hf
from benchmarks import parts, speed, workers
from benchmarks.report import per_image, summarize
from benchmarks.scenarios import materialize, named_parameters
from benchmarks.speed import run_suite
from benchmarks.suite import KINDS, Suite, make_scenario
from benchmarks.workers import count_flops


ROOT = Path(__file__).parents[2]
SUITES = ROOT / "benchmarks" / "suites"
TINY = SUITES / "speed_tiny.yaml"


@pytest.fixture(scope="module")
def tiny() -> Suite:
    return Suite.from_yaml(TINY)


@pytest.fixture(scope="module")
def latte(tiny) -> Suite:
    """The scenarios of one process alone."""
    names = ("latte-k2", "latte-k1")
    return replace(tiny, scenarios={name: tiny.scenarios[name] for name in names}, ratios=[], num_rounds=1)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    return run_suite(tiny, folder), folder


def test_every_kind_is_measured_and_reported(tiny, measured):
    results, folder = measured
    assert {content["kind"] for content in tiny.scenarios.values()} == set(KINDS)
    for name in tiny.scenarios:
        measurements, info = results["rounds"][name], results["scenarios"][name]
        assert [len(measurement["steps"]) for measurement in measurements] == [min(4, info["num_steps"])] * 2
        assert all(seconds > 0 for measurement in measurements for seconds in measurement["steps"])
        assert info["extrapolated"] == (name not in ("dit", "sana-sprint", "fused"))
        assert info["flops"]["steps"][1] > 0 and 0 < info["step_parameters"] <= info["parameters"]
        if name != "matmul-k2":
            assert all(measurement["decode"] > 0 for measurement in measurements) and info["flops"]["decode"] > 0
    assert all(results["rounds"][name][0]["prefill"] > 0 for name in ("latte-k1", "janus", "sana", "fused"))

    assert json.loads((folder / "results.json").read_text()) == results
    report = (folder / "results.md").read_text()
    assert all(report.count(f"| {name} |") == 1 for name in tiny.scenarios)
    assert report.count("is not at its published size") == len(tiny.scenarios) - 2
    assert "| loop flops | latte-k2 / latte-k1 |" in report and "at most 0.55 | yes |" in report
    assert Image.open(folder / "results.png").width > 500
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md", "results.png"]
    assert results["environment"]["versions"]["torch"] == torch.__version__


def test_an_interrupted_run_is_resumed(latte, tmp_path):
    first = run_suite(replace(latte, num_rounds=2), tmp_path)
    interrupted = json.loads((tmp_path / "results.json").read_text())
    del interrupted["summary"], interrupted["rounds"]["latte-k1"][1]
    (tmp_path / "results.json").write_text(json.dumps(interrupted))
    again = run_suite(replace(latte, num_rounds=3), tmp_path)
    assert again["rounds"]["latte-k2"][:2] == first["rounds"]["latte-k2"]
    assert again["rounds"]["latte-k1"][0] == first["rounds"]["latte-k1"][0]
    assert again["rounds"]["latte-k1"][1] != first["rounds"]["latte-k1"][1]
    assert {len(measurements) for measurements in again["rounds"].values()} == {3}


def test_results_of_another_suite_or_version_are_not_mixed(latte, tmp_path, monkeypatch):
    run_suite(latte, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"another suite \(\['num_measured_steps'\]\)"):
        run_suite(replace(latte, num_measured_steps=2), tmp_path)
    monkeypatch.setattr(latte_flow_hf, "__version__", "another")
    with pytest.raises(ValueError, match=r"another environment \(\['versions'\]\)"):
        run_suite(latte, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_processes_are_stopped_when_memory_is_short(tiny, tmp_path, monkeypatch):
    """Memory for one family at a time: the process of the first one ends before that of the second starts."""
    names = ("latte-k2", "embedded")
    suite = replace(tiny, scenarios={name: tiny.scenarios[name] for name in names}, ratios=[], num_rounds=2)
    events = []
    pool, start, stop = workers.WorkerPool, workers.WorkerPool._start, workers.WorkerPool._stop
    available = lambda self: workers.HEADROOM_BYTES + (0 if self.running else 10**9)  # noqa: E731
    monkeypatch.setattr(pool, "_available_bytes", available)
    monkeypatch.setattr(pool, "_start", lambda self, family: (start(self, family), events.append("start")))
    monkeypatch.setattr(pool, "_stop", lambda self, family: (stop(self, family), events.append("stop")))
    results = run_suite(suite, tmp_path)
    # The second round runs in reverse order, so the process that is running stays.
    assert events == ["start", "stop", "start", "stop", "start", "stop"]
    assert {len(measurements) for measurements in results["rounds"].values()} == {2}


def test_what_does_not_fit_into_memory_is_refused_before_anything_runs(latte, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.WorkerPool, "_available_bytes", lambda self: workers.HEADROOM_BYTES)
    with pytest.raises(ValueError, match=r"scenarios \['latte-k2', 'latte-k1'\] need about"):
        run_suite(latte, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scenario_that_fails_is_named_and_earlier_measurements_are_kept(latte, tmp_path):
    odd = {**latte.scenarios["latte-k1"], "image_size": 70}
    suite = replace(latte, scenarios={"good": latte.scenarios["latte-k2"], "odd": odd})
    with pytest.raises(RuntimeError, match=r"(?s)scenario 'odd' failed:.*multiple of 32, got 70"):
        run_suite(suite, tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["rounds"]["good"]) == 1


def test_flops_of_a_quarter_of_the_layers(tiny):
    """28 layers, wide enough that what the experts share is negligible; the matrix products have a closed form."""
    width, ff = 256, 1024
    backbone = {
        **tiny.scenarios["latte-k2"]["sizes"]["backbone"],
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": 28,
        "vocab_size": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }
    sizes = {**tiny.scenarios["latte-k2"]["sizes"], "backbone": backbone}
    shared_weights, flops = {}, {}
    for kind, num_experts in (("latte_flow", 1), ("latte_flow", 4), ("matmul", 4)):
        scenario = make_scenario(kind, {"kind": kind, "num_experts": num_experts, "sizes": sizes})
        networks = scenario.build_networks()
        materialize(networks, shared_weights, "cpu", torch.float32)
        with torch.no_grad():
            flops[kind, num_experts] = count_flops(scenario.prepare(networks), 4)
    loops = {key: sum(parts["steps"]) for key, parts in flops.items()}
    # Not exactly a quarter: embeddings and head are shared, and the first layer of a group has no gate.
    assert 0.24 <= loops["latte_flow", 4] / loops["latte_flow", 1] <= 0.26
    layer = 2 * width * width + 2 * width * (width // 2) + 3 * width * ff
    assert flops["matmul", 4]["steps"] == [2 * 2 * 64 * (7 * layer + 2 * width * 4)] * 4
    assert loops["matmul", 4] < loops["latte_flow", 4]
    assert flops["latte_flow", 1]["decode"] == flops["latte_flow", 4]["decode"] > 0


def test_groupings_of_the_same_layers_share_their_weights(latte):
    shared_weights = {}
    pointers = []
    for scenario in latte.build_scenarios().values():
        networks = scenario.build_networks()
        materialize(networks, shared_weights, "cpu", torch.float32)
        pointers.append({name: parameter.data_ptr() for name, _, _, parameter in named_parameters(networks)})
        assert not any(parameter.is_meta for *_, parameter in named_parameters(networks))
    common = set(pointers[0]) & set(pointers[1])
    assert all(pointers[0][name] == pointers[1][name] for name in common)
    # With one group, the third layer has a gate too: the only difference.
    assert {name.split(".")[-2] for name in set(pointers[0]) ^ set(pointers[1])} == {"residual_gate"}
    layers = [weights for name, weights in shared_weights.items() if "gate_proj" in name and "tower" in name]
    assert len({weights.data_ptr() for weights in layers}) == len(layers) == 4


def test_a_step_runs_one_expert():
    num_parameters = {}
    for num_experts in (1, 4, 14):
        scenario = make_scenario("latte", {"kind": "latte_flow", "num_experts": num_experts})
        modules = scenario.step_modules(scenario.build_networks())
        num_parameters[num_experts] = sum(p.numel() for module in modules for p in module.parameters())
    assert num_parameters[4] / num_parameters[1] == pytest.approx(1 / 4, rel=0.03)
    assert num_parameters[14] / num_parameters[1] == pytest.approx(1 / 14, rel=0.15)


def test_seconds_per_image_are_the_sum_of_the_parts():
    parts = {"prefill": 1.0, "steps": [5.0, 2.0, 4.0, 3.0], "decode": 10.0}
    few_steps = per_image(parts, {"num_steps": 40, "batch_size": 2})
    assert few_steps == {"prefill": 0.5, "loop": (5 + 39 * 3) / 2, "step": 1.5, "decode": 5.0, "image": (11 + 122) / 2}
    all_steps = per_image(parts, {"num_steps": 4, "batch_size": 1})
    assert all_steps["loop"] == 14 and all_steps["image"] == 25


def test_processor_time_leaves_out_what_others_do():
    """A call that waits takes time by the wall clock alone."""

    def generate(num_steps, mark):
        time.sleep(0.05)
        mark("step")
        mark("decode")

    assert sum(workers.measure(generate, 1)["steps"]) >= 0.05
    assert sum(workers.measure(generate, 1, clock="cpu")["steps"]) < 0.04


def test_ratios_are_computed_within_rounds(latte):
    """Both scenarios take twice as long in the second round: the ratio is the same in both."""
    info = {"num_steps": 2, "batch_size": 1, "step_parameters": 7}
    info["flops"] = {"prefill": 0, "steps": [6, 6], "decode": 0}
    measurement = lambda step: {"prefill": 0.0, "steps": [step] * 2, "decode": 0.0, "peak_bytes": None}  # noqa: E731
    results = {
        "scenarios": dict.fromkeys(latte.scenarios, info),
        "rounds": {
            "latte-k2": [measurement(1.0), measurement(2.0)],
            "latte-k1": [measurement(4.0), measurement(8.0)],
        },
    }
    ratio = {"quantity": "loop", "scenario": "latte-k2", "over": "latte-k1", "at_most": 0.2}
    suite = replace(latte, ratios=[ratio, {**ratio, "quantity": "loop_flops", "at_most": 1}])
    summary = summarize(suite, results)
    assert summary["ratios"][0] == {**ratio, "median": 0.25, "min": 0.25, "max": 0.25, "met": False}
    assert summary["ratios"][1]["median"] == 1 and summary["ratios"][1]["met"]
    assert summary["scenarios"]["latte-k1"]["seconds"]["loop"] == {"median": 12.0, "min": 8.0, "max": 16.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be an integer of at least 1, got 0"),
        ({"num_rounds": 2.5}, "num_rounds must be"),
        ({"num_measured_steps": 1}, "num_measured_steps must be an integer of at least 2"),
        ({"num_threads": 0}, "num_threads must be"),
        ({"dtype": "float31"}, "dtype must be a dtype of torch"),
        ({"device": "abacus"}, "device must be"),
        ({"clock": "sundial"}, "clock must be wall, or cpu on the device cpu, got 'sundial'"),
        ({"scenarios": {}}, "scenarios must contain at least one"),
        ({"scenarios": {"a": {"kind": "gan"}}}, r"kind must be one of \['latte_flow', 'matmul', .*'gan'"),
        ({"scenarios": {"a": {"kind": "dit", "num_experts": 4}}}, r"fields of 'dit' are .*\['num_experts'\]"),
        ({"scenarios": {"a": {"kind": "dit", "num_steps": 0}}}, "'a': num_steps must be a positive integer, got 0"),
        ({"scenarios": {"a": {"kind": "dit", "sizes": {"x": {}}}}}, r"can name \['transformer', 'vae'\], got \['x'"),
        ({"scenarios": {"a": {"kind": "latte_flow", "num_experts": 3}}}, "num_experts must divide"),
        ({"scenarios": {"a": {"kind": "embedded", "few_steps": 4}}}, "few_steps must be 'adapter', 'fused' or left"),
        ({"ratios": [{"quantity": "loop", "scenario": "a", "over": "latte-k1"}]}, "unknown scenario 'a'; must be one"),
        (
            {"ratios": [{"quantity": "size", "scenario": "latte-k1", "over": "latte-k1"}]},
            "quantity of a ratio must be",
        ),
        ({"ratios": [{"quantity": "loop"}]}, "a ratio must have"),
        ({"speed": "high"}, "must have name and scenarios"),
    ],
)
def test_an_invalid_suite_ends_in_one_line_and_writes_nothing(changed, message, tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**yaml.safe_load(TINY.read_text()), "ratios": [], **changed}))
    with pytest.raises(ValueError, match=message):
        run_suite(Suite.from_yaml(suite), tmp_path / "out")
    with pytest.raises(SystemExit, match="1"):
        speed.main([str(suite), "-o", str(tmp_path / "out")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]


@pytest.fixture(scope="module")
def embedded(tiny) -> Suite:
    few = {"kind": "embedded", "num_steps": 4, "guidance_scale": 1}
    scenarios = {"fused": {**few, "few_steps": "fused"}, "adapter": {**few, "few_steps": "adapter"}}
    return replace(tiny, scenarios={**scenarios, "dit": tiny.scenarios["dit"]}, ratios=[], num_rounds=1)


def test_an_image_is_divided_into_parts(embedded):
    """The parts are those of a whole call, and the functions are as they were afterwards."""
    before = [vars(owner)[name] for _, functions in parts.PARTS for owner, name in functions]
    seconds = parts.time_parts(embedded, "adapter")
    assert list(seconds) == [*(part for part, _ in parts.PARTS), parts.REST, "image"]
    assert all(value > 0 for value in seconds.values())
    assert before == [vars(owner)[name] for _, functions in parts.PARTS for owner, name in functions]
    report = parts.parts_to_markdown(seconds)
    assert report.count("%") == len(seconds) - 1


def test_time_is_counted_in_the_innermost_part():
    class Clock:
        def __init__(self):
            self.now = 0.0

        def __call__(self) -> float:
            return self.now

        def outer(self) -> None:
            self.now += 1
            self.inner()
            self.now += 2

        def inner(self) -> None:
            self.now += 10

    clock = Clock()
    with parts.timed_parts((("outer", ((Clock, "outer"),)), ("inner", ((Clock, "inner"),))), clock) as seconds:
        clock.now += 100
        clock.outer()
        clock.inner()
    assert seconds == {parts.REST: 100, "outer": 3, "inner": 20}


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [("dit", "cpu", r"\['fused', 'adapter'\], got 'dit'"), ("fused", "meta", "on the device cpu, got 'meta'")],
)
def test_parts_that_cannot_be_timed_are_refused(embedded, name, device, message):
    suite = replace(embedded)
    object.__setattr__(suite, "device", device)
    with pytest.raises(ValueError, match=message):
        parts.time_parts(suite, name)


def test_the_command_takes_an_output_or_parts(embedded, tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({**yaml.safe_load(TINY.read_text()), "ratios": [], "num_rounds": 1}))
    speed.main([str(suite), "--parts", "fused", "--cpu-time"])
    assert "| layers |" in capsys.readouterr().out
    for arguments in ([], ["--parts", "fused", "-o", str(tmp_path / "out")]):
        with pytest.raises(SystemExit, match="2"):
            speed.main([str(suite), *arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]


def test_a_suite_that_does_not_exist_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        speed.main([str(tmp_path / "none.yaml"), "-o", str(tmp_path / "out")])
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_from_the_root_of_the_repository(latte, tmp_path):
    """Worker processes included: they import the package `benchmarks` too."""
    suite = tmp_path / "suite.yaml"
    content = yaml.safe_load(TINY.read_text())
    content.update(scenarios={"latte-k2": latte.scenarios["latte-k2"]}, ratios=[], num_rounds=1)
    suite.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "benchmarks.speed", str(suite), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| latte-k2 |" in result.stdout and (tmp_path / "out" / "results.json").is_file()


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_suites_of_the_repository_are_valid(path):
    suite = Suite(**{**yaml.safe_load(path.read_text()), "device": "cpu"})
    assert suite.num_steps_to_run(next(iter(suite.build_scenarios().values()))) >= 2
