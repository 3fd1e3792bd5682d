# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoint: a small model of the tiny world, made with `recipes/tinyworld/build.py`."""

from pathlib import Path
from typing import Any

from ..files import check_hash, read_json


def tiny_checkpoint() -> str:
    """The folder of the embedded checkpoint, for `LatteFlowPipeline.from_pretrained`."""
    return str(Path(__file__).parent / "tinyworld")


def few_step_checkpoint() -> str:
    """The folder of the adapter with which the embedded checkpoint takes 4 evaluations per image, without guidance.

    Raises:
        `OSError`: if this installation does not have it.
    """
    folder = Path(__file__).parent / "tinyworld_few_steps"
    if not (folder / "adapter_config.json").is_file():
        raise OSError(
            f"the few-step adapter of the embedded checkpoint is not in {folder}. It is made by `latte-flow distill` "
            "with recipes/tinyworld/distill_lora.yaml and distill_lora_again.yaml; load yours by --lora, or generate "
            "with all steps."
        )
    return str(folder)


def inspect_checkpoint(checkpoint: str) -> dict[str, Any]:
    """The experts, intervals, layers and sizes of a checkpoint, without loading its weights.

    Args:
        checkpoint (`str`): folder or hub id of a pipeline, or of its model alone.

    Returns:
        `dict`: `checkpoint`, `backbone`, `backbone_parameters`, `tower_parameters`, `shared_parameters`,
        `num_experts`, `layers` (in words), `residual_attention`, `latent_channels`, `latent_patch_size`, `sampling`
        (in words), and `experts`, a list of dicts with `start` and `end` (sigmas), `first_layer`, `last_layer` and
        `parameters`.

    Raises:
        `ValueError`: if it holds another model.
        `OSError`: if there is no such checkpoint.
    """
    import torch
    from transformers import AutoConfig
    from transformers.utils import cached_file

    from ..files import check_files
    from ..modeling.configuration_latte_flow import LatteFlowConfig
    from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
    from ..modeling.sampling import describe_sampling

    if (Path(checkpoint) / "model_index.json").exists():
        check_files(checkpoint, "model_index.json")
        check_files(Path(checkpoint) / "model", "config.json")
    is_pipeline = cached_file(checkpoint, "model_index.json", _raise_exceptions_for_missing_entries=False) is not None
    config = AutoConfig.from_pretrained(checkpoint, subfolder="model" if is_pipeline else "")
    if not isinstance(config, LatteFlowConfig):
        raise ValueError(f"{checkpoint} holds a {config.model_type!r} model, not a 'latte_flow' one.")
    with torch.device("meta"):
        model = LatteFlowForConditionalGeneration(config)

    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    tower, boundaries = model.tower, config.expert_boundaries
    solver = None
    if is_pipeline:
        scheduler = read_json(str(cached_file(checkpoint, "scheduler_config.json", subfolder="scheduler")))
        solver = scheduler.get("solver", scheduler.get("_class_name"))
    return {
        "checkpoint": checkpoint,
        "backbone": config.vlm_config.model_type,
        "backbone_parameters": count(model.vlm),
        "tower_parameters": count(tower),
        "shared_parameters": count(tower) - count(*tower.layers),
        "num_experts": config.num_experts,
        "layers": config.describe_layers(),
        "residual_attention": config.residual_attention,
        "latent_channels": config.latent_channels,
        "latent_patch_size": config.latent_patch_size,
        "sampling": describe_sampling(config.sampling, solver),
        "experts": [
            {
                "start": boundaries[expert],
                "end": boundaries[expert + 1],
                "first_layer": tower.expert_layers(expert)[0],
                "last_layer": tower.expert_layers(expert)[-1],
                "parameters": count(*(tower.layers[index] for index in tower.expert_layers(expert))),
            }
            for expert in range(config.num_experts)
        ],
    }


def describe(found: dict[str, Any]) -> list[str]:
    """What [`inspect_checkpoint`] found, as the lines that `latte-flow info` prints."""

    def millions(name: str) -> str:
        return f"{found[name] / 1e6:.2f} M"

    return [
        f"checkpoint  {found['checkpoint']}",
        f"backbone    {found['backbone']}, {millions('backbone_parameters')} parameters, frozen",
        f"tower       {millions('tower_parameters')} parameters: {found['num_experts']} experts of {found['layers']}, "
        f"{millions('shared_parameters')} shared; residual attention: {found['residual_attention']}",
        f"latents     {found['latent_channels']} channels, {found['latent_patch_size'] ** 2} latent pixel(s) per "
        "token",
        f"sampling    {found['sampling']}",
        *(
            f"expert {index}    sigma {expert['start']:.3g} to {expert['end']:.3g}, "
            f"layers {expert['first_layer']} to {expert['last_layer']}, {expert['parameters'] / 1e6:.2f} M parameters"
            for index, expert in enumerate(found["experts"])
        ),
    ]


def verify(checkpoint: str) -> list[str]:
    """Check the weights of a checkpoint against the hashes stored in them.

    The embedded checkpoint, and those that were written by `latte-flow train` and `latte-flow convert` or uploaded by
    `latte-flow publish`, have hashes; `save_pretrained` alone stores none.

    Args:
        checkpoint (`str`): folder or hub id of a pipeline, folder of a component or an adapter, or a safetensors file.

    Returns:
        `list[str]`: one line for each file, which `latte-flow info --verify` prints.

    Raises:
        `OSError`: if a file is damaged or has no stored hash, or there are no weights.
    """
    path = Path(checkpoint)
    if not path.exists():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(checkpoint, allow_patterns="*.safetensors"))
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise OSError(f"{checkpoint} has no safetensors files, so that there is nothing to verify.")
    unknown = [file.name for file in files if not check_hash(file)]
    if unknown:
        raise OSError(
            f"{checkpoint} cannot be verified: {', '.join(unknown)} was saved without a hash. `latte-flow convert`, "
            "`train` and `publish` store hashes."
        )
    return [f"verified    {file.relative_to(path) if path.is_dir() else file.name}" for file in files]
