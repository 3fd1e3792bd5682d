# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The adapter methods of diffusers pipelines: `load_lora_weights`, `set_adapters`, `fuse_lora` and others.

The adapted component is a transformers model and an adapter is a PEFT folder, so PEFT loads and saves it; the rest is
the mixin of diffusers. An adapter may adapt some experts only: a layer may then have adapters that another has not.
"""

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors.torch import save_file

from ..files import check_files


class LatteFlowLoraMixin(LoraBaseMixin):
    """Adapter methods for the pipeline's model; it stands before `DiffusionPipeline`."""

    model: Any
    _lora_loadable_modules = ["model"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter and make it the active one. Use [`~LatteFlowLoraMixin.set_adapters`] to activate several.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a PEFT folder (`adapter_config.json`,
                `adapter_model.safetensors`), or the hub id of one.
            adapter_name (`str`, *optional*): its name; defaults to `default_0`, `default_1`, ...
            hotswap (`bool`, defaults to `False`): replace the loaded adapter of that name.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, same as in `from_pretrained`.

        Raises:
            `ValueError`: if the adapter was made for another model, or the name is taken.
            `OSError`: if a local folder contains no adapter, or a truncated one.
        """
        if isinstance(pretrained_model_name_or_path, dict):
            raise ValueError("pretrained_model_name_or_path must be a PEFT folder or a hub id, got a state dict.")
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if Path(pretrained_model_name_or_path).is_dir():
            check_files(folder, "adapter_config.json", "adapter_model.safetensors|adapter_model.bin")
        loaded = self._adapters()
        if adapter_name is None:
            adapter_name = next(name for i in range(len(loaded) + 1) if (name := f"default_{i}") not in loaded)
        elif adapter_name in loaded and not hotswap:
            raise ValueError(f"adapter_name {adapter_name!r} is taken; use another name than those of {loaded}.")
        self.model.load_adapter(
            str(pretrained_model_name_or_path), adapter_name=adapter_name, hotswap=hotswap, adapter_kwargs=kwargs
        )

    def save_lora_weights(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Save one adapter as a PEFT folder, which PEFT, transformers and `load_lora_weights` can load.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; files of an older adapter in it are replaced.
            adapter_name (`str`, *optional*): the adapter; may be left out if only one is active.

        Raises:
            `ValueError`: if there is no such adapter.
        """
        active, loaded = self.get_active_adapters(), self._adapters()
        if adapter_name is None and len(active) == 1:
            (adapter_name,) = active
        if adapter_name not in loaded:
            raise ValueError(f"adapter_name must be one of the loaded {loaded}, got {adapter_name!r}.")
        config = copy.copy(self.model.peft_config[adapter_name])
        config.inference_mode = True
        weights = self.model.get_adapter_state_dict(adapter_name)
        folder = Path(save_directory)
        partial = folder.with_name(folder.name + ".partial")
        config.save_pretrained(partial)
        save_file(
            # The prefix of the names in a saved `PeftModel`.
            {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
            partial / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        folder.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()

    def fuse_lora(
        self,
        components: Sequence[str] = ("model",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add adapters to the weights that they adapt. Afterwards, `unload_lora_weights` leaves a plain model.

        Args:
            components (`list[str]`): `["model"]`.
            lora_scale (`float`, defaults to 1.0): multiplies the weights of `set_adapters`.
            safe_fusing (`bool`, defaults to `False`): whether to refuse weights that became NaN.
            adapter_names (`list[str]`, *optional*): the adapters; defaults to the active ones.
        """
        super().fuse_lora(
            components=list(components),
            lora_scale=lora_scale,
            safe_fusing=safe_fusing,
            adapter_names=adapter_names,
            **kwargs,
        )

    def unfuse_lora(self, components: Sequence[str] = ("model",), **kwargs: Any) -> None:
        """Subtract what `fuse_lora` added; the weights are restored up to rounding."""
        super().unfuse_lora(components=list(components), **kwargs)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters; other active adapters stay active.

        Raises:
            `ValueError`: if one of them is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        loaded = self._adapters()
        if not set(names) <= set(loaded):
            raise ValueError(f"adapter_names must be among the loaded {loaded}, got {names}.")
        active = [name for name in self.get_active_adapters() if name not in names]
        if set(names) == set(loaded):
            # Also removes the PEFT layers around the plain ones, which would appear in a saved model.
            return self.unload_lora_weights()
        with warnings.catch_warnings():
            # PEFT warns for each layer that it activates another adapter; the active adapters are set below.
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            super().delete_adapters(names)
        # For all layers, because a layer without the deleted adapter still lists it as active.
        self.model.set_adapter(active)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Same as `DiffusionPipeline.save_pretrained`, but without loaded adapters.

        Raises:
            `ValueError`: if adapters are loaded: transformers would save the adapters instead of the model.
        """
        if self._adapters():
            raise ValueError(
                f"adapters {self._adapters()} are loaded. Use `fuse_lora` and then `unload_lora_weights` to make them "
                "part of the model, or `save_lora_weights` to save them on their own."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def _adapters(self) -> list[str]:
        return self.get_list_adapters().get("model", [])
