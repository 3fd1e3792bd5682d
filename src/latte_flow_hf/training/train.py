# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One training run: a recipe -> the stock Trainer -> a finished pipeline, or an adapter.

Started again with the same folders, a run continues from the last complete checkpoint. The working folder belongs to
one recipe and one starting model, which it remembers.
"""

import logging
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoModel
from diffusers.utils.torch_utils import get_device
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, set_seed

from ..cards import pipeline_card
from ..checkpoints import tiny_checkpoint
from ..files import atomic_write, check_output, store_hashes, write_json
from ..folder_lock import lock_folder
from ..modeling.adapters import sampling_mark
from ..modeling.backbone import read_vlm_config
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..modeling.sampling import DEFAULT_GUIDANCE_SCALE, experts_with_guidance
from ..pipelines.fingerprint import pipeline_fingerprint
from ..pipelines.loading import check_autoencoder
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from ..schedulers.steps import distilled_scheduler
from .adapters import expert_lora_config, read_starting_weights, set_trainable
from .cache import CachedContexts, CachedImageDataset, build_cache
from .callbacks import (
    CheckpointCallback,
    EMACallback,
    IntervalWarmupCallback,
    LossCallback,
    SampleCallback,
    TimeCallback,
    last_checkpoint,
    remove_incomplete_checkpoints,
)
from .collator import ConversationCollator, ImagePromptEncoder, PromptTokenizer, TextToImageCollator
from .data import (
    CaptionedImageDataset,
    CaptionedImageStream,
    ConversationDataset,
    DataSettings,
    ImageRows,
    UnreadableImages,
    load_conversations,
    load_image_rows,
)
from .recipe import DistillationSettings, ModelSettings, Recipe, ValidationSettings
from .sharding import UnshardedBackboneCallback, check_sharding, full_tensor, is_sharded, save_sharded_pipeline
from .trajectories import (
    TrajectoryCollator,
    TrajectoryDataset,
    build_trajectories,
    student_new_noise,
    trajectory_sigmas,
)
from .working_folder import RUN_FILE, check_run


logger = logging.getLogger(__name__)


def train(recipe: Recipe, work_dir: Path, output_dir: Path, allow_changes: bool = False) -> Path:
    """Train a model, or resume from the last complete checkpoint in `work_dir`.

    Args:
        recipe ([`Recipe`]): what is trained, on what, and how.
        work_dir (`Path`): the folder for checkpoints, sample images and `log.json`, all logged values. It belongs to
            one recipe, one starting model, the same data, and one process at a time.
        output_dir (`Path`): the folder for the result, which must not exist.
        allow_changes (`bool`, defaults to `False`): whether to resume although the recipe, the starting model or the
            data has changed since the run in `work_dir` began. More steps, and other settings of logging, saving and
            samples, are allowed in any case; which weights are trained cannot change.

    Returns:
        `Path`: `output_dir`, a pipeline, or with `lora` a PEFT adapter. It is written atomically.

    Raises:
        `ValueError`: if `output_dir` exists, the recipe does not fit the model, the data cannot be used, or `work_dir`
            belongs to another recipe, starting model or data.
        `OSError`: if a file is missing or damaged, another process uses `work_dir`, or a checkpoint cannot be saved;
            the earlier ones are kept.
        `FloatingPointError`: if a loss is not finite, with the step, the expert and the batch.
    """
    check_output(output_dir)
    arguments = training_arguments(recipe, work_dir / "checkpoints")
    with lock_folder(work_dir) if arguments.process_index == 0 else nullcontext():
        return _train(recipe, arguments, work_dir, output_dir, allow_changes)


def _train(
    recipe: Recipe, arguments: TrainingArguments, work_dir: Path, output_dir: Path, allow_changes: bool
) -> Path:
    check_sharding()
    set_seed(recipe.seed)
    pipe = load_pipeline(recipe.model)
    pipe.set_progress_bar_config(disable=True)
    is_first, run_dir = arguments.process_index == 0, Path(arguments.output_dir)
    if is_first and (run_dir / RUN_FILE).exists():
        remove_incomplete_checkpoints(run_dir)
    PartialState().wait_for_everyone()
    resume_from = last_checkpoint(run_dir)
    unreadable = UnreadableImages(recipe.data.max_unreadable)
    # Loaded before the check: files can change while the recipe, which has their folder, stays the same.
    rows = load_image_rows(set_image_size(recipe.data, pipe), recipe.seed)
    validation_rows = None
    if recipe.validation is not None:
        validation_rows = load_validation_rows(recipe, recipe.validation, pipe)
    conversations = None
    if recipe.understanding is not None:
        checked = pipe.processor.training_conversation
        conversations = load_conversations(recipe.understanding.source, recipe.seed, checked, unreadable)
    sections = {"data": rows, "validation": validation_rows, "understanding": conversations}
    run = {
        "recipe": recipe.model_dump(mode="json"),
        "starting_model": pipeline_fingerprint(pipe),
        # Conversations of the tiny world have none: the recipe decides them.
        "data": {
            name: data.fingerprint
            for name, data in sections.items()
            if isinstance(data, (ImageRows, ConversationDataset))
        },
    }
    if resume_from is not None:
        check_run(resume_from, run, arguments.max_steps, allow_changes)
    PartialState().wait_for_everyone()
    if is_first:
        write_json(run, run_dir / RUN_FILE)
        if recipe.lora is None:
            weights = [*pipe.model.state_dict().values(), *pipe.vae.state_dict().values()]
            check_output(output_dir, sum(weight.nbytes for weight in weights))
    pipe.to(arguments.device)
    dataset: Dataset
    collator: Any
    if recipe.lora is not None:
        # An error before the data are prepared.
        load_lora(recipe.lora, pipe.model)
    if recipe.distillation is not None:
        # Of the model without an adapter, so that runs with and without one can share the trajectories.
        dataset, collator = load_trajectories(recipe, recipe.distillation, pipe, rows, work_dir, unreadable)
    model = prepare_model(recipe, pipe)
    if recipe.distillation is None:
        dataset, collator = load_data(recipe, pipe, rows, unreadable, conversations, arguments, resume_from)
    validation: dict[str, Any] = {}
    if validation_rows is not None:
        update = {"seed": recipe.seed + 1, "understanding": None, "prompt_dropout": 0.0}
        evaluated = load_data(recipe.model_copy(update=update), pipe, validation_rows, unreadable)
        validation = dict(zip(("eval_dataset", "eval_collator"), evaluated))
    trainer = RecipeTrainer(model, arguments, train_dataset=dataset, data_collator=collator, **validation)
    checkpoints = add_callbacks(trainer, recipe, pipe, work_dir)
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except Exception as error:
        if not checkpoints.is_saving:
            raise
        if is_first:
            shutil.rmtree(run_dir / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
        raise OSError(
            f"saving the checkpoint of step {trainer.state.global_step} failed ({error}); the last complete one is "
            f"{last_checkpoint(run_dir) or 'the starting model'}: free disk space and start again."
        ) from error
    if unreadable.reasons:
        logger.warning(f"{len(unreadable.reasons)} images were skipped: {', '.join(unreadable.reasons)}")
    if is_first:
        write_json(trainer.state.log_history, work_dir / "log.json")
    origin = f"Trained with `latte-flow train` for {trainer.state.global_step} steps."
    if recipe.distillation is not None:
        origin = f"Distilled to few steps with `latte-flow distill` for {trainer.state.global_step} steps."
    save_result(pipe, model if recipe.lora is not None else None, output_dir, origin)
    return output_dir


class RecipeTrainer(Trainer):
    """The stock Trainer, with a collator and random draws of its own for evaluation.

    Args:
        eval_collator ([`TextToImageCollator`], *optional*): for `eval_dataset`; defaults to the one for training.
        args, kwargs: see `Trainer`.
    """

    data_collator: Any

    def __init__(self, *args: Any, eval_collator: TextToImageCollator | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self.ema: EMACallback | None = None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Same as in `Trainer`, but the checkpoint gives the state alone and not the settings: with the Trainer, a new
        learning rate would have no effect."""
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.lr_scheduler.base_lrs = [own["initial_lr"] for own in settings]
        rates = [
            rate * factor(self.lr_scheduler.last_epoch)
            for rate, factor in zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr"] = rate
        self.lr_scheduler._last_lr = rates

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Same as in `Trainer`, which takes another step if a finished run is resumed in the middle of an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        collator = self.data_collator
        self.data_collator = self.eval_collator or collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Same as `Trainer.evaluate`, of the averaged weights, and with the same noise and timesteps each time. The
        random state of the training is unchanged."""
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        averaged: AbstractContextManager = nullcontext() if self.ema is None else self.ema.averaged()
        with ExitStack() as stack:
            stack.enter_context(averaged)
            stack.enter_context(torch.random.fork_rng(devices, device_type=self.args.device.type))
            torch.manual_seed(self.args.seed)
            return super().evaluate(*args, **kwargs)


def training_arguments(recipe: Recipe, run_dir: Path) -> TrainingArguments:
    """The Trainer's arguments.

    Raises:
        `ValueError`: if a value is invalid.
    """
    settings = {
        "report_to": [],
        # Without it, processes without an accelerator do not find each other.
        "use_cpu": get_device() == "cpu",
        # torch warns of pinned memory where there is no device to copy to.
        "dataloader_pin_memory": get_device() != "cpu",
        **recipe.training,
        "output_dir": str(run_dir),
        "seed": recipe.seed,
        # Older checkpoints are removed by `CheckpointCallback`, after the new one is complete.
        "save_total_limit": None,
        # What tells the Trainer that a batch has a loss also outside training.
        "label_names": ["latents" if recipe.distillation is None else "states"],
        # Batches contain more than `forward` takes, see `LossCallback`.
        "remove_unused_columns": False,
        # Each process loads its own batches, because they do not consist of tensors alone.
        "accelerator_config": {"dispatch_batches": False, **(recipe.training.get("accelerator_config") or {})},
    }
    if recipe.validation is not None:
        steps = settings.get("save_steps", TrainingArguments.save_steps)
        settings = {"eval_strategy": "steps", "eval_steps": steps, **settings}
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
        checkpoint = tiny_checkpoint() if settings.pipeline == "tinyworld" else settings.pipeline
        pipe = LatteFlowPipeline.from_pretrained(checkpoint, dtype=dtype)
        # The data may teach other words and sizes than the pipeline knew.
        pipe.model.config.trained_words = None
        if settings.timestep_sampling is not None:
            # A new configuration, because it checks the value.
            config = {**pipe.model.config.to_dict(), "timestep_sampling": settings.timestep_sampling}
            pipe.model.config.timestep_sampling = LatteFlowConfig.from_dict(config).timestep_sampling
    else:
        # Refuses other models before weights are read.
        read_vlm_config(str(settings.backbone))
        folder = Path(str(settings.autoencoder))
        if folder.is_dir():
            check_autoencoder(folder)
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


def prepare_model(recipe: Recipe, pipe: LatteFlowPipeline) -> Any:
    """Make trainable what the recipe names; the pipeline is then sampled as the result shall be: with few steps after
    `distillation`, without guidance if it is in the weights.

    Returns:
        `pipe.model`, or the `PeftModel` around it.

    Raises:
        `ValueError`: if an expert does not exist, or a setting of the adapter cannot be used.
    """
    model = pipe.model
    if recipe.lora is not None:
        from peft import get_peft_model, set_peft_model_state_dict

        config, weights = load_lora(recipe.lora, model)
        experts, sampling = sorted(set(recipe.lora["experts"])), None
        if recipe.distillation is not None:
            sampling = student_sampling(recipe.distillation, experts, pipe)
        elif recipe.folded_guidance_scale is not None:
            sampling = guided_sampling(recipe.folded_guidance_scale, experts, pipe)
        if sampling is not None:
            config.target_modules = f"{sampling_mark(model.config, sampling)}{config.target_modules}"
        peft_model = get_peft_model(model, config)
        if weights is not None:
            set_peft_model_state_dict(peft_model, weights)
        return peft_model
    set_trainable(model, recipe.trainable)
    if recipe.folded_guidance_scale is not None:
        model.config.sampling = guided_sampling(recipe.folded_guidance_scale, model.training_experts, pipe)
    if recipe.distillation is not None:
        model.config.sampling = student_sampling(recipe.distillation, model.training_experts, pipe)
        pipe.scheduler = distilled_scheduler(pipe.scheduler, model.config.sampling, model.config)
    return model


def load_lora(settings: dict, model: LatteFlowForConditionalGeneration) -> tuple[Any, dict | None]:
    """The configuration of the adapter to train, and the weights it starts from, if they are given.

    Raises:
        `ValueError`: if an expert does not exist, a setting cannot be used, or the weights do not fit.
        `OSError`: if a file of the weights is missing or damaged.
    """
    config = expert_lora_config(model, **{name: value for name, value in settings.items() if name != "weights"})
    source = settings.get("weights")
    return config, None if source is None else read_starting_weights(source, config)


def load_trajectories(
    recipe: Recipe,
    settings: DistillationSettings,
    pipe: LatteFlowPipeline,
    rows: ImageRows,
    work_dir: Path,
    unreadable: UnreadableImages,
) -> tuple[Dataset, TrajectoryCollator]:
    """Generate the teacher's trajectories that do not exist yet, and load them.

    Raises:
        `ValueError`: if the teacher does not fit the student, or there are other trajectories in the folder.
        `OSError`: if a file is missing or damaged.
    """
    data = rows.settings
    folder = work_dir / "trajectories" if data.cache is None else Path(data.cache)

    def load(source: str | None, lora: str | None) -> LatteFlowPipeline | None:
        if source is None and lora is None:
            return None
        model = recipe.model.model_copy(update={"pipeline": source or recipe.model.pipeline})
        other = load_pipeline(model).to(pipe.device)
        other.set_progress_bar_config(disable=True)
        if lora is not None:
            other.load_lora_weights(lora)
        return other

    teacher = load(settings.teacher, settings.teacher_lora) or pipe
    earlier = load(settings.student, settings.student_lora)
    build_trajectories(folder, teacher, pipe, rows, settings, recipe.seed, unreadable, data.cache_contexts, earlier)
    num_trajectories = settings.num_trajectories or len(rows.dataset)
    dataset = TrajectoryDataset(folder, num_trajectories, settings.batch_size, recipe.seed)
    encoder = ImagePromptEncoder(pipe, data.encode_batch_size)
    contexts: Any = CachedContexts(folder) if data.cache_contexts else encoder.contexts
    sigmas = trajectory_sigmas(pipe.model.config.expert_boundaries, settings.student_steps)
    return dataset, TrajectoryCollator(contexts, sigmas)


def student_sampling(settings: DistillationSettings, experts: list[int], pipe: LatteFlowPipeline) -> dict[str, Any]:
    """How the student is sampled, see [`modeling.sampling.check_sampling`]. Experts that are not distilled keep the
    steps and the guidance of the teacher."""
    num_experts = len(settings.teacher_steps)
    scale = settings.guidance_scale
    scales = scale if isinstance(scale, list) else [scale] * num_experts
    is_distilled = [expert in experts for expert in range(num_experts)]
    steps = zip(is_distilled, settings.student_steps, settings.teacher_steps)
    shares = student_new_noise(settings, pipe)
    new_noise = [share if distilled else 0.0 for distilled, share in zip(is_distilled, shares)]
    return {
        "steps_per_expert": [few if distilled else many for distilled, few, many in steps],
        "guidance_scale": 1.0 if all(is_distilled) else [1.0 if d else own for d, own in zip(is_distilled, scales)],
        "distilled_experts": list(experts),
        **({"new_noise": new_noise} if any(new_noise) else {}),
    }


def guided_sampling(scale: float, experts: list[int], pipe: LatteFlowPipeline) -> dict[str, Any]:
    """How a model is sampled whose `experts` were trained with guidance in their weights. The others keep the guidance
    of the model.

    Raises:
        `ValueError`: if the weights contain guidance already.
    """
    num_experts, sampling = pipe.model.config.num_experts, pipe.model.sampling
    guided = [expert for expert in experts_with_guidance(sampling, num_experts) if expert in experts]
    if guided:
        raise ValueError(
            f"folded_guidance_scale: experts {guided} of the model were trained or distilled with guidance in their "
            "weights already; start from a model that is sampled with guidance."
        )
    if len(experts) == num_experts:
        return {**sampling, "guidance_scale": 1.0, "folded_guidance_scale": scale}
    own, folded = (
        value if isinstance(value, list) else [value] * num_experts
        for value in (
            sampling.get("guidance_scale", DEFAULT_GUIDANCE_SCALE),
            sampling.get("folded_guidance_scale", 1.0),
        )
    )
    return {
        **sampling,
        "guidance_scale": [1.0 if expert in experts else own[expert] for expert in range(num_experts)],
        "folded_guidance_scale": [scale if expert in experts else folded[expert] for expert in range(num_experts)],
    }


def load_data(
    recipe: Recipe,
    pipe: LatteFlowPipeline,
    rows: ImageRows,
    unreadable: UnreadableImages,
    conversations: Dataset | None = None,
    arguments: TrainingArguments | None = None,
    resume_from: Path | None = None,
) -> tuple[Dataset, TextToImageCollator]:
    """The dataset of `rows` and its collator; the cache is filled first, if there is one.

    Raises:
        `ValueError`: if the data cannot be used.
        `OSError`: if a file is missing.
    """
    settings = rows.settings
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
        assert arguments is not None
        num_steps = 0 if resume_from is None else int(resume_from.name.removeprefix("checkpoint-"))
        batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        dataset = CaptionedImageStream(rows, recipe.seed, unreadable, start=num_steps * batch_size)
    else:
        dataset = CaptionedImageDataset(rows, recipe.seed, unreadable)
    understanding: dict = {}
    if recipe.understanding is not None:
        understanding = {
            "conversations": conversations,
            "conversation_collator": ConversationCollator(pipe.processor),
            "conversation_share": recipe.understanding.share,
        }
    collator = TextToImageCollator(
        contexts,
        recipe.prompt_dropout,
        encoder.latents,
        **understanding,
        folded_guidance_scale=recipe.folded_guidance_scale,
    )
    return dataset, collator


def load_validation_rows(recipe: Recipe, validation: ValidationSettings, pipe: LatteFlowPipeline) -> ImageRows:
    """Load the images of the section `validation`, without flips.

    Raises:
        `ValueError`: if the data cannot be used.
        `OSError`: if a file is missing.
    """
    update = {"source": validation.source, "cache": validation.cache, "flip": False}
    settings = set_image_size(recipe.data.model_copy(update=update), pipe)
    # Other scenes of the tiny world than those of the training, which have the seed of the recipe.
    return load_image_rows(settings, recipe.seed + 1)


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


def add_callbacks(
    trainer: RecipeTrainer, recipe: Recipe, pipe: LatteFlowPipeline, work_dir: Path
) -> CheckpointCallback:
    """Add the callbacks that the recipe asks for; the last one, which saves checkpoints, is returned."""
    ema = None if recipe.ema is None else EMACallback(recipe.ema.decay, recipe.ema.device)
    if ema is not None:
        trainer.add_callback(ema)
        trainer.ema = ema
    trainer.add_callback(LossCallback(trainer))
    trainer.add_callback(TimeCallback())
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


def save_result(pipe: LatteFlowPipeline, peft_model: Any, output_dir: Path, origin: str) -> None:
    """Save the pipeline with a model card, or only the adapter of `peft_model` if there is one, with hashes of the
    weights. All processes must call it."""
    process, sharded = PartialState(), is_sharded(pipe.model)
    with atomic_write(output_dir) if process.is_main_process else nullcontext(output_dir) as folder:
        if peft_model is not None:
            weights = None
            if sharded:
                trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
                weights = {name: full_tensor(weight) for name, weight in trained.items()}
            # Don't store local paths: PEFT writes that of the base model into the configuration and the model card.
            base = peft_model.get_base_model()
            if Path(base.name_or_path).is_dir():
                base.name_or_path = base.config.name_or_path = ""
            for config in peft_model.peft_config.values():
                if Path(config.base_model_name_or_path or "").is_dir():
                    config.base_model_name_or_path = None
            if process.is_main_process:
                peft_model.save_pretrained(folder, state_dict=weights)
        elif sharded:
            save_sharded_pipeline(pipe, folder)
        elif process.is_main_process:
            pipe.save_pretrained(folder)
        if process.is_main_process:
            if peft_model is None:
                (folder / "README.md").write_bytes(pipeline_card(pipe.model.config, origin))
            store_hashes(folder)
    process.wait_for_everyone()
