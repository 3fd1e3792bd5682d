# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Off-loading that `DiffusionPipeline` does not have: one expert at a time. And what group off-loading needs."""

from typing import Any

import torch
from diffusers.utils.torch_utils import get_device
from torch.distributed.tensor import DTensor

from ..modeling.expert_offload import ExpertOffload
from ..modeling.module_walk import all_modules


class LatteFlowOffloadingMixin:
    """Expert off-loading and group off-loading for the pipeline; it stands before `DiffusionPipeline`."""

    model: Any
    vae: Any
    to: Any

    @property
    def _execution_device(self) -> torch.device:
        """Same as `DiffusionPipeline._execution_device`, which searches all modules of each component for hooks."""
        components = [component for component in (self.model, self.vae) if component is not None]
        if self.model is None or any(has_forward_hooks(component) for component in components):
            return super()._execution_device  # type: ignore[misc]
        return self.model.device

    @property
    def expert_offload(self) -> ExpertOffload | None:
        """The hooks on the model's tower, if expert off-loading is enabled."""
        return getattr(self.model.tower, "expert_offload", None)

    def enable_expert_offload(self, device: torch.device | str | None = None) -> None:
        """Keep one expert of the tower on the accelerator and the others on the CPU.

        During the last step of an expert the layers of the next one are fetched one by one: an image takes one
        transfer of each expert, and at most 1 / K of the tower's weights are on the accelerator. Everything else is
        moved to `device` and stays there.

        Args:
            device (`torch.device` or `str`, *optional*): where to run; defaults to the accelerator if there is one.

        Raises:
            `ValueError`: if another kind of off-loading is enabled.
        """
        if has_forward_hooks(self.model, casting=False):
            raise ValueError("another off-loading moves the same weights; load the pipeline again without it.")
        device = torch.device(get_device() if device is None else device)
        self.disable_expert_offload()
        tower, layers = self.model.tower, self.model.tower.layers.to("cpu")
        experts = [self.model.expert_layers(expert) for expert in range(self.model.config.num_experts)]
        # `to` must move everything but the layers.
        tower.layers = torch.nn.ModuleList()
        self.to(device)
        tower.layers = layers
        tower.expert_offload = ExpertOffload(layers, experts, device)

    def disable_expert_offload(self) -> None:
        """Move all experts to the device of the rest of the model."""
        if self.expert_offload is not None:
            self.expert_offload.remove()
            self.model.tower.expert_offload = None
            self.model.tower.layers.to(self.model.device)

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        **kwargs: Any,
    ) -> None:
        """Same as `DiffusionPipeline.enable_group_offload`, with two additions because only `forward` is hooked: the
        VAE's blocks are set explicitly, since the pipeline calls `vae.decode`, and the backbone is also fetched for
        its image encoder, since `generate` encodes images before it calls the backbone's `forward`.

        Raises:
            `ValueError`: for `offload_to_disk_path` with `"leaf_level"` if the language head is tied to the
                embedding: diffusers would release the weights of both before it writes the second one.
        """
        is_tied = self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight
        if offload_type == "leaf_level" and kwargs.get("offload_to_disk_path") is not None and is_tied:
            raise ValueError(
                "offload_type 'leaf_level' cannot go to disk: the language head is tied to the embedding, and its "
                "weights would be lost. Use 'block_level', or no `offload_to_disk_path`, instead."
            )
        if self.vae is not None and getattr(self.vae, "_group_offload_block_modules", None) is None:
            self.vae._group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv"]
        super().enable_group_offload(onload_device, offload_device, offload_type, **kwargs)  # type: ignore[misc]
        vlm = self.model.vlm
        hook = vlm._diffusers_hook.get_hook("group_offloading") if hasattr(vlm, "_diffusers_hook") else None
        if hook is not None:

            def fetch_backbone(*_: Any) -> None:
                hook.pre_forward(vlm)

            vlm.get_encoder(modality="image").register_forward_pre_hook(fetch_backbone)


def has_forward_hooks(model: torch.nn.Module, casting: bool = True) -> bool:
    """Whether accelerate or diffusers hooked the `forward` of any module, to move weights or inputs; with
    `casting=False`, without the hooks of layerwise casting."""
    return any(
        _has_hook(module) and (casting or "_hf_hook" in module.__dict__ or _hook_names(module) - _CASTING_HOOKS)
        for module in all_modules(model)
    )


_CASTING_HOOKS = {"layerwise_casting", "peft_autocast_disable"}


def _hook_names(module: torch.nn.Module) -> set[str]:
    return set(module._diffusers_hook.hooks)


def _has_hook(module: torch.nn.Module) -> bool:
    # Hooks of diffusers that were removed leave an empty registry.
    return "_hf_hook" in module.__dict__ or ("_diffusers_hook" in module.__dict__ and bool(_hook_names(module)))


def runs_only_in_forward(tower: torch.nn.Module) -> bool:
    """Whether the weights of the tower's layers may be used in the layers' `forward` only.

    This is so with hooks on `forward`, which bring weights or inputs to the right device (group off-loading,
    sequential off-loading, a device map over several devices), and with FSDP, which gathers the sharded parameters of
    a layer when the layer is called. Nothing can then be computed ahead for all steps of an expert.
    """
    modulations = [layer.modulation for layer in tower.layers]
    # Only the modules that `modulate` uses: to walk over all of them takes longer than a step of a small model.
    hooked = any(_has_hook(module) for module in (tower, *tower.layers, *modulations))
    return hooked or any(isinstance(modulation.weight, DTensor) for modulation in modulations)


def uses_shared_state(module: torch.nn.Module) -> bool:
    """Whether a call of `module` moves or changes its weights, so that two threads cannot call it at once.

    This is so with expert off-loading, with hooks on `forward` (off-loading, layerwise casting), and with FSDP.
    """
    tower = getattr(module, "tower", module)
    if getattr(tower, "expert_offload", None) is not None:
        return True
    submodules = all_modules(module)
    if any(_has_hook(submodule) for submodule in submodules):
        return True
    # Of thousands of weights there are two or three types.
    types = {type(weight) for submodule in submodules for weight in submodule._parameters.values()}
    return any(issubclass(weight_type, DTensor) for weight_type in types)


def check_hooks(model: torch.nn.Module) -> None:
    """
    Raises:
        `ValueError`: if the model has a hook of diffusers that keeps outputs between steps, such as those of
            TaylorSeer and FasterCache. They cannot store the outputs of the tower's layers, or are never called.
    """
    hooks = {
        name
        for module in all_modules(model)
        if "_diffusers_hook" in module.__dict__
        for name, hook in module._diffusers_hook.hooks.items()
        if hook._is_stateful
    }
    if hooks:
        raise ValueError(
            f"model has the hooks {sorted(hooks)}, but caches of diffusers are not supported; remove them by "
            "`HookRegistry.remove_hook`, and use fewer steps or `guidance_interval` instead."
        )
