# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What is compared: a YAML file such as `recipes/reproduce/full.yaml`, checked as a whole before the work."""

import copy
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..files import read_yaml
from ..training.recipe import Number, Recipe, Seed, Settings


# Of each run's checkpoint, within the output folder.
PARTS_FOLDER = "parts"
CACHE_FOLDER = "cache"

# One more than the features of the tiny world's extractor, whose covariance would be singular otherwise.
MIN_IMAGES = 129

# What a run adds to the common recipe.
_GIVEN_BY_RUN = {
    "": ("seed",),
    "model": ("pipeline", "backbone", "autoencoder"),
    "experts": ("num_experts", "residual_attention", "expert_boundaries", "layers_per_expert"),
    "data": ("cache",),
    "training": ("max_steps", "num_train_epochs"),
}

Count = Annotated[int, Field(ge=1)]


def _check_distinct(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError(f"must differ from each other, got {values}")
    return values


Distinct = AfterValidator(_check_distinct)


class Variant(Settings):
    """A network to compare.

    Args:
        num_experts (`int`): K; 1 is the paper's "vanilla", all layers at every step.
        residual_attention (`str` or `None`, defaults to `"scores"`): see [`LatteFlowConfig`].
    """

    num_experts: Count
    residual_attention: Literal["scores", "probabilities"] | None = "scores"

    @property
    def name(self) -> str:
        """For files: `k4`, `k4-probabilities`, `k4-none`."""
        mode = {"scores": "", "probabilities": "-probabilities", None: "-none"}[self.residual_attention]
        return f"k{self.num_experts}{mode}"

    @property
    def label(self) -> str:
        """For readers: `K = 4`, `K = 4, probabilities`, `K = 4, none`."""
        mode = {"scores": "", "probabilities": ", probabilities", None: ", none"}[self.residual_attention]
        return f"K = {self.num_experts}{mode}"


class EvaluationSettings(Settings):
    """How the images of a model are measured.

    Args:
        seed (`int`, defaults to 0): of the prompts and of the drawn images that the Fréchet distance compares with.
        one, two, digits (`int`): the number of prompts with one object, with two, and with a digit; at least 129
            together, one more than the features of the Fréchet distance.
        num_reference_images (`int`): the number of drawn images, at least 129.
        num_inference_steps (`int`), guidance_scale (`float`): of each image.
        batch_size (`int`, defaults to 50): the number of images generated at once.
    """

    seed: Seed = 0
    one: int = Field(ge=0)
    two: int = Field(ge=0)
    digits: int = Field(ge=0)
    num_reference_images: int
    num_inference_steps: Count
    guidance_scale: Number = Field(ge=1)
    batch_size: Count = 50

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        for name, count in (
            ("one + two + digits", self.num_prompts),
            ("num_reference_images", self.num_reference_images),
        ):
            if count < MIN_IMAGES:
                raise ValueError(
                    f"{name} must be at least {MIN_IMAGES}, one more than the features of the Fréchet distance, got "
                    f"{count}"
                )
        return self

    @property
    def num_prompts(self) -> int:
        """The number of prompts, and of images."""
        return self.one + self.two + self.digits


class GridSettings(Settings):
    """Quality over steps and guidance, measured after training with the prompts of the evaluation.

    Args:
        num_experts (`list[int]`): of the variants (with scores) that are measured.
        num_inference_steps (`list[int]`), guidance_scale (`list[float]`): every pair is measured.
    """

    num_experts: Annotated[list[Count], Distinct]
    num_inference_steps: Annotated[list[Count], Field(min_length=1), Distinct]
    guidance_scale: Annotated[list[Annotated[Number, Field(ge=1)]], Field(min_length=1), Distinct]


class TimingSettings(Settings):
    """Time per image, measured after training.

    Args:
        num_rounds (`int`): how often each variant is measured; the variants take turns.
        batch_sizes (`list[int]`): images at once: 1 gives the latency, more the throughput.
        num_inference_steps (`int`), guidance_scale (`float`): of each image.
    """

    num_rounds: int = Field(ge=2)
    batch_sizes: Annotated[list[Count], Field(min_length=1), Distinct]
    num_inference_steps: int = Field(ge=2)
    guidance_scale: Number = Field(ge=1)


class Reproduction(Settings):
    """A comparison: every variant is trained with every seed, all with the same number of operations.

    Args:
        recipe (`dict`): sections of a recipe for `latte-flow train` that all runs share. In the YAML file it is the
            name of a file beside it. The runs add the backbone, the autoencoder, the experts, their number, the steps
            and the seed. The learning rate must not depend on the number of steps, so that each point on the way is
            the result of a shorter run.
        pipeline (`str`, defaults to `"tinyworld"`): folder of the pipeline whose backbone and autoencoder are used;
            `tinyworld` is the embedded checkpoint.
        variants (`list[Variant]`): the networks.
        seeds (`list[int]`): of weights, data, order and noise. A spread needs two, the paper's claims are judged with
            at least two.
        budget (`float`): floating-point operations of the training of each run, forward and backward; a
            multiplication and an addition are two.
        num_points (`int`): the quality is measured after `budget / 2 ** i` operations, i from `num_points - 1` to 0.
        evaluation ([`EvaluationSettings`]): how.
        grid ([`GridSettings`], *optional*): quality over steps and guidance.
        timing ([`TimingSettings`]): time per image.
    """

    recipe: dict
    pipeline: str = "tinyworld"
    variants: list[Variant] = Field(min_length=1)
    seeds: Annotated[list[Seed], Field(min_length=1), Distinct]
    budget: Number = Field(gt=0)
    num_points: Count
    evaluation: EvaluationSettings
    grid: GridSettings | None = None
    timing: TimingSettings

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file and the recipe that it names.

        Raises:
            `OSError`: if a file does not exist.
            `ValueError`: if one is not YAML, or for the reasons of `from_dict`.
        """
        content = read_yaml(path, "recipe")
        if isinstance(content, dict) and isinstance(content.get("recipe"), str):
            content["recipe"] = read_yaml(Path(path).parent / content["recipe"], "recipe")
        return cls.from_dict(content, f"recipe {path}")

    @field_validator("recipe")
    @classmethod
    def _check_recipe(cls, recipe: dict) -> dict:
        model = recipe.get("model") or {}
        sections = {"": recipe, "model": model, "experts": model.get("experts") or {}}
        sections.update({name: recipe.get(name) or {} for name in ("data", "training")})
        for section, names in _GIVEN_BY_RUN.items():
            given = sorted(set(names) & set(sections[section]))
            if given:
                where = f" in `{section}`" if section else ""
                raise ValueError(f"must not have {given}{where}, which each run gets")
        if (sections["data"].get("source") or {}).get("path") != "tinyworld":
            raise ValueError("must have the data `source: {path: tinyworld, ...}`: the oracle knows no other images")
        schedule = sections["training"].get("lr_scheduler_type")
        if schedule not in ("constant", "constant_with_warmup"):
            raise ValueError(
                "must have `lr_scheduler_type: constant_with_warmup` or `constant` in `training`, so that the points "
                f"on the way do not depend on the number of steps, got {schedule!r}"
            )
        if recipe.get("ema") is None:
            raise ValueError("must have the section `ema`: with a constant learning rate the averages are evaluated")
        return recipe

    @model_validator(mode="after")
    def _check_runs(self) -> Self:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"variants must differ from each other, got {names}")
        if self.grid is not None:
            unknown = [f"k{number}" for number in self.grid.num_experts if f"k{number}" not in names]
            if unknown:
                raise ValueError(f"grid: num_experts must be those of variants with scores, {unknown} are not trained")
        for variant in self.variants:
            recipe = self.training_recipe(variant, self.seeds[0], Path(), max_steps=1)
            batch_size = recipe.training.get("per_device_train_batch_size")
            if not batch_size or batch_size % variant.num_experts:
                raise ValueError(
                    f"per_device_train_batch_size must be a multiple of {variant.num_experts}, the number of experts, "
                    f"so that all of them learn from as many images, got {batch_size}"
                )
            num_images = recipe.data.source.get("num_images")
            if num_images is not None and num_images < batch_size:
                raise ValueError(f"num_images must be at least {batch_size}, a whole batch, got {num_images}")
        return self

    @property
    def runs(self) -> dict[str, tuple[Variant, int]]:
        """Variant and seed by the name of the run, all variants of a seed after one another."""
        return {f"{variant.name}-seed-{seed}": (variant, seed) for seed, variant in product(self.seeds, self.variants)}

    def training_recipe(self, variant: Variant, seed: int, folder: Path, max_steps: int) -> Recipe:
        """The recipe of one run.

        Args:
            variant ([`Variant`]): the network.
            seed (`int`): the seed.
            folder (`Path`): the output folder, with `parts` and `cache`.
            max_steps (`int`): where it ends.

        Raises:
            `ValueError`: if it is no valid recipe.
        """
        content = copy.deepcopy(self.recipe)
        model = content["model"] = content.get("model") or {}
        model["backbone"] = str(folder / PARTS_FOLDER / "backbone")
        model["autoencoder"] = str(folder / PARTS_FOLDER / "autoencoder")
        model["experts"] = {
            **(model.get("experts") or {}),
            "num_experts": variant.num_experts,
            "residual_attention": variant.residual_attention,
        }
        content["data"]["cache"] = str(folder / CACHE_FOLDER / f"seed-{seed}")
        content["training"] = {**(content.get("training") or {}), "max_steps": max_steps}
        return Recipe.from_dict({**content, "seed": seed}, "recipe of the training")
