# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a recipe costs before it runs: memory per device, operations, hours, disk, and what does not fit.

Models are made on the meta device from their configurations: a plan needs no weights, no data and no accelerator.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments

from ..checkpoints import tiny_checkpoint
from ..files import read_json
from ..modeling.backbone import read_vlm_config
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.sampling import guides_any
from ..pipelines.pipeline_latte_flow import spatial_compression
from ..tinyworld.datasets import TinyWorldImages
from .adapters import expert_lora_config, set_trainable
from .collator import ImagePromptEncoder
from .costs import Examples, Flops, context_bytes, expert_flops, optimizer_bytes, prefill_flops, update_traffic
from .devices import Device
from .memory import Memory, ModelShape, Setup, device_memory, rows_of_devices, without_memory
from .published import AUTOENCODERS, BACKBONES
from .recipe import ModelSettings, Recipe
from .shapes import decoder_shape, tower_shape
from .train import training_arguments


# (Chosen: well-tuned training runs of transformers report 0.3 to 0.5; a batch split over experts has small matrices.)
DEFAULT_UTILISATION = 0.35
# (Chosen: the prompt of benchmarks/flops.py has 27 tokens with the chat template of Qwen2-VL.)
DEFAULT_PROMPT_TOKENS = 32
# (Chosen: more than any one training has; each device is looked at.)
MAX_DEVICES = 100_000
# The share of a device's memory that stays free. (Chosen: the CUDA context, workspaces of libraries and fragmentation
# are in no formula.)
RESERVE = 0.1
# Bytes per second from a device to main memory. (Chosen: about what PCIe 4.0 x16 reaches, of 32 GB/s.)
BUS_BANDWIDTH = 25e9


@dataclass(frozen=True)
class Switch:
    """A change of settings, and the memory with it and the ones before it."""

    setting: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a recipe costs; bytes, operations and hours.

    Args:
        assumptions (`dict`): the numbers that the plan depends on and the recipe does not give.
        parameters (`dict[str, int]`): `backbone`, `autoencoder`, `tower`, `frozen`, `trained`, and `active`: those of
            the tower that run for an image at one step of sampling.
        batch (`dict`): images per device and pass, passes per step, images per step, and those of each expert.
        memory ([`Memory`]): of one device.
        available (`float`): memory of a device that may be used.
        switches (`list[Switch]`): each alone, if the run does not fit.
        together (`list[Switch]`): one after the other, until it fits.
        flops (`dict[str, int]`): `step`, of all devices, `run`, `latents`, `contexts` and `trajectories`: what is
            prepared once.
        steps (`int`): steps of the run.
        hours (`dict[str, float]`): `training`, the operations of all steps; `update`, the weights that the optimizer
            reads and writes in them; `averages`, those copied to the CPU; what is prepared once; and `total`, with all
            devices at work.
        device_hours (`float`): `total`, times the number of devices.
        disk (`dict[str, int]`): `latents`, `contexts`, `trajectories` and `checkpoints`.
        notes (`list[str]`): what is not counted, or not known.
    """

    assumptions: dict[str, Any]
    parameters: dict[str, int]
    batch: dict[str, Any]
    memory: Memory
    available: float
    switches: list[Switch]
    together: list[Switch]
    flops: dict[str, int]
    steps: int
    hours: dict[str, float]
    device_hours: float
    disk: dict[str, int]
    notes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "fits": self.fits}


def make_plan(
    recipe: Recipe,
    device: Device,
    num_devices: int = 1,
    is_sharded: bool = False,
    utilisation: float = DEFAULT_UTILISATION,
    num_images: int | None = None,
    num_prompts: int | None = None,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    backbone_config: str | Path | None = None,
    autoencoder_config: str | Path | None = None,
) -> Plan:
    """Plan the training of a recipe.

    Args:
        recipe ([`Recipe`]): the recipe.
        device ([`Device`]): each of the devices.
        num_devices (`int`, defaults to 1): the number of devices, each with a process of its own.
        is_sharded (`bool`, defaults to `False`): whether FSDP2 shards the tower over them.
        utilisation (`float`, defaults to 0.35): the share of the peak speed that is reached, above 0 and up to 1.
        num_images (`int`, *optional*): of the data; a recipe of the tiny world has its own.
        num_prompts (`int`, *optional*): different prompts of the data; as many as images if not given, with captions.
        prompt_tokens (`int`, defaults to 32): tokens of the longest prompt of a batch, with the chat template.
        backbone_config, autoencoder_config (`str` or `Path`, *optional*): folder or file of the configuration, in
            place of the one that the recipe names.

    Raises:
        `ValueError`: if a number is out of range, the recipe does not fit the model, or the costs of a part of it are
            not known.
        `OSError`: if a configuration is not found.
    """
    _check_counts(num_devices, utilisation, num_images, num_prompts, prompt_tokens)
    if is_sharded and num_devices < 2:
        raise ValueError("--fsdp needs at least 2 devices to shard the tower over, got --num-devices 1.")
    if is_sharded and recipe.trains_backbone:
        raise ValueError("trainable: the memory of a backbone that is trained is not known here with --fsdp.")
    arguments = plan_arguments(recipe)
    model, vae = build_models(recipe, backbone_config, autoencoder_config)
    shape = model_shape(model, vae, recipe.model.attn_implementation)
    source = recipe.data.source
    if num_images is None and source.get("path") == "tinyworld":
        num_images = source.get("num_images", inspect.signature(TinyWorldImages).parameters["num_images"].default)
    if num_prompts is None and recipe.data.label is None:
        num_prompts = num_images

    scale = spatial_compression(vae)
    size = model.config.sample_size * scale if recipe.data.size is None else recipe.data.size
    multiple = scale * model.config.latent_patch_size
    if size < multiple or size % multiple:
        raise ValueError(f"data: size must be a positive multiple of {multiple}, got {size}.")
    num_latents = vae.config.latent_channels * (size // scale) ** 2
    contexts, max_contexts = _where_contexts_are(recipe), ImagePromptEncoder.max_contexts
    setup = Setup(
        num_devices=num_devices,
        is_sharded=is_sharded,
        batch_size=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        num_tokens=(size // multiple) ** 2,
        num_context=prompt_tokens,
        is_mixed=arguments.bf16 or arguments.fp16,
        is_checkpointing=arguments.activation_checkpointing,
        optimizer=getattr(arguments.optim, "value", str(arguments.optim)),
        has_ema=recipe.ema is not None,
        ema_on_device=recipe.ema is not None and recipe.ema.device is None,
        contexts=contexts,
        num_kept_contexts=min(num_prompts or max_contexts, max_contexts) if contexts == "memory" else 0,
    )
    available = (1 - RESERVE) * device.memory
    memory, rows = busiest_device(shape, setup)
    switches, together = ([], []) if memory.peak <= available else find_switches(shape, setup, available)

    notes = _not_counted(recipe)
    if memory.host:
        on_device = memory.peak + memory.host
        verdict = "fits" if on_device <= available else "does not fit"
        notes.append(
            f"averages on the CPU: {memory.host / 1e9:.2f} GB are copied from each device to main memory at every "
            f"step; with averages on the device the peak is {on_device / 1e9:.2f} GB, which {verdict}."
        )
    if len(set(rows)) > 1 or setup.batch_size < len(shape.experts):
        notes.append(
            f"a batch of {setup.batch_size} per device is split unevenly over {len(shape.experts)} experts ({rows} "
            f"images, at least one each): use a multiple of {len(shape.experts)}."
        )
    peaks = _peaks(device, recipe, arguments)
    seconds_per_flop = {name: 1 / (peak * utilisation) for name, peak in peaks.items()}

    is_distilled = recipe.distillation is not None
    encode = 0 if is_distilled else encode_flops(vae, size)
    prompt = prefill_flops(shape.decoder, 1, prompt_tokens)
    is_kept = contexts == "memory" and num_prompts is not None and num_prompts <= max_contexts
    is_prepared = {"latents": recipe.data.cache is not None, "contexts": contexts == "cache" or is_kept}
    if contexts == "memory" and num_prompts is None:
        notes.append("prompts are taken to be all different: give --num-prompts.")
    passes = setup.accumulation
    per_device: dict[str, int] = {"training": 0, "latents": 0, "contexts": 0}
    of_all = 0
    for split, number in rows_of_devices(setup.batch_size, len(shape.experts), num_devices).items():
        flops = step_flops(shape, setup, split, recipe)
        in_step = prompt_flops_of_step(model, shape, setup, split, recipe) if contexts == "step" else 0
        # Each step waits for the slowest device.
        per_device["training"] = max(per_device["training"], passes * flops.total)
        of_all += number * passes * (flops.total + in_step)
        per_device["contexts"] = max(per_device["contexts"], passes * in_step)
    if not is_prepared["latents"] and not is_distilled:
        per_device["latents"] = passes * setup.batch_size * encode
    if contexts == "memory" and not is_prepared["contexts"]:
        per_device["contexts"] = passes * setup.batch_size * prompt
        of_all += num_devices * per_device["contexts"]
    of_all += num_devices * per_device["latents"]
    step_seconds = sum(amount * seconds_per_flop[name] for name, amount in per_device.items())

    num_steps = _num_steps(arguments, num_images, setup)
    prepared = {"latents": 0, "contexts": 0, "trajectories": 0}
    disk = {"latents": 0, "contexts": 0, "trajectories": 0}
    width = shape.width
    prompt_bytes = context_bytes(shape.decoder, 1, prompt_tokens, width, len(shape.decoder.layer_weights))
    num_views = 2 if recipe.data.flip else 1
    if is_prepared["latents"] and not is_distilled:
        if num_images is None:
            notes.append("latents on disk and their hours are not known: give --num-images.")
        else:
            prepared["latents"] = num_views * num_images * encode
            disk["latents"] = num_views * num_images * num_latents * width
    if is_prepared["contexts"]:
        if num_prompts is None:
            notes.append("contexts on disk and their hours are not known: give --num-prompts.")
        else:
            # And the empty prompt.
            prepared["contexts"] = (num_prompts + 1) * prompt
            disk["contexts"] = (num_prompts + 1) * prompt_bytes * (contexts == "cache")
    if recipe.distillation is not None:
        amounts = trajectory_costs(recipe, shape, setup, num_images, num_latents)
        prepared["trajectories"], disk["trajectories"] = amounts
        notes.append("the teacher is taken to have the shapes of the student.")
    disk["checkpoints"] = checkpoint_bytes(recipe, shape, setup)
    speeds = {"latents": "latents", "contexts": "contexts", "trajectories": "contexts"}
    hours = {"training": num_steps * step_seconds / 3600, "update": 0.0}
    if device.bandwidth is None:
        notes.append("the memory traffic of the optimizer is not counted: the bandwidth of the device is not known.")
    else:
        clips = bool(arguments.max_grad_norm)
        traffic = update_traffic(memory.gradients, memory.optimizer, clips, setup.ema_on_device)
        hours["update"] = num_steps * traffic / device.bandwidth / 3600
    hours["averages"] = num_steps * memory.host / BUS_BANDWIDTH / 3600
    for name, amount in prepared.items():
        hours[name] = amount * seconds_per_flop[speeds[name]] / num_devices / 3600
    hours["total"] = sum(hours.values())

    expert = max(range(model.config.num_experts), key=lambda k: len(model.config.expert_layers(k)))
    active = sum(
        weight.numel()
        for name, weight in model.tower.named_parameters()
        if not name.startswith("layers.") or int(name.split(".")[1]) in model.config.expert_layers(expert)
    )
    total = shape.num_backbone + shape.num_autoencoder + shape.num_tower
    return Plan(
        assumptions={
            "device": device.name,
            "source": device.source,
            "memory": device.memory,
            "reserve": RESERVE,
            "peak_flops": peaks,
            "bandwidth": device.bandwidth,
            "bus_bandwidth": BUS_BANDWIDTH,
            "utilisation": utilisation,
            "num_devices": num_devices,
            "parallelism": "FSDP2" if is_sharded else "data parallel" if num_devices > 1 else "one device",
            "prompt_tokens": prompt_tokens,
            "num_images": num_images,
            "num_prompts": num_prompts,
            "latent_tokens": setup.num_tokens,
            "optimizer": setup.optimizer,
        },
        parameters={
            "backbone": shape.num_backbone,
            "autoencoder": shape.num_autoencoder,
            "tower": shape.num_tower,
            "frozen": total - shape.num_trained,
            "trained": shape.num_trained,
            "active": active,
        },
        batch={
            "per_device": setup.batch_size,
            "accumulation": setup.accumulation,
            "per_step": setup.batch_size * setup.accumulation * num_devices,
            "per_expert": rows,
            "experts": list(shape.experts),
        },
        memory=memory,
        available=available,
        switches=switches,
        together=together,
        flops={"step": of_all, "run": num_steps * of_all, **prepared},
        steps=num_steps,
        hours=hours,
        device_hours=num_devices * hours["total"],
        disk=disk,
        notes=notes,
    )


def _check_counts(
    num_devices: int, utilisation: float, num_images: int | None, num_prompts: int | None, prompt_tokens: int
) -> None:
    counts = {
        "--num-devices": num_devices,
        "--num-images": num_images,
        "--num-prompts": num_prompts,
        "--prompt-tokens": prompt_tokens,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    if num_devices > MAX_DEVICES:
        raise ValueError(f"--num-devices must be at most {MAX_DEVICES}, got {num_devices}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation is a share of the peak speed, above 0 and at most 1, got {utilisation}.")


def plan_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's arguments, checked on a machine without the accelerator that the recipe is for.

    Raises:
        `ValueError`: if a value is invalid, or its costs are not known.
    """
    for name in ("deepspeed", "fsdp"):
        if recipe.training.get(name):
            raise ValueError(f"training: {name}: its costs are not known here; plan with --fsdp instead.")
    if (recipe.training.get("accelerator_config") or {}).get("split_batches"):
        raise ValueError("training: accelerator_config: split_batches: its costs are not known here; leave it out.")
    kwargs = {
        name: value
        for part in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
        for name, value in (recipe.training.get(part) or {}).items()
    }
    unknown = sorted(set(kwargs) - {"use_reentrant"})
    if unknown:
        raise ValueError(f"training: activation_checkpointing_kwargs: the costs of {unknown} are not known here.")
    # This machine may have no accelerator.
    hardware = {"tf32", "use_cpu", "torch_compile", "fp16"}
    training = {name: value for name, value in recipe.training.items() if name not in hardware}
    checked = recipe.model_copy(update={"training": {**training, "use_cpu": True}})
    arguments = training_arguments(checked, Path("checkpoints"))
    arguments.fp16 = bool(recipe.training.get("fp16"))
    # Raises if the optimizer is not known.
    optimizer_bytes(getattr(arguments.optim, "value", str(arguments.optim)), [], 4)
    return arguments


def build_models(
    recipe: Recipe,
    backbone_config: str | Path | None = None,
    autoencoder_config: str | Path | None = None,
    device: str = "meta",
) -> tuple[LatteFlowForConditionalGeneration, Any]:
    """The model that the recipe trains, its adapter included, and the autoencoder, both with new weights.

    Args:
        recipe ([`Recipe`]): the recipe.
        backbone_config, autoencoder_config (`str` or `Path`, *optional*): see [`make_plan`].
        device (`str`, defaults to `"meta"`): where the weights are; on the meta device they have no values.

    Raises:
        `ValueError`: if the recipe does not fit the model.
        `OSError`: if a configuration is not found.
    """
    config, vae_config = read_configs(recipe.model, backbone_config, autoencoder_config)
    dtype = getattr(torch, recipe.model.dtype)
    with torch.device(device):
        vae = getattr(diffusers, vae_config["_class_name"]).from_config(vae_config).eval()
        if config.latent_channels != vae.config.latent_channels:
            raise ValueError(
                f"model: the experts have {config.latent_channels} latent channels, the autoencoder "
                f"{vae.config.latent_channels}."
            )
        model = LatteFlowForConditionalGeneration(config).to(dtype)
        if recipe.lora is None:
            set_trainable(model, recipe.trainable)
        else:
            from peft import get_peft_model

            if recipe.lora.get("use_dora"):
                raise ValueError("lora: use_dora: its costs are not known here; plan without it.")
            arguments = {name: value for name, value in recipe.lora.items() if name != "weights"}
            get_peft_model(model, expert_lora_config(model, **arguments))
            others = [
                name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name
            ]
            if others:
                raise ValueError(f"lora: the costs of {others[0]} are not known here; plan without it.")
    return model, vae


def read_configs(
    settings: ModelSettings, backbone_config: str | Path | None = None, autoencoder_config: str | Path | None = None
) -> tuple[LatteFlowConfig, dict[str, Any]]:
    """The configurations of the model and of the autoencoder. Of the paper's backbone and autoencoder they are part of
    this package; others are read from a folder or from the hub.

    Raises:
        `ValueError`: if one is not that of a vision-language model, or of an autoencoder of diffusers.
        `OSError`: if one is not found.
    """
    if settings.pipeline is not None:
        if backbone_config is not None or autoencoder_config is not None:
            raise ValueError(
                "--backbone-config and --autoencoder-config are for a recipe with `backbone` and `autoencoder`; this "
                "one continues a pipeline, which has its own."
            )
        folder = str(tiny_checkpoint()) if settings.pipeline == "tinyworld" else settings.pipeline
        config = LatteFlowConfig.from_pretrained(folder, subfolder="model")
        return config, _read_autoencoder_config(folder, subfolder="vae")
    name = str(settings.autoencoder)
    if autoencoder_config is not None:
        _check_exists("--autoencoder-config", autoencoder_config)
        vae_config = _read_autoencoder_config(str(autoencoder_config))
    elif not Path(name).is_dir() and name in AUTOENCODERS:
        vae_config = AUTOENCODERS[name]
    else:
        vae_config = _read_autoencoder_config(name)
    experts = {"latent_channels": vae_config.get("latent_channels"), **settings.experts}
    experts.pop("copy_layers", None)
    if experts["latent_channels"] is None:
        del experts["latent_channels"]
    vlm_config = _read_backbone_config(str(settings.backbone), backbone_config)
    return LatteFlowConfig(vlm_config=vlm_config, **experts), vae_config


def _read_backbone_config(name: str, given: str | Path | None) -> PreTrainedConfig:
    if given is not None:
        _check_exists("--backbone-config", given)
        return read_vlm_config(str(given))
    if not Path(name).is_dir() and name in BACKBONES:
        content = dict(BACKBONES[name])
        return AutoConfig.for_model(content.pop("model_type"), **content)
    try:
        return read_vlm_config(name)
    except OSError as error:
        raise OSError(
            f"the configuration of the backbone {name} is not here and cannot be fetched: give --backbone-config, a "
            f"folder with its config.json. Without it these are known: {sorted(BACKBONES)}."
        ) from error


def _check_exists(option: str, path: str | Path) -> None:
    if not Path(path).exists():
        raise ValueError(f"{option} must be a folder with config.json, or that file, but {path} does not exist.")


def _read_autoencoder_config(source: str, **kwargs: Any) -> dict[str, Any]:
    path = Path(source)
    try:
        config = read_json(path) if path.is_file() else dict(AutoModel.load_config(source, **kwargs))
    except OSError as error:
        raise OSError(
            f"the configuration of the autoencoder {source} is not here and cannot be fetched: give "
            f"--autoencoder-config, a folder with its config.json. Without it these are known: {sorted(AUTOENCODERS)}."
        ) from error
    if not hasattr(diffusers, config.get("_class_name", "")):
        raise ValueError(f"{source} is not the configuration of an autoencoder of diffusers: it names no such class.")
    return config


def model_shape(
    model: LatteFlowForConditionalGeneration, vae: torch.nn.Module, attn_implementation: str | None = None
) -> ModelShape:
    """The shapes of a model that is prepared for training, and of its autoencoder. The attention implementation is
    that of the model, if none is given: this machine may not have the one that the recipe names."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    tower = tower_shape(model)
    if attn_implementation == "eager":
        tower = replace(tower, is_fused=False)
    return ModelShape(
        tower=tower,
        decoder=decoder_shape(model.vlm),
        experts=tuple(model.training_experts),
        num_backbone=_num_weights(model.vlm),
        num_autoencoder=_num_weights(vae),
        num_tower=_num_weights(model.tower),
        trained=tuple(tuple(weight.shape) for _, weight in trained),
        num_trained=sum(weight.numel() for _, weight in trained),
        num_trained_tower=sum(weight.numel() for name, weight in trained if "tower." in name),
        num_largest_layer=max(_num_weights(layer) for layer in model.tower.layers),
        width=model.dtype.itemsize,
        trained_width=trained[0][1].element_size(),
    )


def _num_weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def busiest_device(shape: ModelShape, setup: Setup) -> tuple[Memory, list[int]]:
    """The memory of the device that needs most, and the images of each expert there."""
    splits = rows_of_devices(setup.batch_size, len(shape.experts), setup.num_devices)
    memory = {rows: device_memory(shape, setup, rows) for rows in sorted(splits)}
    rows = max(memory, key=lambda key: memory[key].peak)
    return memory[rows], list(rows)


def find_switches(shape: ModelShape, setup: Setup, available: float) -> tuple[list[Switch], list[Switch]]:
    """The switches that take less memory, each alone, and one after the other until the run fits."""

    def switch(setting: str, changed: Setup) -> Switch:
        peak = busiest_device(shape, changed)[0].peak
        return Switch(setting, peak, peak <= available)

    before = busiest_device(shape, setup)[0].peak
    alone = [switch(setting, changed) for setting, changed in without_memory(setup, shape)]
    together: list[Switch] = []
    current, peak = setup, before
    while peak > available:
        candidates = [(switch(*entry), entry[1]) for entry in without_memory(current, shape)]
        helpful = [(found, changed) for found, changed in candidates if found.peak < peak]
        if not helpful:
            break
        # The first that is enough, else the one that helps most.
        enough = [entry for entry in helpful if entry[0].fits]
        found, current = enough[0] if enough else min(helpful, key=lambda entry: entry[0].peak)
        together.append(found)
        peak = found.peak
    return [found for found in alone if found.peak < before], together


def step_flops(shape: ModelShape, setup: Setup, rows: Sequence[int], recipe: Recipe) -> Flops:
    """Operations of the tower for one pass on one device."""
    evaluations = 0 if recipe.folded_guidance_scale is None else 1
    flops = Flops()
    for expert, num_images in zip(shape.experts, rows):
        examples = Examples(num_images, setup.num_tokens, setup.num_context)
        flops += expert_flops(shape.tower, expert, examples, setup.is_checkpointing, evaluations)
    return flops


def prompt_flops_of_step(
    model: LatteFlowForConditionalGeneration, shape: ModelShape, setup: Setup, rows: Sequence[int], recipe: Recipe
) -> int:
    """Operations of the prompts that a pass on one device encodes inside of the step: those of each expert, through
    the layers that it reads and no further."""
    total = 0
    for expert, num_prompts in zip(shape.experts, rows):
        num_layers = model.config.context_layers(expert)[-1] + 1
        total += prefill_flops(shape.decoder, num_prompts, setup.num_context, num_layers)
        if recipe.folded_guidance_scale is not None:
            num_layers = model.config.expert_layers(expert).stop
            total += prefill_flops(shape.decoder, 1, setup.num_context, num_layers)
    return total


def encode_flops(vae: Any, size: int) -> int:
    """Operations of encoding one image, counted on the meta device: autoencoders are of many classes."""
    image = torch.zeros(1, 3, size, size, device="meta", dtype=next(vae.parameters()).dtype)
    return count_flops(lambda: vae.encode(image))


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> int:
    """Operations of `run()`, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def trajectory_costs(
    recipe: Recipe, shape: ModelShape, setup: Setup, num_images: int | None, num_latents: int
) -> tuple[int, int]:
    """Operations and bytes of the trajectories of a teacher.

    Raises:
        `ValueError`: if neither the recipe nor the caller tells how many there are.
    """
    settings = recipe.distillation
    assert settings is not None
    number = settings.num_trajectories or num_images
    if number is None:
        raise ValueError(
            "distillation: the number of trajectories is not known: give `num_trajectories`, or --num-images."
        )
    scales = settings.guidance_scale
    flops = 0
    for expert, num_steps in enumerate(settings.teacher_steps):
        # Heun evaluates twice in each step but the last one.
        evaluations = num_steps * (2 if settings.solver == "heun" else 1)
        evaluations -= settings.solver == "heun" and expert == len(settings.teacher_steps) - 1
        scale = scales[expert] if isinstance(scales, list) else scales
        branches = 2 if guides_any(scale, [expert]) else 1
        examples = Examples(1, setup.num_tokens, setup.num_context)
        flops += evaluations * branches * expert_flops(shape.tower, expert, examples).forward
    # The start and the end of each step, in float32.
    num_states = 2 * sum(settings.student_steps)
    return number * flops, number * num_states * num_latents * 4


def checkpoint_bytes(recipe: Recipe, shape: ModelShape, setup: Setup) -> int:
    """Disk for the checkpoints of a run: those that are kept, and one more while it is written. Each has the weights,
    of an adapter alone or else the frozen ones too, the state of the optimizer and the averages."""
    num_weights = shape.num_trained if recipe.lora is not None else shape.num_backbone + shape.num_tower
    trained = shape.num_trained * shape.trained_width
    state = optimizer_bytes(setup.optimizer, shape.trained, shape.trained_width)
    number = int(recipe.training.get("save_total_limit") or 2) + 1
    return number * (num_weights * shape.width + state + trained * setup.has_ema)


def _where_contexts_are(recipe: Recipe) -> str:
    """See [`memory.Setup`]."""
    if recipe.trains_backbone:
        return "step"
    has_cache = recipe.data.cache is not None or recipe.distillation is not None
    return "cache" if has_cache and recipe.data.cache_contexts else "memory"


def _peaks(device: Device, recipe: Recipe, arguments: TrainingArguments) -> dict[str, float]:
    """The peak speed by part: of training, and of what is computed outside of mixed precision."""
    is_half = recipe.model.dtype in ("bfloat16", "float16")
    tf32 = recipe.training.get("tf32")
    if tf32 is None:
        tf32 = bool(recipe.training.get("torch_compile")) and not arguments.fp16
    full = device.tf32 if tf32 else device.float32
    alone = device.bfloat16 if is_half else full
    is_mixed = arguments.bf16 or arguments.fp16
    # torch lets convolutions, of which autoencoders consist, use TF32 unless it is forbidden.
    convolutions = device.bfloat16 if is_half else device.tf32
    return {"training": device.bfloat16 if is_mixed else alone, "latents": convolutions, "contexts": alone}


def _num_steps(arguments: TrainingArguments, num_images: int | None, setup: Setup) -> int:
    if arguments.max_steps > 0:
        return arguments.max_steps
    if num_images is None:
        raise ValueError(
            "training: the number of steps depends on the number of images: give --num-images, or `max_steps`."
        )
    batches = math.ceil(num_images / (setup.batch_size * setup.num_devices))
    return math.ceil(arguments.num_train_epochs * math.ceil(batches / setup.accumulation))


def _not_counted(recipe: Recipe) -> list[str]:
    """What a run does and no formula counts."""
    notes = [
        "launching operations, reading and decoding images, exchanging gradients between devices, logging and saving "
        "are not counted."
    ]
    if recipe.samples is not None:
        notes.append("images of `samples` are not counted.")
    if recipe.validation is not None:
        notes.append("`validation`, its cache included, is not counted.")
    if recipe.understanding is not None:
        notes.append("conversations of `understanding` are not counted: operations and memory are a lower bound.")
    if recipe.lora is not None and recipe.lora.get("lora_dropout"):
        notes.append("the masks of `lora_dropout` are not counted.")
    if recipe.training.get("torch_compile"):
        notes.append("activations are those without `torch_compile`, which needs less.")
    return notes
