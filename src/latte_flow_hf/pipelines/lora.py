# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The adapter methods of diffusers pipelines: `load_lora_weights`, `set_adapters`, `fuse_lora` and others.

Those of diffusers are for models of diffusers, or for text encoders with LoRA. The adapted component here is a
transformers model, and an adapter may be of any PEFT method and adapt some experts only, so they call the model's
methods ([`LatteFlowAdapterMixin`]). Apart from loading, nothing here needs PEFT.
"""

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors.torch import save_file

from ..files import atomic_write
from ..modeling.adapters import adapter_modules, require_peft
from ..schedulers.steps import distilled_scheduler
from .calls import alone


class LatteFlowLoraMixin(LoraBaseMixin):
    """Adapter methods for the pipeline's model; it stands before `DiffusionPipeline`."""

    model: Any
    scheduler: Any
    _lora_loadable_modules = ["model"]

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        weight_name: str | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Load an adapter and make it the active one. Use [`~LatteFlowLoraMixin.set_adapters`] to activate several.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A PEFT folder (`adapter_config.json`, `adapter_model.safetensors`), a hub id, a single file, or a state
                dict. Keys in the layouts of diffusers and of kohya's scripts are converted.
            adapter_name (`str`, *optional*): its name; defaults to `default_0`, `default_1`, ...
            hotswap (`bool`, defaults to `False`):
                Replace the loaded adapter of that name, which may have another rank, scale or other layers; its weight
                becomes 1. On failure, the old adapter stays.
            weight_name (`str`, *optional*): the weights file in the folder or the hub repository.
            peft_config (`PeftConfig` or `dict`, *optional*):
                The configuration. Defaults to `adapter_config.json` beside the weights, then to what diffusers stores
                in the file, then to LoRA with ranks from the shapes and `alpha` from the weights.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`,
                same as in `from_pretrained`.

        Raises:
            `ValueError`: if the adapter was made for another model, is of a method that is not supported, has missing
                or unexpected weights, or the name is taken.
            `OSError`: if there is no adapter, or a truncated one.
        """
        require_peft("load_lora_weights")
        source = pretrained_model_name_or_path_or_dict
        loaded = self._adapters()
        if adapter_name is None:
            adapter_name = next(name for i in range(len(loaded) + 1) if (name := f"default_{i}") not in loaded)
        is_dict = isinstance(source, Mapping)
        self.model.load_adapter(
            None if is_dict else os.fspath(source),  # type: ignore[arg-type]
            adapter_name=adapter_name,
            peft_config=peft_config,
            adapter_state_dict=source if is_dict else None,
            hotswap=hotswap,
            weight_name=weight_name,
            adapter_kwargs=kwargs,
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
        with atomic_write(Path(save_directory, "adapter_model.safetensors")) as partial:
            # The prefix of the names in a saved `PeftModel`.
            weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
            save_file(weights, partial, metadata={"format": "pt"})
        with atomic_write(Path(save_directory, "adapter_config.json")) as partial:
            config.save_pretrained(partial.parent)

    def set_adapters(
        self,
        adapter_names: list[str] | str,
        adapter_weights: Any = None,
    ) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names (`str` or `list[str]`): their names.
            adapter_weights (`float`, `list`, array or `dict`, *optional*):
                With a list of names, one weight for all, or a list of one for each; with one name, its weight. A
                weight multiplies the adapter's effect and is a number, or a list of one number for each expert, e.g.
                `set_adapters("style", [0.0, 0.5, 1.0, 1.0])`. Defaults to 1. With 0, an adapter is not run.

        Raises:
            `ValueError`: if an adapter is not loaded, its weight is neither a finite number nor one for each expert,
                or it is of a method that knows no weights, see [`modeling.adapters.SCALABLE_METHODS`].
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if isinstance(adapter_weights, (np.ndarray, torch.Tensor)):
            adapter_weights = adapter_weights.tolist()
        if adapter_weights is None or isinstance(adapter_weights, (Real, Mapping)):
            weights = [adapter_weights] * len(names)
        elif isinstance(adapter_names, str) and len(adapter_weights) != 1:
            weights = [adapter_weights]  # one for each expert
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names) or len(set(names)) != len(names):
            raise ValueError(
                f"adapter_weights must be one for each of the adapters {names}, which are named once each, got "
                f"{adapter_weights!r}."
            )
        # diffusers also takes the weights of each component.
        weights = [
            weight["model"] if isinstance(weight, dict) and [*weight] == ["model"] else weight for weight in weights
        ]
        self.model.set_adapter_weights(
            {name: 1.0 if weight is None else weight for name, weight in zip(names, weights)}
        )

    def get_active_adapters(self) -> list[str]:
        """The adapters that are run with a weight other than 0."""
        return self.model.active_adapters()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The loaded adapters, as `{"model": [...]}`; empty if there are none."""
        return {"model": self._adapters()} if self._adapters() else {}

    def disable_lora(self) -> None:
        """Run the model without adapters.

        Raises:
            `ValueError`: if they are fused.
        """
        self.model.disable_adapters()

    def enable_lora(self) -> None:
        """Run the active adapters again after `disable_lora`."""
        self.model.enable_adapters()

    def fuse_lora(
        self,
        components: Sequence[str] = ("model",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | str | None = None,
    ) -> None:
        """Add adapters to the weights that they adapt. Afterwards, `unload_lora_weights` leaves a plain model.

        As long as they are neither unfused nor unloaded, no adapter can be loaded, activated or deleted.

        Args:
            components (`list[str]`): `["model"]`.
            lora_scale (`float`, defaults to 1.0): multiplies the weights of `set_adapters`.
            safe_fusing (`bool`, defaults to `False`): whether to refuse weights that became NaN.
            adapter_names (`list[str]`, *optional*): the adapters, which become the active ones; defaults to those.

        Raises:
            `ValueError`: if there is nothing to fuse, or an adapter cannot be fused.
        """
        require_peft("fuse_lora")
        _check_components(components)
        if adapter_names is not None:
            self.model.set_adapter(adapter_names)
        self.model.fuse_adapters(lora_scale, safe_fusing)

    def unfuse_lora(self, components: Sequence[str] = ("model",)) -> None:
        """Subtract what `fuse_lora` added; the weights are restored up to rounding, and the adapters active."""
        require_peft("unfuse_lora")
        _check_components(components)
        self.model.unfuse_adapters()

    @property
    def fused_loras(self) -> set[str]:
        """The adapters in the weights of the model: those that are fused, and those that were when unloaded."""
        return self._merged_adapters | set(self.model.fused_adapters)

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters; other active adapters stay active.

        Raises:
            `ValueError`: if one of them is not loaded, or adapters are fused.
        """
        self.model.delete_adapter(adapter_names)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Those that are fused stay in the weights of the model."""
        self._merged_adapters = self.fused_loras
        before = self.model.config.sampling
        self.model.unload_adapters()
        sampling = self.model.config.sampling or {}
        if sampling != (before or {}):
            # The weights are now those of a model distilled to few steps.
            self.scheduler = distilled_scheduler(self.scheduler, sampling, self.model.config)

    def set_lora_device(self, adapter_names: list[str], device: torch.device | str | int) -> None:
        """Refused: adapters are as small as an expert's modulation, and an adapter elsewhere could not be run."""
        raise ValueError("set_lora_device is not supported; use delete_adapters to free the memory of an adapter.")

    def enable_lora_hotswap(self, **kwargs: Any) -> None:
        """Not needed: `load_lora_weights(..., hotswap=True)` takes adapters of every rank. Compiled layers are
        compiled again."""

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

    @contextlib.contextmanager
    def _scaled_adapters(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Multiply the weights of the active adapters by `attention_kwargs["scale"]` for a while.

        Raises:
            `ValueError`: if there is anything else in it, the scale is no finite number, no adapter is active, or
                another thread uses the model, which would use the scaled weights.
        """
        if attention_kwargs is not None and not (
            isinstance(attention_kwargs, Mapping) and {*attention_kwargs} <= {"scale"}
        ):
            raise ValueError(f"attention_kwargs must be a dict with at most 'scale', got {attention_kwargs!r}.")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"attention_kwargs['scale'] must be a finite number, got {scale!r}.")
        if scale == 1:
            yield
            return
        weights = self.model.adapter_weights if self._adapters() else {}
        if not weights or any(module.disable_adapters for _, module in adapter_modules(self.model)):
            raise ValueError(
                f"attention_kwargs['scale'] is {scale}, but no adapter is active; load, activate or enable one."
            )
        with alone(self.model):
            self.model.set_adapter_weights({name: [scale * w for w in values] for name, values in weights.items()})
            try:
                yield
            finally:
                # A callback may have deleted an adapter.
                loaded = self._adapters()
                self.model.set_adapter_weights({name: w for name, w in weights.items() if name in loaded})

    def _adapters(self) -> list[str]:
        return list(getattr(self.model, "peft_config", None) or {})


def parse_lora(lora: str) -> tuple[str, float | None]:
    """Split `"outputs/style:0.8"` into the path and the weight; `None` if there is no weight."""
    if not Path(lora).exists():
        path, _, weight = lora.rpartition(":")
        with contextlib.suppress(ValueError):  # A colon may be part of the path.
            return path or lora, float(weight)
    return lora, None


def load_loras(pipe: Any, loras: Sequence[str]) -> dict[str, str]:
    """Load adapters and activate all of them.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        loras (`list[str]`): of each the folder, file or hub id, and after a colon its weight (1 if left out), e.g.
            `"outputs/style:0.8"`.

    Returns:
        `dict[str, str]`: by the names of the loaded adapters, their folders, files or hub ids.

    Raises:
        `ValueError`, `OSError`: same as `load_lora_weights` and `set_adapters`.
    """
    weights = []
    paths = {}
    for lora in loras:
        path, weight = parse_lora(lora)
        pipe.load_lora_weights(path)
        paths[pipe._adapters()[-1]] = path
        weights.append(1.0 if weight is None else weight)
    pipe.set_adapters([*paths], weights)
    return paths


def _check_components(components: Sequence[str]) -> None:
    if list(components) != ["model"]:
        raise ValueError(f"components must be ['model'], got {list(components)}.")
