# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""`latte-flow train`: a recipe in YAML -> the stock Trainer -> a finished pipeline, or an adapter.

The same command goes on where it was stopped. What lies in the working folder may be cut off anywhere: only marked
checkpoints and whole cache shards count.
"""

import difflib
import json
import logging
import shutil
import types
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from accelerate import PartialState
from diffusers import AutoModel
from diffusers.utils.torch_utils import get_device
from transformers import AutoModelForImageTextToText, PreTrainedConfig, Trainer, TrainingArguments, set_seed

from ..checkpoints import tiny_checkpoint
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from .cache import CachedContexts, CachedImageDataset, build_cache, hash_module
from .callbacks import (
    CheckpointCallback,
    EMACallback,
    IntervalWarmupCallback,
    LossCallback,
    SampleCallback,
    is_sharded,
    last_checkpoint,
)
from .collator import ConversationCollator, ImagePromptEncoder, TextToImageCollator
from .data import (
    CaptionedImageDataset,
    CaptionedImageStream,
    DataSettings,
    ImageRows,
    UnreadableImages,
    open_rows,
    understanding_examples,
)
from .sharding import WholeBackboneCallback, check_sharding, save_sharded, whole


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSettings:
    """The section `model` of a recipe: a pipeline to go on from, or a backbone and an autoencoder to begin with.

    Args:
        pipeline (`str`, *optional*): folder or hub id; `tinyworld` is the embedded checkpoint.
        backbone (`str`, *optional*): folder or hub id of a vision-language model.
        autoencoder (`str`, *optional*): folder or hub id of an autoencoder, with `backbone`.
        experts (`dict`): with `backbone`: arguments of [`LatteFlowConfig`], e.g. `{num_experts: 4}`.
        timestep_sampling (`str`, *optional*): as of [`LatteFlowConfig`]; the pipeline's own if left out.
        dtype (`str`, defaults to `"float32"`): of all weights.
        attn_implementation (`str`, *optional*): as of transformers; `eager` is the fast one for small models on a CPU.
    """

    pipeline: str | None = None
    backbone: str | None = None
    autoencoder: str | None = None
    experts: dict = field(default_factory=dict)
    timestep_sampling: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None


@dataclass(frozen=True)
class UnderstandingSettings:
    """The section `understanding`: conversations mixed in; they teach only where `trainable` is `vlm`.

    Args:
        source (`dict`): arguments of `datasets.load_dataset`; a column `messages` in the chat-template form. Or
            `{path: tinyworld, num_conversations: 1000}`.
        share (`float`, defaults to 0.25): conversations for each picture of a batch; at least one.
    """

    source: dict = field(default_factory=dict)
    share: float = 0.25


@dataclass(frozen=True)
class EMASettings:
    """The section `ema`: as of [`EMACallback`]."""

    decay: float = 0.9999
    device: str | None = None


@dataclass(frozen=True)
class SampleSettings:
    """The section `samples`: as of [`SampleCallback`]; `call` is further arguments of the pipeline."""

    prompts: list = field(default_factory=list)
    every_steps: int = 1000
    seed: int = 0
    call: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How experts learn to paint.

    Args:
        model ([`ModelSettings`]): what learns.
        data ([`DataSettings`]): what from.
        training (`dict`): `TrainingArguments`, as they are; `save_total_limit` is 2 unless given.
        seed (`int`, defaults to 0): of weights, order, noise, timesteps and drop-out.
        trainable (`str` or `list[int]`, defaults to `"experts"`): the whole tower; a list of experts (the layers of
            those alone, not what all experts share); or `"vlm"`, the tower and the backbone's language model.
        lora (`dict`, *optional*): in place of `trainable`: arguments of `expert_lora_config`. The result is an
            adapter.
        prompt_dropout (`float`, defaults to 0.1): how often a prompt is replaced by the empty one.
        interval_warmup_steps (`int`, defaults to 0): as of [`IntervalWarmupCallback`]; 0 is without, as in the paper.
        understanding, ema, samples (*optional*): see there.
    """

    model: ModelSettings
    data: DataSettings
    training: dict
    seed: int = 0
    trainable: str | list = "experts"
    lora: dict | None = None
    prompt_dropout: float = 0.1
    interval_warmup_steps: int = 0
    understanding: UnderstandingSettings | None = None
    ema: EMASettings | None = None
    samples: SampleSettings | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            `ValueError`: if a field is unknown (the nearest known one is named), missing, or of another type.
        """
        return cls.from_dict(read_sections(path), f"recipe {path}")

    @classmethod
    def from_dict(cls, sections: dict, where: str = "recipe") -> "Recipe":
        recipe = _checked(cls, sections, where)
        known = {item.name for item in fields(LatteFlowConfig)} - {item.name for item in fields(PreTrainedConfig)}
        _check_names(recipe.model.experts, known - {"vlm_config"}, f"{where}: model: experts")
        hints = {item.name: item.type for item in fields(TrainingArguments)}
        _check_names(recipe.training, set(hints) - {"output_dir", "seed"}, f"{where}: training")
        for name, value in recipe.training.items():
            # YAML takes 1e-4 for a word.
            if isinstance(value, str) and hints[name] in (float, float | None):
                recipe.training[name] = _number(value, f"{where}: training: {name}")
        recipe._check(where)
        return recipe

    def _check(self, where: str) -> None:
        model = self.model
        if (model.pipeline is None) == (model.backbone is None) or (model.backbone is None) != (
            model.autoencoder is None
        ):
            raise ValueError(f"{where}: model: give either `pipeline`, or `backbone` and `autoencoder`.")
        if model.pipeline is not None and model.experts:
            raise ValueError(f"{where}: model: `experts` goes with `backbone`; a pipeline has its own.")
        if not isinstance(getattr(torch, model.dtype, None), torch.dtype):
            raise ValueError(f"{where}: model: dtype must be one of torch's, such as float32, got {model.dtype!r}.")
        if not self.data.source:
            raise ValueError(f"{where}: data: give `source`, e.g. {{path: imagefolder, data_dir: pictures}}.")
        if not 0.0 <= self.prompt_dropout <= 1.0:
            raise ValueError(f"{where}: prompt_dropout must be from 0 to 1, got {self.prompt_dropout}.")
        if self.interval_warmup_steps < 0:
            raise ValueError(
                f"{where}: interval_warmup_steps must be at least 0 (without), got {self.interval_warmup_steps}."
            )
        if isinstance(self.trainable, str) and self.trainable not in ("experts", "vlm"):
            raise ValueError(f"{where}: trainable must be experts, vlm, or a list of experts, got {self.trainable!r}.")
        if self.trainable == "vlm" and self.lora is None and self.data.cache and self.data.cache_contexts:
            raise ValueError(
                f"{where}: contexts cannot be cached while the backbone learns: set `cache_contexts: false`."
            )


def read_sections(path: str | Path) -> dict:
    """A YAML file of sections.

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        sections = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"recipe {path} must hold sections such as `model:`, found {type(sections).__name__}.")
    return sections


def is_recipe(sections: dict) -> bool:
    """Whether sections are those of a [`Recipe`], not of the embedded checkpoint's own build."""
    return bool({"model", "data", "training"} & {str(name) for name in sections})


def _check_names(found: dict, known: set[str], where: str) -> None:
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {sorted(known)}."
            raise ValueError(f"{where}: unknown field {name!r}; {hint}")


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"{where} must be a number, got {value!r}.") from error


def _checked(cls: Any, found: Any, where: str) -> Any:
    """A dataclass from a dict, its nested ones too; every field's name and type checked."""
    if not isinstance(found, dict):
        raise ValueError(f"{where} must hold fields, got {found!r}.")
    hints = get_type_hints(cls)
    _check_names(found, set(hints), where)
    values = {}
    for name, value in found.items():
        kinds = get_args(hints[name]) if isinstance(hints[name], types.UnionType) else (hints[name],)
        section = next((kind for kind in kinds if is_dataclass(kind)), None)
        if section is not None and not (value is None and type(None) in kinds):
            value = _checked(section, value, f"{where}: {name}")
        elif float in kinds and not isinstance(value, bool):
            value = _number(value, f"{where}: {name}")
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}.")
        values[name] = value
    missing = [name for name in ("model", "data", "training") if cls is Recipe and name not in found]
    if missing:
        raise ValueError(f"{where}: the section {missing[0]!r} is missing.")
    return cls(**values)


def load_pipeline(settings: ModelSettings) -> LatteFlowPipeline:
    """The pipeline that a recipe begins with, its experts new or trained before.

    Raises:
        `ValueError`: if its parts do not fit together.
        `OSError`: if one is not there.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.pipeline is not None:
        folder = tiny_checkpoint() if settings.pipeline == "tinyworld" else settings.pipeline
        pipe = LatteFlowPipeline.from_pretrained(folder, dtype=dtype)
        if settings.timestep_sampling is not None:
            # By a new configuration, which checks it.
            changed = {**pipe.model.config.to_dict(), "timestep_sampling": settings.timestep_sampling}
            pipe.model.config.timestep_sampling = LatteFlowConfig.from_dict(changed).timestep_sampling
    else:
        vae = AutoModel.from_pretrained(settings.autoencoder, torch_dtype=dtype).eval()
        config = {"latent_channels": vae.config.latent_channels, **settings.experts}
        if settings.timestep_sampling is not None:
            config["timestep_sampling"] = settings.timestep_sampling
        backbone = AutoModelForImageTextToText.from_pretrained(settings.backbone, dtype=dtype)
        model = LatteFlowForConditionalGeneration.from_vlm(backbone, **config)
        # Where the backbone lay is nobody's business.
        model.config.vlm_config._name_or_path = ""
        pipe = LatteFlowPipeline(
            model,
            LatteFlowProcessor.from_pretrained(settings.backbone),
            vae,
            LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries),
        )
    if settings.attn_implementation is not None:
        pipe.model.set_attn_implementation(settings.attn_implementation)
    pipe.vae.requires_grad_(False)
    return pipe


def choose_trainable(model: LatteFlowForConditionalGeneration, trainable: str | list) -> None:
    """Freeze everything but what `trainable` of [`Recipe`] names.

    Raises:
        `ValueError`: if there is no such expert.
    """
    if isinstance(trainable, list):
        from .adapters import train_only_experts

        train_only_experts(model, trainable)
        return
    model.requires_grad_(False)
    model.tower.requires_grad_(True)
    if trainable == "vlm":
        model.vlm.get_decoder().requires_grad_(True)


class _TokenContexts:
    """Prompts -> the arguments of `encode_context`: a backbone that learns encodes them inside `forward`."""

    def __init__(self, processor: LatteFlowProcessor):
        self.processor = processor

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.processor.encode_conversations([self.processor.conversation(prompt) for prompt in prompts]))


def train(recipe: Recipe, work_dir: Path, output_dir: Path) -> Path:
    """Train by a recipe; started again, it goes on from the last whole checkpoint in `work_dir`.

    Returns:
        `output_dir`, which appears whole: a pipeline, or with `lora` a PEFT adapter. What was logged is in
        `log.json` of `work_dir`.

    Raises:
        `ValueError`: if `output_dir` exists, the recipe does not fit the model, or the data is not usable.
        `OSError`: if a file is missing, or saving fails (a full disk); what was saved before stays.
        `FloatingPointError`: if a loss is no number, with the step, the expert and the batch.
    """
    if output_dir.exists():
        raise ValueError(f"output folder {output_dir} exists; give another one, or remove it.")
    arguments, keep = _arguments(recipe, work_dir / "checkpoints")
    check_sharding()
    set_seed(recipe.seed)
    pipe = load_pipeline(recipe.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(arguments.device)
    rows = open_rows(_sized(recipe.data, pipe), recipe.seed)
    model: Any = pipe.model
    if recipe.lora is not None:
        from peft import get_peft_model

        from .adapters import expert_lora_config  # type: ignore[import-not-found]

        model = get_peft_model(model, expert_lora_config(model, **recipe.lora))
    else:
        choose_trainable(model, recipe.trainable)
    frozen = recipe.lora is not None or recipe.trainable != "vlm"
    before = hash_module(pipe.model.vlm) if frozen and recipe.lora is None else None

    unreadable = UnreadableImages(recipe.data.max_unreadable)
    last = last_checkpoint(Path(arguments.output_dir))
    data, collator = _examples(recipe, pipe, rows, unreadable, arguments, last, frozen)
    ema = None if recipe.ema is None else EMACallback(recipe.ema.decay, recipe.ema.device)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[ema] if ema else [])
    trainer.add_callback(LossCallback(trainer))
    if recipe.interval_warmup_steps:
        trainer.add_callback(IntervalWarmupCallback(recipe.interval_warmup_steps))
    if frozen:
        trainer.add_callback(WholeBackboneCallback(trainer, pipe.model.vlm))
    if recipe.samples is not None:
        samples = recipe.samples
        trainer.add_callback(
            SampleCallback(
                pipe, samples.prompts, samples.every_steps, work_dir / "samples", samples.seed, ema, **samples.call
            )
        )
    checkpoints = CheckpointCallback(trainer, keep)
    trainer.add_callback(checkpoints)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except Exception as error:
        if not checkpoints.saving:
            raise
        kept = last_checkpoint(Path(arguments.output_dir))
        raise OSError(
            f"saving the checkpoint of step {trainer.state.global_step} failed ({error}); the last good one is "
            f"{kept}: make room and start again."
        ) from error
    if before is not None and hash_module(pipe.model.vlm) != before:
        raise RuntimeError("the frozen backbone changed during training.")
    if unreadable.names:
        logger.warning(f"{len(unreadable.names)} unreadable pictures were skipped: {', '.join(unreadable.names)}")
    process = PartialState()
    partial = output_dir.with_name(output_dir.name + ".partial")
    if process.is_main_process:
        (work_dir / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    process.wait_for_everyone()
    _save_result(pipe, model if recipe.lora is not None else None, partial)
    if process.is_main_process:
        partial.rename(output_dir)
    process.wait_for_everyone()
    return output_dir


def _save_result(pipe: LatteFlowPipeline, adapted: Any, folder: Path) -> None:
    """The pipeline, or the adapter of `adapted`; all processes must call it."""
    is_first, sharded = PartialState().is_main_process, is_sharded(pipe.model)
    if adapted is None and sharded:
        save_sharded(pipe, folder)
    elif adapted is None and is_first:
        pipe.save_pretrained(folder)
    elif adapted is not None:
        # An adapter is small.
        learned = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        weights = {name: whole(weight) for name, weight in learned.items()} if sharded else None
        if is_first:
            adapted.save_pretrained(folder, state_dict=weights)


def _arguments(recipe: Recipe, run_dir: Path) -> tuple[TrainingArguments, int]:
    """The Trainer's arguments, and how many checkpoints to keep."""
    # Without an accelerator, processes find each other only if told that there is none.
    settings = {"report_to": [], "use_cpu": get_device() == "cpu", **recipe.training}
    keep = int(settings.pop("save_total_limit", None) or 2)
    if recipe.data.source.get("streaming"):
        if settings.get("max_steps", -1) < 1:
            raise ValueError("training: a stream has no end: give `max_steps`.")
        # The stream itself passes over what was seen, without encoding it.
        settings["ignore_data_skip"] = True
    if settings.get("dataloader_num_workers") and (recipe.data.source.get("streaming") or not _is_cached(recipe)):
        raise ValueError(
            "training: dataloader_num_workers needs a cache (with its contexts): without one, pictures and prompts "
            "are encoded by the model's own parts, in the main process."
        )
    if settings.get("dataloader_persistent_workers"):
        raise ValueError(
            "training: dataloader_persistent_workers would keep every epoch's draws the same: leave it out."
        )
    # Each process reads its own share: batches hold more than tensors.
    settings["accelerator_config"] = {"dispatch_batches": False, **(settings.get("accelerator_config") or {})}
    try:
        arguments = TrainingArguments(
            output_dir=str(run_dir), seed=recipe.seed, **{**settings, "remove_unused_columns": False}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error
    return arguments, keep


def _is_cached(recipe: Recipe) -> bool:
    return recipe.data.cache is not None and (recipe.data.cache_contexts or recipe.trainable == "vlm")


def _sized(settings: DataSettings, pipe: LatteFlowPipeline) -> DataSettings:
    """The settings with a size that the pipeline can paint."""
    size = pipe.default_size if settings.size is None else settings.size
    step = pipe.vae_scale_factor * pipe.model.config.latent_patch_size
    if size < step or size % step:
        raise ValueError(f"data: size must be a positive multiple of {step}, got {size}.")
    return DataSettings(**{**settings.__dict__, "size": size})


def _examples(
    recipe: Recipe,
    pipe: LatteFlowPipeline,
    rows: ImageRows,
    unreadable: UnreadableImages,
    arguments: TrainingArguments,
    last: Path | None,
    frozen: bool,
) -> tuple[Any, TextToImageCollator]:
    """The dataset, and the collator that makes its examples a batch."""
    settings = rows.settings
    encoder = ImagePromptEncoder(pipe, settings.encode_batch_size)
    contexts: Any = encoder.contexts if frozen else _TokenContexts(pipe.processor)
    data: Any
    if settings.cache is not None:
        folder = Path(settings.cache)
        with_contexts = settings.cache_contexts and frozen
        build_cache(folder, pipe, rows, encoder, unreadable, with_contexts)
        data = CachedImageDataset(folder, recipe.seed)
        contexts = CachedContexts(folder) if with_contexts else contexts
    elif rows.is_stream:
        seen = 0 if last is None else int(last.name.removeprefix("checkpoint-"))
        seen *= arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        data = CaptionedImageStream(rows, recipe.seed, unreadable, start=seen)
    else:
        data = CaptionedImageDataset(rows, recipe.seed, unreadable)
    conversations: dict = {}
    if recipe.understanding is not None:
        processor = pipe.processor
        conversations = {
            "conversations": understanding_examples(recipe.understanding.source, recipe.seed, processor.conversation),
            "conversation_collator": ConversationCollator(processor),
            "conversation_share": recipe.understanding.share,
        }
    return data, TextToImageCollator(contexts, recipe.prompt_dropout, encoder.latents, **conversations)
