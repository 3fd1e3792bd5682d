"""What a recipe refuses, before anything is loaded, and the recipes of this repository."""

import re
from pathlib import Path

import pytest
import yaml

from latte_flow_hf.training.recipe import Recipe


RECIPES = Path(__file__).parents[2] / "recipes"
# The other files there are settings of scripts and of accelerate; recipes in reproduce/ are only parts of some.
TRAINING_RECIPES = [
    path
    for path in sorted(RECIPES.rglob("*.yaml"))
    if "model" in yaml.safe_load(path.read_text()) and path.parent.name != "reproduce"
]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, "unknown field 'modle'; did you mean 'model'"),
        ({"data": {"cach": "x"}}, "data: unknown field 'cach'; did you mean 'cache'"),
        ({"training": {"learnin_rate": 1}}, "training: unknown field 'learnin_rate'; did you mean 'learning_rate'"),
        ({"training": {"learning_rate": "fast"}}, "learning_rate must be a number, got 'fast'"),
        (
            {"model": {"pipeline": None, "backbone": "a", "autoencoder": "b", "experts": {"num_expert": 2}}},
            "num_experts",
        ),
        ({"model": {"backbone": "a"}}, "give either `pipeline`, or `backbone` and `autoencoder`"),
        ({"data": {"flip": "yes"}}, "data: flip must be a valid boolean, got 'yes'"),
        ({"seed": True}, "seed must be a valid integer, got True"),
        ({"prompt_dropout": 2}, "prompt_dropout must be less than or equal to 1, got 2"),
        ({"interval_warmup_steps": -1}, "interval_warmup_steps must be greater than or equal to 0, got -1"),
        ({"trainable": "all"}, "trainable must be 'experts', 'vlm' or a list of experts, got 'all'"),
        ({"data": {"source": {}}}, "data: source must name a dataset"),
        ({"model": {"dtype": "floats"}, "ema": {"decy": 1}}, "ema: unknown field 'decy'; did you mean 'decay'"),
        (
            {"model": {"dtype": "floats"}, "ema": {"decy": 1}},
            "model: dtype must be a dtype of torch such as 'float32'",
        ),
        (
            {"model": {"experts": {"num_experts": 2}}},
            "model: `experts` and `scheduler` can only be given with `backbone`",
        ),
        (
            {"model": {"pipeline": None, "backbone": "a", "autoencoder": "b", "scheduler": {"shft": 2}}},
            "model: scheduler: unknown field 'shft'; did you mean 'shift'",
        ),
        ({"data": {"source": {"path": "tinyworld", "num_image": 2}}}, "did you mean 'num_images'"),
        ({"understanding": {"source": {"path": "tinyworld", "turn": 2}}}, "did you mean 'turns'"),
        ({"training": {"max_steps": "many"}}, "training: max_steps must be a number, got 'many'"),
        ({"training": {"output_dir": "x"}}, "training: unknown field 'output_dir'"),
        ({"training": {"max_steps": 2.5}}, "training: max_steps must be a whole number, got 2.5"),
        ({"training": {"max_steps": True}}, "training: max_steps must be a number, got True"),
        ({"training": {"max_steps": [3]}}, "training: max_steps must be a number, got [3]"),
        ({"training": {"max_steps": None}}, "training: max_steps must be a number, got None"),
        ({"data": {"source": {"data_dir": "images"}}}, "data: source must name a dataset in `path`"),
        ({"data": {"source": {"path": 3}}}, "data: source must name a dataset in `path`"),
        ({"data": {"prompt": "a photo"}}, "data: prompt must contain {} once"),
        ({"data": {"prompt": "a {name}"}}, "data: prompt must contain {} once"),
        ({"data": {"prompt": "a {} and {}"}}, "data: prompt must contain {} once"),
        ({"data": {"prompt": "a {"}}, "data: prompt must contain {} once"),
        ({"data": {"prompt": "{:d}"}}, "data: prompt must contain {} once"),
        ({"understanding": {"source": {"split": "train"}}}, "understanding: source must name a dataset in `path`"),
        ({"validation": {"source": {}}}, "validation: source must name a dataset in `path`"),
        ({"validation": {"source": {"path": "a", "streaming": True}}}, "validation: source must have an end"),
        ({"training": {"eval_strategy": "steps"}}, "eval_strategy needs the section `validation`"),
        ({"training": {"load_best_model_at_end": True}}, "load_best_model_at_end needs the section `validation`"),
        (
            {"data": {"cache": "a"}, "validation": {"source": {"path": "a"}, "cache": "a"}},
            "validation: cache must be another folder",
        ),
        (
            {
                "data": {"cache": "a"},
                "validation": {"source": {"path": "a"}},
                "training": {"dataloader_num_workers": 1},
            },
            "dataloader_num_workers needs a cache in `validation`, too",
        ),
        ({"trainable": [0, "one"]}, "trainable must be 'experts', 'vlm' or a list of experts, got [0, 'one']"),
        ({"lora": {"experts": [0], "rank": 4}}, "lora: unknown field 'rank'"),
        ({"samples": {"prompts": []}}, "samples: prompts"),
        ({"samples": {"every_steps": 2}}, "samples: prompts is missing"),
        ({"ema": 0.9}, "ema must be a valid dictionary"),
        ({"trainable": "vlm", "data": {"cache": "x"}}, "contexts cannot be cached while the backbone is trained"),
        ({"training": {"dataloader_num_workers": 2}}, "dataloader_num_workers needs a cache"),
        ({"training": {"dataloader_persistent_workers": True}}, "dataloader_persistent_workers must be left out"),
        ({"training": {"max_steps": -1}, "data": {"source": {"path": "a", "streaming": True}}}, "give `max_steps`"),
    ],
)
def test_a_recipe_is_checked_before_anything_is_loaded(recipe, change, words):
    content = recipe()
    for name, value in change.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe.from_dict(content)


def test_missing_fields_are_named(recipe):
    content = recipe()
    del content["data"]
    with pytest.raises(ValueError, match="recipe: data is missing"):
        Recipe.from_dict(content)


@pytest.mark.parametrize("file", TRAINING_RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_are_valid(file):
    Recipe.from_yaml(file)


def test_there_are_recipes():
    assert len(TRAINING_RECIPES) >= 6


def test_numbers_may_be_written_without_a_decimal_point(recipe, tmp_path):
    content = recipe()
    content["training"]["learning_rate"] = "LEARNING_RATE"
    file = tmp_path / "recipe.yaml"
    # YAML 1.1 reads 1e-4 as a string.
    file.write_text(yaml.safe_dump(content).replace("LEARNING_RATE", "1e-4").replace("decay: 0.9", "decay: 9e-1"))
    settings = Recipe.from_yaml(file)
    assert settings.training["learning_rate"] == 1e-4 and settings.ema.decay == 0.9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "recipe .*recipe.yaml is not YAML"),
        ("- a\n- b", r"recipe .*recipe.yaml must contain the fields \['model', 'data', .*got \['a', 'b'\]"),
        ("model: {}\nseed: x", "recipe .*recipe.yaml: model: give either .*; seed must be a valid integer, got 'x'"),
    ],
)
def test_an_error_names_the_file_and_all_problems(text, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        Recipe.from_yaml(tmp_path / "recipe.yaml")
    if "not YAML" not in words:
        assert "\n" not in str(error.value)


def test_whole_numbers_may_be_written_as_powers_of_ten(recipe):
    training = Recipe.from_dict(recipe(training={"max_steps": "1e3", "save_steps": 500})).training
    assert training["max_steps"] == 1000 and type(training["max_steps"]) is int and training["save_steps"] == 500


@pytest.mark.parametrize("prompt", ["{}", "a photo of {}.", "{{}} {}", "{0}"])
def test_a_format_of_prompts(prompt, recipe):
    assert Recipe.from_dict(recipe(data={"prompt": prompt})).data.prompt == prompt
