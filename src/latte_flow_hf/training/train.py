# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One training run: a recipe -> the stock Trainer -> a finished pipeline, or an adapter.

Started again with the same folders, a run continues from the last complete checkpoint.
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoModel
from diffusers.utils.torch_utils import get_device
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, set_seed

from ..checkpoints import tiny_checkpoint
from ..files import atomic_write, write_json
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from .adapters import expert_lora_config, set_trainable
from .cache import CachedContexts, CachedImageDataset, build_cache
from .callbacks import (
    CheckpointCallback,
    EMACallback,
    IntervalWarmupCallback,
    LossCallback,
    SampleCallback,
    last_checkpoint,
)
from .collator import ConversationCollator, ImagePromptEncoder, PromptTokenizer, TextToImageCollator
from .data import (
    CaptionedImageDataset,
    CaptionedImageStream,
    DataSettings,
    UnreadableImages,
    load_conversations,
    load_image_rows,
)
from .recipe import ModelSettings, Recipe
from .sharding import UnshardedBackboneCallback, check_sharding, full_tensor, is_sharded, save_sharded_pipeline


logger = logging.getLogger(__name__)


def train(recipe: Recipe, work_dir: Path, output_dir: Path) -> Path:
    """Train a model, or resume from the last complete checkpoint in `work_dir`.

    Args:
        recipe ([`Recipe`]): what is trained, on what, and how.
        work_dir (`Path`): the folder for checkpoints, sample images and `log.json`, all logged values.
        output_dir (`Path`): the folder for the result, which must not exist.

    Returns:
        `Path`: `output_dir`, a pipeline, or with `lora` a PEFT adapter. It is written atomically.

    Raises:
        `ValueError`: if `output_dir` exists, the recipe does not fit the model, or the data cannot be used.
        `OSError`: if a file is missing, or a checkpoint cannot be saved; the earlier ones are kept.
        `FloatingPointError`: if a loss is not finite, with the step, the expert and the batch.
    """
    if output_dir.exists():
        raise ValueError(f"output folder {output_dir} exists; remove it, or use another one.")
    arguments = training_arguments(recipe, work_dir / "checkpoints")
    check_sharding()
    set_seed(recipe.seed)
    pipe = load_pipeline(recipe.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(arguments.device)
    model: Any = pipe.model
    if recipe.lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, expert_lora_config(model, **recipe.lora))
    else:
        set_trainable(model, recipe.trainable)
    resume_from = last_checkpoint(Path(arguments.output_dir))
    unreadable = UnreadableImages(recipe.data.max_unreadable)
    dataset, collator = load_data(recipe, pipe, arguments, unreadable, resume_from)
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collator)
    checkpoints = add_callbacks(trainer, recipe, pipe, work_dir)
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except Exception as error:
        if not checkpoints.is_saving:
            raise
        raise OSError(
            f"saving the checkpoint of step {trainer.state.global_step} failed ({error}); the last complete one is "
            f"{last_checkpoint(Path(arguments.output_dir))}: free disk space and start again."
        ) from error
    if unreadable.reasons:
        logger.warning(f"{len(unreadable.reasons)} unreadable images were skipped: {', '.join(unreadable.reasons)}")
    if PartialState().is_main_process:
        write_json(trainer.state.log_history, work_dir / "log.json")
    save_result(pipe, model if recipe.lora is not None else None, output_dir)
    return output_dir


def training_arguments(recipe: Recipe, run_dir: Path) -> TrainingArguments:
    """The Trainer's arguments.

    Raises:
        `ValueError`: if a value is invalid.
    """
    settings = {
        "report_to": [],
        # Without it, processes without an accelerator do not find each other.
        "use_cpu": get_device() == "cpu",
        **recipe.training,
        "output_dir": str(run_dir),
        "seed": recipe.seed,
        # Older checkpoints are removed by `CheckpointCallback`, after the new one is complete.
        "save_total_limit": None,
        # Batches contain more than `forward` takes, see `LossCallback`.
        "remove_unused_columns": False,
        # Each process loads its own batches, because they do not consist of tensors alone.
        "accelerator_config": {"dispatch_batches": False, **(recipe.training.get("accelerator_config") or {})},
    }
    if recipe.data.source.get("streaming"):
        # `CaptionedImageStream` skips the examples of earlier steps itself, without decoding them.
        settings["ignore_data_skip"] = True
    try:
        return TrainingArguments(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error


def load_pipeline(settings: ModelSettings) -> LatteFlowPipeline:
    """Load the pipeline to train, or assemble it with new experts.

    Raises:
        `ValueError`: if the components do not fit together.
        `OSError`: if one does not exist.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.pipeline is not None:
        folder = tiny_checkpoint() if settings.pipeline == "tinyworld" else settings.pipeline
        pipe = LatteFlowPipeline.from_pretrained(folder, dtype=dtype)
        # The data may teach other words and sizes than the pipeline knew.
        pipe.model.config.trained_words = None
        if settings.timestep_sampling is not None:
            # A new configuration, because it checks the value.
            config = {**pipe.model.config.to_dict(), "timestep_sampling": settings.timestep_sampling}
            pipe.model.config.timestep_sampling = LatteFlowConfig.from_dict(config).timestep_sampling
    else:
        vae = AutoModel.from_pretrained(settings.autoencoder, torch_dtype=dtype).eval()
        backbone = AutoModelForImageTextToText.from_pretrained(settings.backbone, dtype=dtype)
        experts = {"latent_channels": vae.config.latent_channels, **settings.experts}
        if settings.timestep_sampling is not None:
            experts["timestep_sampling"] = settings.timestep_sampling
        model = LatteFlowForConditionalGeneration.from_vlm(backbone, **experts)
        # Don't store local paths.
        model.config.vlm_config._name_or_path = ""
        vae.register_to_config(_name_or_path="")
        scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, **settings.scheduler)
        pipe = LatteFlowPipeline(model, LatteFlowProcessor.from_pretrained(settings.backbone), vae, scheduler)
    if settings.attn_implementation is not None:
        pipe.model.set_attn_implementation(settings.attn_implementation)
    pipe.vae.requires_grad_(False)
    return pipe


def load_data(
    recipe: Recipe,
    pipe: LatteFlowPipeline,
    arguments: TrainingArguments,
    unreadable: UnreadableImages,
    resume_from: Path | None,
) -> tuple[Dataset, TextToImageCollator]:
    """Load the dataset and its collator; the cache is filled first, if there is one.

    Raises:
        `ValueError`: if the data cannot be used.
        `OSError`: if a file is missing.
    """
    settings = set_image_size(recipe.data, pipe)
    rows = load_image_rows(settings, recipe.seed)
    encoder = ImagePromptEncoder(pipe, settings.encode_batch_size)
    contexts: Any = PromptTokenizer(pipe.processor) if recipe.trains_backbone else encoder.contexts
    dataset: Any
    if settings.cache is not None:
        folder = Path(settings.cache)
        with_contexts = settings.cache_contexts and not recipe.trains_backbone
        build_cache(folder, pipe, rows, encoder, unreadable, with_contexts)
        dataset = CachedImageDataset(folder, recipe.seed)
        contexts = CachedContexts(folder) if with_contexts else contexts
    elif rows.is_stream:
        num_steps = 0 if resume_from is None else int(resume_from.name.removeprefix("checkpoint-"))
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        dataset = CaptionedImageStream(rows, recipe.seed, unreadable, start=num_steps * batch_size)
    else:
        dataset = CaptionedImageDataset(rows, recipe.seed, unreadable)
    conversations: dict = {}
    if recipe.understanding is not None:
        source, share = recipe.understanding.source, recipe.understanding.share
        conversations = {
            "conversations": load_conversations(source, recipe.seed, pipe.processor.training_conversation),
            "conversation_collator": ConversationCollator(pipe.processor),
            "conversation_share": share,
        }
    return dataset, TextToImageCollator(contexts, recipe.prompt_dropout, encoder.latents, **conversations)


def set_image_size(settings: DataSettings, pipe: LatteFlowPipeline) -> DataSettings:
    """The settings with a size that the pipeline can generate.

    Raises:
        `ValueError`: if the given size is not one.
    """
    size = pipe.default_size if settings.size is None else settings.size
    multiple = pipe.vae_scale_factor * pipe.model.config.latent_patch_size
    if size < multiple or size % multiple:
        raise ValueError(f"data: size must be a positive multiple of {multiple}, got {size}.")
    return settings.model_copy(update={"size": size})


def add_callbacks(trainer: Trainer, recipe: Recipe, pipe: LatteFlowPipeline, work_dir: Path) -> CheckpointCallback:
    """Add the callbacks that the recipe asks for; the last one, which saves checkpoints, is returned."""
    ema = None if recipe.ema is None else EMACallback(recipe.ema.decay, recipe.ema.device)
    if ema is not None:
        trainer.add_callback(ema)
    trainer.add_callback(LossCallback(trainer))
    if recipe.interval_warmup_steps:
        trainer.add_callback(IntervalWarmupCallback(recipe.interval_warmup_steps))
    if not recipe.trains_backbone:
        trainer.add_callback(UnshardedBackboneCallback(trainer, pipe.model.vlm))
    if recipe.samples is not None:
        samples, folder = recipe.samples, work_dir / "samples"
        trainer.add_callback(
            SampleCallback(pipe, samples.prompts, samples.every_steps, folder, samples.seed, ema, **samples.call)
        )
    checkpoints = CheckpointCallback(trainer, int(recipe.training.get("save_total_limit") or 2))
    trainer.add_callback(checkpoints)
    return checkpoints


def save_result(pipe: LatteFlowPipeline, peft_model: Any, output_dir: Path) -> None:
    """Save the pipeline, or only the adapter of `peft_model` if there is one. All processes must call it."""
    process, sharded = PartialState(), is_sharded(pipe.model)
    with atomic_write(output_dir) if process.is_main_process else nullcontext(output_dir) as folder:
        if peft_model is not None:
            weights = None
            if sharded:
                trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
                weights = {name: full_tensor(weight) for name, weight in trained.items()}
            if process.is_main_process:
                peft_model.save_pretrained(folder, state_dict=weights)
        elif sharded:
            save_sharded_pipeline(pipe, folder)
        elif process.is_main_process:
            pipe.save_pretrained(folder)
    process.wait_for_everyone()
