"""A whole comparison at the smallest size, from nothing to its report; stopped, started again, and refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.files import write_json
from latte_flow_hf.reproduction import reproduce
from latte_flow_hf.reproduction.plan import Plan, load_result
from latte_flow_hf.reproduction.quality import distance_of_drawn_images
from latte_flow_hf.reproduction.reproduce import count_training_step, start_run
from latte_flow_hf.training.cache import hash_module


RUNS = ["k2-seed-5", "k4-seed-5"]


@pytest.fixture(scope="module")
def finished(make_content, tmp_path_factory):
    """The folder of a comparison that the command made, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("reproduce")
    content = make_content()
    (folder / "training.yaml").write_text(yaml.safe_dump(content.pop("recipe")))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**content, "recipe": "training.yaml"}))
    arguments = ["reproduce", str(folder / "recipe.yaml"), "-o", str(folder / "out"), "--device", "cpu"]
    outcome = CliRunner().invoke(app, [*arguments, "--processes", "2"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "k4-seed-5: " in outcome.output and "report: " in outcome.output
    return folder / "out"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy that a test may change; its models and caches are where they were."""
    return shutil.copytree(finished, tmp_path / "out")


def test_every_run_has_the_same_number_of_operations(finished, make_settings):
    plan, settings = Plan.read(finished), make_settings()
    larger, smaller = (plan.step_flops[variant.name] for variant in settings.variants)
    assert 1.8 < larger / smaller < 2.1
    for variant in settings.variants:
        steps = plan.points(variant)[-1]
        assert (
            settings.budget - plan.step_flops[variant.name] < steps * plan.step_flops[variant.name] <= settings.budget
        )


def test_results_are_whole(finished):
    plan = Plan.read(finished)
    for name in RUNS:
        result = load_result(finished, name, plan)
        variant, _ = plan.settings.runs[name]
        assert [point["step"] for point in result["points"]] == plan.points(variant)
        assert all(point["count"]["all"] == 130 and point["frechet"] > 0 for point in result["points"])
        assert all(point["seconds"]["training"]["cpu"] > 0 for point in result["points"])
        assert result["understanding"]["are_logits_equal"] and result["understanding"]["max_difference"] == 0
        assert len(result["grid"]) == (1 if variant.num_experts == 4 else 0)
        # What only the training needed is gone.
        assert not (finished / "runs" / name / "training").exists()


def test_the_report_has_verdicts_tables_and_figures(finished):
    text, page = ((finished / name).read_text() for name in ("report.md", "report.html"))
    assert "| 3 | The operations of sampling fall by a factor of about K. | **cannot tell** | not" in text
    assert "| 11 | Understanding is exactly that of the frozen backbone. | **holds here** |" in text
    # One seed decides nothing about quality, and K = 8 was not trained.
    assert "(one seed: no spread)" in text and "not trained: K = 8" in text
    assert "± " not in text.split("## How it was made")[0].split("## Quality over training")[1]
    for name in ("convergence.svg", "group_size.svg", "steps_guidance.svg", "samples.png"):
        assert f"({name})" in text and f'src="{name}"' in page and (finished / name).stat().st_size > 1000
    assert page.count("<tr>") > 20 and "Student&#x27;s" in page


def test_perfect_images_have_a_distance(finished, make_settings):
    # Of few images, and less of more.
    few = distance_of_drawn_images(make_settings(), finished)
    assert (
        f"130 drawn images, which are perfect, have a distance of {few:.2f} themselves"
        in (finished / "report.md").read_text()
    )
    evaluation = make_settings().evaluation.model_copy(update={"one": 500})
    more = distance_of_drawn_images(make_settings().model_copy(update={"evaluation": evaluation}), finished, 1)
    assert 0 < more < few


def test_started_again_it_only_writes_the_report(finished, make_settings, monkeypatch):
    before, result = (
        (finished / "report.md").read_bytes(),
        (finished / "runs" / RUNS[0] / "result.json").stat().st_mtime_ns,
    )
    figure = (finished / "convergence.svg").read_bytes()
    (finished / "report.md").unlink()
    lines = []
    reproduce(make_settings(), finished, "cpu", tell=lines.append)
    assert lines == [] and (finished / "report.md").read_bytes() == before
    assert (finished / "runs" / RUNS[0] / "result.json").stat().st_mtime_ns == result
    assert (finished / "convergence.svg").read_bytes() == figure


def test_a_stopped_run_ends_in_the_same_model(finished, make_settings):
    name = RUNS[1]
    run_folder = finished / "runs" / name
    before = json.loads((run_folder / "result.json").read_text())
    model = hash_module(LatteFlowPipeline.from_pretrained(run_folder / "model").model)
    last = before["points"][-1]["step"]
    # As if it was stopped before its second point was measured.
    kept = run_folder.with_name(".kept")
    run_folder.rename(kept)
    run_folder.mkdir()
    shutil.copy(kept / f"point-{before['points'][0]['step']}.json", run_folder)
    # In a process with one thread as before: the bits depend on the number of threads.
    start_run(finished, name, "cpu")
    result = json.loads((run_folder / "result.json").read_text())
    assert hash_module(LatteFlowPipeline.from_pretrained(run_folder / "model").model) == model
    assert result["points"][0] == before["points"][0]
    assert result["points"][-1]["frechet"] == before["points"][-1]["frechet"] and result["points"][-1]["step"] == last
    shutil.rmtree(run_folder)
    kept.rename(run_folder)


def test_other_recipes_and_foreign_results_are_refused(copied, make_settings, tmp_path):
    with pytest.raises(ValueError, match=r"settings: budget 800000000.0 -> 900000000.0.*use another folder"):
        reproduce(make_settings(budget=9e8), copied, "cpu")
    shutil.copytree(copied / "runs" / RUNS[0], copied / "runs" / "k3-seed-5")
    with pytest.raises(ValueError, match=r"\['k3-seed-5'\], which are no runs of this recipe"):
        reproduce(make_settings(), copied, "cpu")
    shutil.rmtree(copied / "runs" / "k3-seed-5")
    path = copied / "runs" / RUNS[0] / "result.json"
    write_json({**json.loads(path.read_text()), "plan": "another"}, path)
    with pytest.raises(ValueError, match=r"k2-seed-5/result.json is of run 'k2-seed-5' and of another recipe"):
        reproduce(make_settings(), copied, "cpu")
    content = json.loads((copied / "runs" / RUNS[1] / "result.json").read_text())
    for changes, message in (
        ({"points": content["points"][1:]}, r"k4-seed-5/result.json lacks points: it has \[\d+\], the plan \["),
        ({"grid": None}, r"lacks \['grid'\]; remove the folder .*k4-seed-5, and run 'k4-seed-5' is made again"),
    ):
        changed = {key: value for key, value in {**content, **changes}.items() if value is not None}
        write_json(changed, copied / "runs" / RUNS[1] / "result.json")
        with pytest.raises(ValueError, match=message):
            load_result(copied, RUNS[1], Plan.read(copied))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not one of this command"):
        reproduce(make_settings(), tmp_path / "other", "cpu")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes\.txt is a file; use another name"):
        reproduce(make_settings(), tmp_path / "other" / "notes.txt", "cpu")


def test_a_folder_belongs_to_what_the_runs_use_of_the_starting_model(finished, make_settings, monkeypatch, pipeline):
    """Another backbone is refused; other experts are not, since the runs train their own."""
    loaded = LatteFlowPipeline.from_pretrained(pipeline)
    monkeypatch.setattr(LatteFlowPipeline, "from_pretrained", lambda folder: loaded)
    with torch.no_grad():
        loaded.model.tower.layers[0].mlp.gate_proj.weight.add_(1.0)
    report = reproduce(make_settings(), finished, "cpu", tell=lambda line: None)
    assert report == finished / "report.md"
    with torch.no_grad():
        loaded.model.vlm.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(ValueError, match=r"starting_model: backbone .* -> .*use another folder"):
        reproduce(make_settings(), finished, "cpu", tell=lambda line: None)


def test_what_cannot_be_compared_is_refused_before_the_work(make_settings, tmp_path):
    settings = make_settings(
        variants=[{"num_experts": 3}],
        grid=None,
        recipe={
            **make_settings().recipe,
            "training": {**make_settings().recipe["training"], "per_device_train_batch_size": 9},
        },
    )
    with pytest.raises(ValueError, match="num_experts must divide the 4 layers of the backbone, got 3"):
        reproduce(settings, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        ValueError, match=r"budget 1000 is 0 steps of .* operations each, but 2 points need at least 2"
    ):
        reproduce(make_settings(budget=1e3), tmp_path / "out", "cpu", tell=lambda line: None)
    assert not (tmp_path / "out" / "cache").exists()
    # A mended recipe is not refused as another one.
    with pytest.raises(ValueError, match=r"budget 2000 is 0 steps"):
        reproduce(make_settings(budget=2e3), tmp_path / "out", "cpu", tell=lambda line: None)


def test_operations_of_all_passes_of_a_step_count(finished, make_settings):
    settings = make_settings()
    recipe = {**settings.recipe, "training": {**settings.recipe["training"], "gradient_accumulation_steps": 3}}
    variant, plan = settings.variants[1], Plan.read(finished)
    count, _ = count_training_step(make_settings(recipe=recipe), variant, finished, "cpu")
    assert count == 3 * plan.step_flops[variant.name]


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_finished_one_kept(copied, make_settings):
    result = copied / "runs" / RUNS[1] / "result.json"
    result.unlink()
    (copied / "runs" / RUNS[1] / "model" / "model" / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"run k4-seed-5 failed with code 1: .*log.txt"):
        reproduce(make_settings(), copied, "cpu", tell=lambda line: None)
    assert (copied / "runs" / RUNS[0] / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "recipe recipes/reproduce/quick.yaml does not exist; run the command in a clone"),
        (["some.yaml"], "recipe some.yaml does not exist"),
        (["some.yaml", "--quick"], "give either a recipe or --quick"),
    ],
)
def test_the_command_needs_one_recipe(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["reproduce", *arguments])
    assert outcome.exit_code == 1 and message in outcome.stderr and list(tmp_path.iterdir()) == []


def test_a_missing_pipeline_is_told(make_content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(make_content(pipeline="none")))
    outcome = CliRunner().invoke(app, ["reproduce", "recipe.yaml", "-o", "out"])
    assert outcome.exit_code == 1 and not Path("out").exists()
    assert "recipe recipe.yaml: pipeline must be a folder or a hub id" in outcome.stderr


def test_missing_packages_are_named_before_the_work(make_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        reproduce(make_settings(), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()
