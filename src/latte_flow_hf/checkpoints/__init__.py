# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The embedded checkpoint: a small model of the tiny world, made with `recipes/tinyworld/build.py`."""

from pathlib import Path

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
            f"the few-step adapter of the embedded checkpoint is not in {folder}. It is made by `latte-flow distill "
            "recipes/tinyworld/distill_lora.yaml`; load yours by --lora, or generate with all steps."
        )
    return str(folder)


def describe(checkpoint: str) -> list[str]:
    """Describe the experts, intervals, layers and sizes of a checkpoint without loading its weights.

    Args:
        checkpoint (`str`): folder or hub id of a pipeline, or of its model alone.

    Returns:
        `list[str]`: the lines that `latte-flow info` prints.

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

    def millions(*modules: torch.nn.Module) -> float:
        return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6

    tower, boundaries = model.tower, config.expert_boundaries
    shared = millions(tower) - millions(*tower.layers)
    lines = [
        f"checkpoint  {checkpoint}",
        f"backbone    {config.vlm_config.model_type}, {millions(model.vlm):.2f} M parameters, frozen",
        f"tower       {millions(tower):.2f} M parameters: {config.num_experts} experts of "
        f"{config.describe_layers()}, {shared:.2f} M shared; residual attention: {config.residual_attention}",
        f"latents     {config.latent_channels} channels, {config.latent_patch_size**2} latent pixel(s) per token",
    ]
    solver = None
    if is_pipeline:
        scheduler = read_json(str(cached_file(checkpoint, "scheduler_config.json", subfolder="scheduler")))
        solver = scheduler.get("solver", scheduler.get("_class_name"))
    lines.append(f"sampling    {describe_sampling(config.sampling, solver)}")
    for expert in range(config.num_experts):
        layers = tower.expert_layers(expert)
        active = millions(*(tower.layers[index] for index in layers))
        lines.append(
            f"expert {expert}    sigma {boundaries[expert]:.3g} to {boundaries[expert + 1]:.3g}, "
            f"layers {layers[0]} to {layers[-1]}, {active:.2f} M parameters"
        )
    return lines


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
