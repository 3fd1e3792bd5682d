"""Recipes of a comparison: those in the repository are valid, and what almost fits is refused."""

from pathlib import Path

import pytest
import yaml

from latte_flow_hf.evaluation.features import TinyWorldExtractor
from latte_flow_hf.evaluation.image_quality import min_images
from latte_flow_hf.modeling.flow_matching import uniform_boundaries
from latte_flow_hf.reproduction.plan import check_common_steps, points_of
from latte_flow_hf.reproduction.settings import MIN_IMAGES, Reproduction


RECIPES = Path(__file__).parents[2] / "recipes" / "reproduce"


def test_the_full_recipe_is_the_papers_comparison():
    settings = Reproduction.from_yaml(RECIPES / "full.yaml")
    assert len(settings.runs) == 18 and len(settings.seeds) == 3
    assert [variant.name for variant in settings.variants] == ["k1", "k2", "k4", "k8", "k4-probabilities", "k4-none"]
    recipes = [settings.training_recipe(*run, Path("out"), 100) for run in settings.runs.values()]
    # All else is the same.
    for recipe in recipes:
        assert "expert_boundaries" not in recipe.model.experts and recipe.model.scheduler == {}
        assert recipe.interval_warmup_steps == 0 and recipe.training == recipes[0].training
    assert {recipe.data.cache for recipe in recipes} == {f"out/cache/seed-{seed}" for seed in (1, 2, 3)}
    assert uniform_boundaries(8)[1] == 0.875
    evaluation, source = settings.evaluation, settings.recipe["data"]["source"]
    total = evaluation.one + evaluation.two + evaluation.digits
    assert evaluation.digits / total == pytest.approx(source["digit_share"], abs=0.01)
    assert evaluation.one / (evaluation.one + evaluation.two) == pytest.approx(source["single_share"], abs=0.01)


def test_the_quick_recipe_shares_the_training():
    quick, full = (Reproduction.from_yaml(RECIPES / f"{name}.yaml") for name in ("quick", "full"))
    assert quick.recipe == full.recipe and len(quick.runs) == 3


def test_the_least_number_of_images_is_that_of_the_distance():
    assert min_images("frechet_distance", TinyWorldExtractor().num_features) == MIN_IMAGES


def test_points_halve():
    assert points_of(100.0, 3, 4) == [4, 8, 16, 33]
    with pytest.raises(ValueError, match="budget 100 is 33 steps of 3 operations each, but 7 points need at least 64"):
        points_of(100.0, 3, 7)


def test_runs_must_have_equal_steps_to_be_compared_at():
    check_common_steps({"k1": [25, 50, 100], "k4": [100, 200, 400]})
    with pytest.raises(ValueError, match="k1 ends after 100 steps, and k8 is measured from 200 steps on"):
        check_common_steps({"k1": [25, 50, 100], "k8": [200, 400, 800]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds .*at least 1"),
        ({"seeds": [1, 1]}, r"seeds must differ from each other, got \[1, 1\]"),
        ({"variants": [{"num_experts": 4}, {"num_experts": 4}]}, "variants must differ"),
        ({"variants": [{"num_experts": 3}], "grid": None}, "per_device_train_batch_size must be a multiple of 3"),
        ({"variants": [{"num_experts": 1}]}, r"grid: num_experts .* \['k4'\] are not trained"),
        ({"variants": [{"num_experts": 0}]}, "num_experts .*greater than or equal to 1"),
        ({"budget": 0}, "budget"),
        ({"budget": float("inf")}, "budget must be a finite number, got inf"),
        ({"seeds": [2**32]}, "seeds: 0 must be less than 4294967296"),
        (
            {"timing": {"num_rounds": 2, "batch_sizes": [1, 1], "num_inference_steps": 4, "guidance_scale": 2.0}},
            r"timing: batch_sizes must differ from each other, got \[1, 1\]",
        ),
        (
            {"grid": {"num_experts": [4], "num_inference_steps": [3, 3], "guidance_scale": [1.0]}},
            "grid: num_inference_steps must differ",
        ),
        ({"grid": {"num_experts": [4], "num_inference_steps": [3], "guidance_scale": [0.5]}}, "greater than or equal"),
        ({"bugdet": 1}, "did you mean 'budget'"),
        ({"evaluation": {"one": 1}}, r"one \+ two \+ digits must be at least 129, .*got 31"),
        ({"evaluation": {"num_reference_images": 128}}, "num_reference_images must be at least 129, .*got 128"),
        ({"recipe": {"data": {"source": {"path": "tinyworld", "num_images": 7}}}}, "num_images must be at least 8"),
        ({"recipe": {"seed": 3}}, r"recipe.* must not have \['seed'\], which each run gets"),
        ({"recipe": {"model": {"experts": {"num_experts": 2}}}}, r"\['num_experts'\] in `experts`"),
        ({"recipe": {"training": {"max_steps": 2}}}, r"\['max_steps'\] in `training`"),
        ({"recipe": {"training": {"lr_scheduler_type": "cosine"}}}, "lr_scheduler_type.*got 'cosine'"),
        ({"recipe": {"training": {"learning_rat": 1}}}, "did you mean 'learning_rate'"),
        ({"recipe": {"data": {"source": {"path": "imagefolder"}}}}, "the oracle knows no other images"),
        ({"recipe": {"ema": None}}, "must have the section `ema`"),
    ],
)
def test_bad_recipes_are_refused(make_content, changes, message):
    content = make_content()
    for name, value in changes.items():
        if name in ("recipe", "evaluation"):
            for section, fields in value.items():
                old = content[name].get(section)
                merged = {**old, **fields} if isinstance(old, dict) and isinstance(fields, dict) else fields
                content[name][section] = merged
        else:
            content[name] = value
    with pytest.raises(ValueError, match=message):
        Reproduction.from_dict(content)


def test_a_missing_training_recipe_is_told(make_content, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**make_content(), "recipe": "none.yaml"}))
    with pytest.raises(OSError, match=r"none\.yaml"):
        Reproduction.from_yaml(tmp_path / "recipe.yaml")
