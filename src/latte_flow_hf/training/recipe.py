# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The recipe of a training run: a YAML file, checked as a whole before anything is loaded."""

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from transformers import PreTrainedConfig, TrainingArguments

from ..files import read_yaml
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.images import check_background
from ..modeling.sampling import check_steps_per_expert
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from ..tinyworld.datasets import Conversations, TinyWorldImages


def check_names(names: Iterable[Any], known: Iterable[str]) -> None:
    """
    Raises:
        `ValueError`: if a name is unknown, with the nearest known one.
    """
    known = sorted(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields are {known}"
            raise ValueError(f"unknown field {name!r}; {hint}")


class Settings(BaseModel):
    """Settings that are read from YAML: unknown fields are refused, types are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, content: Any) -> Any:
        if isinstance(content, dict):
            check_names(content, cls.model_fields)
        return content

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file.

        Raises:
            `OSError`: if the file does not exist.
            `ValueError`: if it is not YAML, or for the reasons of `from_dict`.
        """
        return cls.from_dict(read_yaml(path, "recipe"), f"recipe {path}")

    @classmethod
    def from_dict(cls, content: Any, name: str = "recipe") -> Self:
        """Check the content of a YAML file.

        Args:
            content (`dict`): the content.
            name (`str`, defaults to `"recipe"`): what it is, for errors, e.g. the path of the file.

        Raises:
            `ValueError`: if a field is unknown (with the nearest known one), is missing, or has a wrong type or value.
        """
        if not isinstance(content, dict):
            raise ValueError(f"{name} must contain the fields {list(cls.model_fields)}, got {content!r}.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{name}: {'; '.join(map(_describe, error.errors()))}") from error


def _describe(error: Any) -> str:
    """One of pydantic's errors in the form `data: flip must be a valid boolean, got 'yes'`."""
    location = ": ".join(str(name) for name in error["loc"])
    if error["type"] == "missing":
        return f"{location} is missing"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return message if not location else f"{location}{'' if message.startswith('must') else ':'} {message}"
    return f"{location} {error['msg'].replace('Input should', 'must')}, got {error['input']!r}"


def _parse_number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4`, without a decimal point, as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _check_number(name: str, value: Any, kind: Any) -> Any:
    """The value of a field of `TrainingArguments`, a number if its type is one.

    Raises:
        `ValueError`: if the type is a number, and the value is not.
    """
    if kind not in (int, float, int | None, float | None) or (value is None and kind in (int | None, float | None)):
        return value
    value = _parse_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if kind in (int, int | None):
        if value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        return int(value)
    return value


Number = Annotated[float, BeforeValidator(_parse_number), Field(allow_inf_nan=False)]
# What numpy takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _check_source(source: dict, tinyworld: type) -> dict:
    """Check the arguments of a tiny world dataset; those of `datasets.load_dataset` are checked when it is called."""
    if not isinstance(source.get("path"), str):
        raise ValueError(f"must name a dataset in `path`, e.g. {{path: imagefolder, data_dir: images}}, got {source}")
    if source["path"] == "tinyworld":
        check_names(source, {"path", *inspect.signature(tinyworld).parameters} - {"seed"})
    return source


class ModelSettings(Settings):
    """The section `model`: a pipeline to continue from, or a backbone and an autoencoder to start with.

    Args:
        pipeline (`str`, *optional*): folder or hub id; `tinyworld` is the embedded checkpoint.
        backbone (`str`, *optional*): folder or hub id of a vision-language model and its processor.
        autoencoder (`str`, *optional*): folder or hub id of an autoencoder, with `backbone`.
        experts (`dict`): with `backbone`: arguments of `LatteFlowForConditionalGeneration.from_vlm`, e.g.
            `{num_experts: 4}`.
        scheduler (`dict`): with `backbone`: arguments of [`LatteFlowScheduler`], except the boundaries of the experts.
        timestep_sampling (`str`, *optional*): see [`LatteFlowConfig`]; defaults to that of the pipeline.
        dtype (`str`, defaults to `"float32"`): of all weights.
        attn_implementation (`str`, *optional*): see transformers; `eager` is fastest for small models on a CPU.
    """

    pipeline: str | None = None
    backbone: str | None = None
    autoencoder: str | None = None
    experts: dict = {}
    scheduler: dict = {}
    timestep_sampling: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None

    @field_validator("experts")
    @classmethod
    def _check_experts(cls, experts: dict) -> dict:
        known = {item.name for item in fields(LatteFlowConfig)} - {item.name for item in fields(PreTrainedConfig)}
        check_names(experts, known - {"vlm_config"} | {"copy_layers"})
        return experts

    @field_validator("scheduler")
    @classmethod
    def _check_scheduler(cls, scheduler: dict) -> dict:
        check_names(scheduler, set(inspect.signature(LatteFlowScheduler).parameters) - {"expert_boundaries"})
        return scheduler

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, dtype: str) -> str:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"must be a dtype of torch such as 'float32', got {dtype!r}")
        return dtype

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if (self.pipeline is None) == (self.backbone is None) or (self.backbone is None) != (self.autoencoder is None):
            raise ValueError("give either `pipeline`, or `backbone` and `autoencoder`")
        if self.pipeline is not None and (self.experts or self.scheduler):
            raise ValueError("`experts` and `scheduler` can only be given with `backbone`; a pipeline has its own")
        return self


class DataSettings(Settings):
    """The section `data`: images and prompts.

    Args:
        source (`dict`): arguments of `datasets.load_dataset`, e.g. `{path: imagefolder, data_dir: images}`; the split
            defaults to `train`. With `path: tinyworld`, arguments of [`TinyWorldImages`], e.g. `num_images`.
        image (`str`, defaults to `"image"`): the column of images.
        caption (`str`, *optional*): the column of captions; a dot selects a key of a dict, as in `json.caption`.
            Numbers are taken as they are written. Of a list of captions, one is drawn for each example and epoch. If a
            folder of images (`path: imagefolder`) has no such column, it is the extension of files beside the images:
            `txt` reads the caption of `1.png` from `1.txt`.
        label (`str`, *optional*): instead of `caption`, a column of class labels, whose names are the prompts.
        prompt (`str`, defaults to `"{}"`): a format string; `{}` stands for the caption or the name of the label.
        size (`int`, *optional*): height and width in pixels after resizing and cropping at the centre; defaults to
            that of the pipeline.
        background (`str`, defaults to `"white"`): the colour behind transparent images, a name or `"#rrggbb"`.
        flip (`bool`, defaults to `False`): whether half of the images are flipped horizontally, at random in each
            epoch.
        max_unreadable (`int`, defaults to 100): how many images may be unreadable or without a caption before the run
            stops; they are skipped.
        shuffle_buffer (`int`, defaults to 1000): the buffer size for shuffling a stream; other datasets are shuffled
            as a whole.
        encode_batch_size (`int`, defaults to 1): see [`ImagePromptEncoder`].
        cache (`str`, *optional*): a folder for latents and contexts; without it they are computed in each epoch.
        cache_contexts (`bool`, defaults to `True`): `False` caches only latents: contexts take much space if nearly
            every image has its own caption.
    """

    source: dict
    image: str = "image"
    caption: str | None = None
    label: str | None = None
    prompt: str = "{}"
    size: int | None = None
    background: str = "white"
    flip: bool = False
    max_unreadable: int = 100
    shuffle_buffer: int = 1000
    encode_batch_size: int = 1
    cache: str | None = None
    cache_contexts: bool = True

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: dict) -> dict:
        return _check_source(source, TinyWorldImages)

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        caption = "\N{NULL}"
        try:
            if caption in prompt.format(caption):
                return prompt
        except (ValueError, LookupError, AttributeError):
            pass
        raise ValueError(f"must contain {{}} once, where the caption goes, and no other braces, got {prompt!r}")

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: str) -> str:
        check_background(background)
        return background


class ValidationSettings(Settings):
    """The section `validation`: images that are not trained on. Their loss is logged as `eval_loss`.

    The columns, the format of prompts and the size are those of the section `data`. The loss is that of the averaged
    weights if there are any, without prompt dropout and flips, and with the same noise and timesteps each time.
    It is computed every `eval_steps` of `training`, which defaults to `save_steps`.

    Args:
        source (`dict`): see [`DataSettings`]; not a stream.
        cache (`str`, *optional*): a folder of its own for latents and contexts; see [`DataSettings`].
    """

    source: dict
    cache: str | None = None

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: dict) -> dict:
        if source.get("streaming"):
            raise ValueError("must have an end, so that its mean loss can be computed: leave out `streaming`")
        return _check_source(source, TinyWorldImages)


class UnderstandingSettings(Settings):
    """The section `understanding`: conversations in each batch; they only train the model if `trainable` is `vlm`.

    Args:
        source (`dict`): arguments of `datasets.load_dataset`, of a dataset with a column `messages` in the
            chat-template form. With `path: tinyworld`, arguments of [`Conversations`], e.g. `num_conversations`.
        share (`float`, defaults to 0.25): the number of conversations per image of a batch; at least one per batch.
    """

    source: dict
    share: Number = 0.25

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: dict) -> dict:
        return _check_source(source, Conversations)


class EMASettings(Settings):
    """The section `ema`: arguments of [`EMACallback`]."""

    decay: Number = 0.9999
    device: str | None = None


class SampleSettings(Settings):
    """The section `samples`: arguments of [`SampleCallback`]; `call` contains further arguments of the pipeline."""

    prompts: list[str] = Field(min_length=1)
    every_steps: int = 1000
    seed: Seed = 0
    call: dict = {}


class DistillationSettings(Settings):
    """The section `distillation`: a student with few steps learns the trajectories of a teacher.

    The student's velocity at the start of a step is regressed on the one that leads to the end of the step in the
    teacher's own guided trajectory, see [`~LatteFlowLossMixin.trajectory_loss`]. Only the prompts of
    the section `data` are used, not its images; its `cache` is the folder of the trajectories and contexts, by default
    `trajectories` in the working folder.

    Args:
        teacher (`str`, *optional*): folder or hub id of a pipeline; defaults to the pipeline that is trained. It must
            have the same autoencoder, experts and boundaries.
        teacher_lora (`str`, *optional*): an adapter for the teacher.
        student, student_lora (`str`, *optional*): an earlier result for the same steps, a pipeline or an adapter for
            the pipeline that is trained. Each step of a trajectory then starts where the steps of that student lead,
            and the teacher goes on from there. Without one it starts where the teacher's step ended.
        teacher_steps (`list[int]`): the number of steps of the teacher in the interval of each expert.
        solver (`str`, defaults to `"heun"`): of the teacher: `"heun"` or `"euler"`, without new noise.
        guidance_scale (`float` or `list[float]`, defaults to 4.0): of the teacher: one, or one for each expert. The
            student needs none.
        steps_per_expert (`list[int]`, *optional*): the number of steps of the student in the interval of each expert,
            a divisor of that of the teacher; defaults to one.
        new_noise (`float` or `list[float]`, *optional*): the share of the noise, 0 to 1, that is replaced after each
            step of the student, in the trajectories and when the result is sampled: one, or one for each expert.
            Defaults to that of the scheduler of the pipeline that is trained.
        num_trajectories (`int`, *optional*): how many trajectories there are; trajectory i has prompt i of the data,
            starting again after the last one. Defaults to one for each prompt.
        batch_size (`int`, defaults to 64): the number of trajectories that are generated at once, and are in a file.
    """

    teacher: str | None = None
    teacher_lora: str | None = None
    student: str | None = None
    student_lora: str | None = None
    teacher_steps: list[int]
    solver: Literal["heun", "euler"] = "heun"
    guidance_scale: Number | list[Number] = 4.0
    steps_per_expert: list[int] | None = None
    new_noise: Number | list[Number] | None = None
    num_trajectories: int | None = Field(None, ge=1)
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        num_experts = len(self.teacher_steps)
        steps = check_steps_per_expert(self.student_steps, num_experts)
        if any(n < 1 or few < 1 or n % few for n, few in zip(self.teacher_steps, steps)):
            raise ValueError(
                "teacher_steps must be at least 1 for each expert, and multiples of steps_per_expert, so that the "
                f"teacher stops where the student does, got {self.teacher_steps} and {steps}"
            )
        return self

    @field_validator("new_noise")
    @classmethod
    def _check_new_noise(cls, new_noise: float | list[float] | None) -> float | list[float] | None:
        shares = new_noise if isinstance(new_noise, list) else [new_noise]
        if new_noise is not None and not all(0.0 <= share <= 1.0 for share in shares if share is not None):
            raise ValueError(f"must be from 0 to 1, or one such value for each expert, got {new_noise!r}")
        return new_noise

    @property
    def student_steps(self) -> list[int]:
        """The number of steps of the student in the interval of each expert."""
        return [1] * len(self.teacher_steps) if self.steps_per_expert is None else self.steps_per_expert


def _check_trainable(trainable: Any) -> Any:
    is_list = isinstance(trainable, list) and all(type(expert) is int for expert in trainable)
    if not is_list and trainable not in ("experts", "vlm"):
        raise ValueError(f"must be 'experts', 'vlm' or a list of experts, got {trainable!r}")
    return trainable


class Recipe(Settings):
    """What is trained, on what, and how.

    Args:
        model ([`ModelSettings`]): the model.
        data ([`DataSettings`]): the images and prompts.
        training (`dict`): `TrainingArguments`; `save_total_limit` defaults to 2.
        seed (`int`, defaults to 0): of weights, order, noise, timesteps and prompt dropout.
        trainable (`str` or `list[int]`, defaults to `"experts"`): `"experts"`, the whole tower; a list of experts,
            only their layers and not what all experts share; or `"vlm"`, the tower and the backbone's language model.
        lora (`dict`, *optional*): instead of `trainable`: arguments of `expert_lora_config`. The result is an adapter.
            `weights`, the folder or hub id of an adapter of the same experts and rank, is where its training starts.
        prompt_dropout (`float`, defaults to 0.1): the share of prompts replaced by the empty one, 0 to 1.
        folded_guidance_scale (`float`, *optional*): above 1: the weights learn to contain guidance of this scale, so
            that the result needs one evaluation per step instead of two, see `flow_matching.folded_guidance_target`.
            A step of the training takes one more evaluation without gradients.
        interval_warmup_steps (`int`, defaults to 0): see [`IntervalWarmupCallback`]; 0 is without, as in the paper.
        understanding ([`UnderstandingSettings`], *optional*): conversations.
        ema ([`EMASettings`], *optional*): moving average of the weights.
        samples ([`SampleSettings`], *optional*): images generated during training.
        validation ([`ValidationSettings`], *optional*): images on which the loss is measured during training. With
            `load_best_model_at_end` in `training`, the result has the weights of the checkpoint with the lowest one.
        distillation ([`DistillationSettings`], *optional*): the teacher whose trajectories are learned in place of
            images. The result is then sampled with few steps and without guidance by default.
    """

    model: ModelSettings
    data: DataSettings
    training: dict
    seed: Seed = 0
    trainable: Annotated[str | list[int], BeforeValidator(_check_trainable)] = "experts"
    lora: dict | None = None
    prompt_dropout: Number = Field(0.1, ge=0, le=1)
    folded_guidance_scale: Number | None = Field(None, gt=1)
    interval_warmup_steps: int = Field(0, ge=0)
    understanding: UnderstandingSettings | None = None
    ema: EMASettings | None = None
    samples: SampleSettings | None = None
    validation: ValidationSettings | None = None
    distillation: DistillationSettings | None = None

    @model_validator(mode="after")
    def _check_distillation(self) -> Self:
        if self.distillation is None:
            return self
        names = {"prompt_dropout", "folded_guidance_scale", "interval_warmup_steps", "understanding", "validation"}
        unused = names & self.model_fields_set
        if unused:
            raise ValueError(f"{sorted(unused)} cannot be given with `distillation`, which does not use them")
        if self.trains_backbone:
            raise ValueError("trainable must be 'experts' or a list of experts with `distillation`, got 'vlm'")
        if self.model.pipeline is None:
            raise ValueError("`distillation` starts from a trained model: give `pipeline` in the section `model`")
        if self.data.source.get("streaming"):
            raise ValueError("`distillation` numbers its prompts: leave out `streaming` in the source of `data`")
        return self

    @model_validator(mode="after")
    def _check_folded_guidance(self) -> Self:
        if self.folded_guidance_scale is not None and self.prompt_dropout == 0:
            raise ValueError(
                "folded_guidance_scale needs prompt_dropout above 0: guidance is learned from the difference to the "
                "empty prompt"
            )
        return self

    @property
    def trains_backbone(self) -> bool:
        return self.lora is None and self.trainable == "vlm"

    @field_validator("training")
    @classmethod
    def _check_training(cls, training: dict) -> dict:
        types = {item.name: item.type for item in fields(TrainingArguments)}
        check_names(training, set(types) - {"output_dir", "seed"})
        # The rest of the types is checked by `TrainingArguments`.
        return {name: _check_number(name, value, types[name]) for name, value in training.items()}

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, lora: dict | None) -> dict | None:
        if lora is not None:
            from peft import LoraConfig

            from .adapters import expert_lora_config

            arguments = {"model", "lora_config", "target_modules"}
            known = {*inspect.signature(expert_lora_config).parameters, *inspect.signature(LoraConfig).parameters}
            check_names(lora, known - arguments | {"weights"})
            if not isinstance(lora.get("weights", ""), str):
                raise ValueError(f"weights must be the folder or hub id of an adapter, got {lora['weights']!r}")
        return lora

    @model_validator(mode="after")
    def _check_cache_and_loader(self) -> Self:
        streaming, training = bool(self.data.source.get("streaming")), self.training
        has_cache = self.data.cache is not None
        if self.trains_backbone and has_cache and self.data.cache_contexts:
            raise ValueError("contexts cannot be cached while the backbone is trained: set `cache_contexts: false`")
        if streaming and training.get("max_steps", -1) < 1:
            raise ValueError("training: a stream has no end: give `max_steps`")
        is_stored = has_cache or self.distillation is not None
        is_cached = is_stored and not streaming and (self.data.cache_contexts or self.trains_backbone)
        if self.validation is not None and has_cache and self.validation.cache == self.data.cache:
            raise ValueError("validation: cache must be another folder than that of `data`")
        if self.validation is None:
            for name in ("eval_strategy", "load_best_model_at_end"):
                if training.get(name) not in (None, False, "no"):
                    raise ValueError(f"training: {name} needs the section `validation`, images to measure the loss on")
        elif training.get("dataloader_num_workers") and self.validation.cache is None:
            raise ValueError("training: dataloader_num_workers needs a cache in `validation`, too")
        if training.get("dataloader_num_workers") and not is_cached:
            raise ValueError(
                "training: dataloader_num_workers needs a cache with its contexts: without one, images and prompts "
                "are encoded by the model in the main process"
            )
        if training.get("dataloader_persistent_workers"):
            raise ValueError(
                "training: dataloader_persistent_workers must be left out: with it the workers never learn the epoch, "
                "and every epoch has the same random draws"
            )
        return self
