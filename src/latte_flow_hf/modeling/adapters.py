# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters of the model: which model they were trained for, loading them, and how strongly each expert uses them.

Loading goes through PEFT and not through transformers' `load_adapter`, which reports the base weights as missing and
loads DoRA without its magnitudes.

`LoraConfig` has no field for the model that an adapter belongs to, so the regular expression in `target_modules`
starts with a comment, `(?#latte_flow num_experts=4 ...)`. It matches nothing, and every library keeps it in
`adapter_config.json`.
"""

import copy
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from transformers.utils import is_peft_available
from transformers.utils.loading_report import LoadStateDictInfo

from .adapter_files import DOWNLOAD_ARGUMENTS, SCALED_LAYOUTS, convert_adapter_keys, infer_lora_config, read_adapter
from .configuration_latte_flow import LatteFlowConfig
from .module_walk import all_modules
from .sampling import check_sampling


# PEFT is an extra. In `try`, or code that a checkpoint carries could not be loaded without it.
try:
    import peft
except ImportError:
    peft = None  # type: ignore[assignment]


_SAMPLING_MARK = re.compile(r"\(\?#latte_flow_sampling ([^)]*)\)")
_MARK = re.compile(r"\(\?#latte_flow ([^)]*)\)")
_TOWER_LAYER = re.compile(r"tower\.layers\.(\d+)\.")

# PEFT methods whose effect can be multiplied by a weight. Others can be used with weight 1, or not at all with 0.
SCALABLE_METHODS = ("LORA", "LOHA", "LOKR", "SHIRA")
# RandLora's matrices are shared by all layers, which its class does not say.
_METHODS_WITH_SHARED_WEIGHTS = ("RANDLORA",)
# Values of `init_lora_weights` that change the weights of the base model.
_INITS_OF_BASE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _architecture(config: LatteFlowConfig) -> dict[str, str]:
    """The values that an adapter and a model must have in common, by the names of the configuration."""
    text_config = config.text_config
    values = {
        "num_experts": str(config.num_experts),
        "num_hidden_layers": str(text_config.num_hidden_layers),
        "hidden_size": str(text_config.hidden_size),
    }
    # Only what is not the default, since adapters of earlier versions do not have these.
    if len(set(config.layers_per_expert)) > 1:
        values["layers_per_expert"] = "-".join(map(str, config.layers_per_expert))
    if len(config.tower_layers) < text_config.num_hidden_layers:
        values["tower_layers"] = "-".join(map(str, config.tower_layers))
    return values


def adapter_mark(config: LatteFlowConfig, experts: Sequence[int]) -> str:
    """The comment at the start of the `target_modules` of an adapter for `experts` of a model like this."""
    fields = {**_architecture(config), "experts": ",".join(map(str, experts))}
    return f"(?#latte_flow {' '.join(f'{name}={value}' for name, value in fields.items())})"


def read_adapter_mark(target_modules: Any) -> dict[str, str]:
    """The fields of the comment: `num_experts`, `num_hidden_layers`, `hidden_size`, `experts` (e.g. `"0,3"`), and, if
    the model has them, `layers_per_expert` (`"8-7-7-6"`) and `tower_layers` (`"0-2-4"`).

    `add_weighted_adapter` of PEFT joins the expressions of several adapters: their experts are then those of all of
    them. Empty if there is no comment, as in an adapter whose target modules were written by hand.
    """
    values: dict[str, set[str]] = {}
    for match in _MARK.finditer(target_modules if isinstance(target_modules, str) else ""):
        for field in match[1].split():
            name, value = field.split("=")
            values.setdefault(name, set()).update(value.split(","))
    return {
        name: ",".join(sorted(found, key=lambda value: [int(number) for number in value.split("-")]))
        for name, found in values.items()
    }


def sampling_mark(config: LatteFlowConfig, sampling: Mapping[str, Any]) -> str:
    """A comment like that of `adapter_mark`, for an adapter that changes how the model is sampled."""
    content = {**check_sampling(sampling, config.num_experts), "expert_boundaries": config.expert_boundaries}
    return f"(?#latte_flow_sampling {json.dumps(content)})"


def read_sampling_mark(target_modules: Any) -> dict[str, Any] | None:
    """What `sampling_mark` wrote, with the key `expert_boundaries`; `None` if there is no such comment."""
    match = _SAMPLING_MARK.search(target_modules if isinstance(target_modules, str) else "")
    return None if match is None else json.loads(match[1])


def remove_sampling_mark(target_modules: Any) -> Any:
    """`target_modules` without what `sampling_mark` wrote."""
    return _SAMPLING_MARK.sub("", target_modules) if isinstance(target_modules, str) else target_modules


def check_adapter(config: LatteFlowConfig, target_modules: Any, name: str) -> None:
    """Refuse an adapter of another model: its layers would be those of other experts, or of other sizes.

    Args:
        config ([`LatteFlowConfig`]): the configuration of the model.
        target_modules: `target_modules` of the adapter's configuration; accepted if it has no comment.
        name (`str`): name or folder of the adapter, for the error.

    Raises:
        `ValueError`: with what the adapter was trained for and what the model is.
    """
    mark, architecture = read_adapter_mark(target_modules), _architecture(config)
    trained_for = {key: value for key, value in mark.items() if key != "experts"}
    if mark and trained_for != architecture:

        def describe(values: dict) -> str:
            return ", ".join(f"{key}={value}" for key, value in values.items())

        raise ValueError(
            f"adapter {name!r} was trained for a model with {describe(trained_for)}; this model has "
            f"{describe(architecture)}."
        )
    sampling = read_sampling_mark(target_modules)
    if sampling is not None and sampling["expert_boundaries"] != config.expert_boundaries:
        raise ValueError(
            f"adapter {name!r} was distilled for a model with expert_boundaries {sampling['expert_boundaries']}; this "
            f"model has {config.expert_boundaries}, and its experts would start at other sigmas."
        )


def check_adapter_config(model: nn.Module, config: "peft.PeftConfig", name: str) -> None:
    """Refuse what would be loaded, but not be what was trained, or could not be removed again.

    Args:
        model ([`LatteFlowForConditionalGeneration`]): the model.
        config (`PeftConfig`): the configuration of the adapter.
        name (`str`): name or folder of the adapter, for the error.

    Raises:
        `ValueError`: with the name of the method or of the setting, and what to use instead.
    """

    check_adapter(model.config, getattr(config, "target_modules", None), name)
    method = _method(config)
    tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)  # type: ignore[call-overload]
    if config.is_prompt_learning or tuner is None or config.is_adaption_prompt:
        raise ValueError(f"adapter {name!r} is of the method {method}, which changes no layer; use LoRA, for example.")
    if getattr(tuner, "uses_shared_state", False) or method in _METHODS_WITH_SHARED_WEIGHTS:
        raise ValueError(
            f"adapter {name!r} is of the method {method}, whose layers share weights; a pipeline takes methods with "
            "weights of each layer, such as LoRA. (`peft.PeftModel.from_pretrained(pipe.model, ...)` can load it.)"
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_INITS_OF_BASE_WEIGHTS):
        raise ValueError(
            f"adapter {name!r} has init_lora_weights={init!r}, which changes the weights of the base model. Save it "
            "as plain LoRA, by `save_pretrained(folder, path_initial_model_for_weight_conversion=...)` of PEFT."
        )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"adapter {name!r} has bias={config.bias!r}, which replaces biases of the model; use 'none'.")
    if getattr(config, "layer_replication", None):
        raise ValueError(f"adapter {name!r} has layer_replication, but the layers of an expert cannot be repeated.")
    if getattr(config, "use_dora", False):
        _check_dora(model, config, name)


def _check_dora(model: nn.Module, config: "peft.PeftConfig", name: str) -> None:
    """DoRA divides by the norm of each row of a weight; a new tower has maps that are zero."""

    zero = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(weight := getattr(getattr(module, "base_layer", module), "weight", None), torch.Tensor)
        and weight.ndim > 1
        and peft.tuners.tuners_utils.check_target_module_exists(config, module_name)
        and not weight.flatten(1).any(dim=1).all()
    ]
    if zero:
        raise ValueError(
            f"adapter {name!r} uses DoRA, which divides by the norm of each row of a weight, and {len(zero)} weights "
            f"have rows of zeros, such as {zero[:2]}. Leave these modules out (in a new tower "
            'parts=["attention", "mlp"]), or use LoRA without DoRA.'
        )


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of PEFT in `model`: layers with adapters, and whole modules that adapters replace
    (`modules_to_save`)."""
    if not is_peft_available():
        return

    for name, module in list(model.named_modules()):
        if _is_of_peft(type(module)):  # type: ignore[arg-type]
            yield name, module


@functools.cache
def _is_of_peft(module_type: type) -> bool:
    return issubclass(
        module_type, (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)
    )


def _method(config: "peft.PeftConfig") -> str:
    return getattr(config.peft_type, "value", str(config.peft_type))


def _is_scalable(config: "peft.PeftConfig", module: Any) -> bool:
    return _method(config) in SCALABLE_METHODS and not _replaces_module(module)


def _replaces_module(module: Any) -> bool:
    """Whether a module of PEFT is one of `modules_to_save`, and not a layer with adapters."""
    return hasattr(module, "original_module")


class LatteFlowAdapterMixin:
    """The adapter methods of transformers models, with checks, and with a weight for each expert."""

    config: LatteFlowConfig
    _check_not_cast: Any

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        local_files_only: bool = False,
        adapter_kwargs: dict[str, Any] | None = None,
        load_config: Any = None,
        weight_name: str | None = None,
        **kwargs: Any,
    ) -> LoadStateDictInfo:
        """Load an adapter and make it the active one.

        Args:
            peft_model_id (`str`, *optional*): a folder, a hub id or a file, see [`adapter_files.read_adapter`].
            adapter_name (`str`, *optional*): its name; defaults to `"default"`.
            peft_config (`PeftConfig` or `dict`, *optional*): its configuration. Defaults to the stored one, and
                without one to that of LoRA, with ranks from the shapes.
            adapter_state_dict (`dict[str, torch.Tensor]`, *optional*): its weights, instead of `peft_model_id`.
            is_trainable (`bool`, defaults to `False`): whether to train it further.
            hotswap (`bool`, defaults to `False`): replace the loaded adapter of that name. It may be of another rank,
                scale, method or of other layers. On failure the old adapter stays.
            local_files_only, adapter_kwargs, load_config: arguments of the download, as in transformers.
            weight_name (`str`, *optional*): the name of the weights file in the folder or hub repository.
            kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `proxies`.

        Returns:
            `LoadStateDictInfo`: as in transformers, without any missing or unexpected keys.

        Raises:
            `ValueError`: if the adapter is of another model, of a method that is not supported, has keys that are
                missing, unexpected or of another shape, or its name is taken.
            `OSError`: if a file is missing, truncated or damaged.
        """
        require_peft("load_adapter")
        kwargs.pop("low_cpu_mem_usage", None)
        name = adapter_name or "default"
        label = str(peft_model_id or name)
        download = {
            key: value
            for key, value in (load_config.download_kwargs if load_config else {}).items()
            if key in DOWNLOAD_ARGUMENTS
        }
        download |= {**(adapter_kwargs or {}), **kwargs}
        if local_files_only:
            download["local_files_only"] = True
        source = adapter_state_dict if adapter_state_dict is not None else peft_model_id
        if source is None:
            raise ValueError("give an adapter as peft_model_id, or as adapter_state_dict.")

        # 1. Check the name
        loaded = self._peft_configs()
        replaced = loaded.get(name) if hotswap is True else None
        if hotswap is True and replaced is None:
            raise ValueError(f"hotswap replaces a loaded adapter, and {name!r} is not among {list(loaded)}.")
        if name in loaded and replaced is None:
            raise ValueError(f"adapter_name {name!r} is taken; use another name than those of {list(loaded)}.")
        self._check_adapter_name(name)
        self._check_not_fused("load_adapter")
        self._check_not_cast("load_adapter")

        # 2. Read and check the adapter
        stored, stored_config = read_adapter(source, weight_name, **download)
        names = [name.replace(".base_layer", "") for name, _ in self.named_modules()]  # type: ignore[attr-defined]
        state_dict, alphas = convert_adapter_keys(stored, names)
        config = self._adapter_config(peft_config if peft_config is not None else stored_config, label)
        if config is None:
            config = infer_lora_config(state_dict, alphas, names)
            if not alphas and not any(key.startswith(SCALED_LAYOUTS) for key in stored):
                warnings.warn(
                    f"adapter {label!r} came without a configuration: its scale is taken to be 1 (lora_alpha = r). "
                    "If it was trained with another one, give its configuration as peft_config.",
                    stacklevel=2,
                )
        elif alphas:
            raise ValueError(
                f"adapter {label!r} has a configuration and {len(alphas)} alphas of its own; leave one out."
            )
        config.inference_mode = not is_trainable
        check_adapter_config(self, config, label)  # type: ignore[arg-type]
        others = {_method(other) for key, other in loaded.items() if key != name} - {_method(config)}
        if others:
            raise ValueError(
                f"adapter {label!r} is of the method {_method(config)}, and adapters of {sorted(others)} are "
                "loaded; adapters of different methods cannot be combined. Unload those first."
            )

        # 3. Put it into the model
        active = self.adapter_weights
        old_state_dict = None
        if replaced is not None:
            old_state_dict = self._plain_state_dict(name)
            self.delete_adapter(name)
        try:
            self._insert_adapter(config, state_dict, name, label)
        except Exception:
            if replaced is not None:
                self._insert_adapter(replaced, old_state_dict, name, name)
            if active:
                self.set_adapter_weights(active)
            raise
        self.set_adapter_weights({**active, name: 1.0} if name in active else {name: 1.0})
        return LoadStateDictInfo(set(), set(), set(), [], {}, set())

    def _adapter_config(self, config: Any, label: str) -> "peft.PeftConfig | None":

        if config is None or isinstance(config, peft.PeftConfig):
            return copy.deepcopy(config)
        # The metadata that diffusers writes have no method, which is then LoRA.
        method = config.get("peft_type", "LORA")
        if method not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(f"adapter {label!r} is of the method {method!r}, which the installed PEFT does not know.")
        return peft.PeftConfig.from_peft_type(**{**config, "peft_type": method})

    def _check_adapter_name(self, name: str) -> None:
        # PEFT finds the keys of an adapter by its name between dots.
        parts = {part for key, _ in self.named_parameters() for part in key.split(".")}  # type: ignore[attr-defined]
        if not name or "." in name or (name in parts and name not in self._peft_configs()):
            raise ValueError(
                f"adapter_name must not be empty, contain a dot or be the name of a module, got {name!r}."
            )

    def _peft_configs(self) -> dict[str, "peft.PeftConfig"]:
        return getattr(self, "peft_config", None) or {}

    def _plain_state_dict(self, name: str) -> dict[str, torch.Tensor]:

        # `save_embedding_layers="auto"` would ask the hub for the base model.
        return peft.get_peft_model_state_dict(self, adapter_name=name, save_embedding_layers=False)

    def _insert_adapter(self, config: "peft.PeftConfig", state_dict: Any, name: str, label: str) -> None:
        """Add the layers of an adapter and load its weights, all of them or none."""

        try:
            with warnings.catch_warnings():
                # A second adapter is no reason for a warning.
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                peft.inject_adapter_in_model(config, self, name)  # type: ignore[arg-type]
            # Same as `PeftModel.from_pretrained`: the weights of an adapter stay float32 in a model of half precision.
            peft.tuners.tuners_utils.cast_adapter_dtype(self, name)  # type: ignore[arg-type]
            self._hf_peft_config_loaded = True
            expected = self._plain_state_dict(name)
            for problem, keys in (
                ("has no", expected.keys() - state_dict.keys()),
                ("has unexpected", state_dict.keys() - expected.keys()),
                (
                    "has another shape of",
                    [
                        key
                        for key in expected.keys() & state_dict.keys()
                        if expected[key].shape != state_dict[key].shape
                    ],
                ),
            ):
                if keys:
                    raise ValueError(f"adapter {label!r} {problem} {len(keys)} weights: {_some(sorted(keys))}.")
            peft.set_peft_model_state_dict(self, state_dict, name)
            # New modules, dropout for one, are in training mode.
            self.train(self.training)  # type: ignore[attr-defined]
        except Exception:
            # PEFT notes the adapter in `peft_config` only after its last layer.
            if set(self._peft_configs()) <= {name}:
                self.unload_adapters()
            else:
                self._remove_from_modules(name)
            raise

    def add_adapter(self, adapter_config: "peft.PeftConfig", adapter_name: str | None = None) -> None:
        """Same as `PreTrainedModel.add_adapter`, with the checks of `load_adapter`.

        Raises:
            `ValueError`: if the method or the name cannot be used.
        """
        require_peft("add_adapter")
        self._check_adapter_name(adapter_name or "default")
        self._check_not_fused("add_adapter")
        self._check_not_cast("add_adapter")
        check_adapter_config(self, adapter_config, adapter_name or "default")  # type: ignore[arg-type]
        super().add_adapter(adapter_config, adapter_name)  # type: ignore[misc]

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active ones, each with the weight it last had, or 1.

        Raises:
            `ValueError`: if one of them is not loaded.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self.set_adapter_weights({name: self._weights().get(name, 1.0) for name in names})

    @property
    def adapter_weights(self) -> dict[str, list[float]]:
        """The active adapters, and their weights in each expert."""
        num_experts = self.config.num_experts
        return {name: self._weights().get(name, [1.0] * num_experts) for name in self.active_adapters()}

    def _weights(self) -> dict[str, list[float]]:
        return self.__dict__.setdefault("_adapter_weights", {})

    def set_adapter_weights(self, weights: Mapping[str, float | Sequence[float]]) -> None:
        """Make these adapters the active ones, with these weights.

        Args:
            weights (`dict[str, float | list[float]]`):
                By name the factor of an adapter's effect, or one for each expert. With 0, an adapter is not run.

        Raises:
            `ValueError`: if an adapter is not loaded, a weight is not finite or not one for each expert, or the
                adapter's method knows no weights. Nothing is changed then.
        """
        self._check_not_fused("set_adapters")
        configs = self._peft_configs()
        per_expert = {name: self._weight_per_expert(name, weight) for name, weight in weights.items()}
        plan: list[tuple[Any, dict[str, float]]] = []
        for module_name, module in adapter_modules(self):  # type: ignore[arg-type]
            available = module._get_available_adapters()
            in_module = {
                name: self._weight_in_module(name, values, module_name, module)
                for name, values in per_expert.items()
                if name in available
            }
            in_module = {name: weight for name, weight in in_module.items() if weight != 0}
            if _replaces_module(module) and len(in_module) > 1:
                raise ValueError(f"adapters {list(in_module)} replace {module_name!r}; use one of them at a time.")
            plan.append((module, in_module))
        inference_mode = all(configs[name].inference_mode for name in weights)
        for module, in_module in plan:
            module.set_adapter(list(in_module), inference_mode=inference_mode)
            for name, weight in in_module.items():
                if _is_scalable(configs[name], module):
                    module.set_scale(name, weight)
        self._weights().update(per_expert)

    def _weight_per_expert(self, name: str, weight: Any) -> list[float]:
        if name not in self._peft_configs():
            raise ValueError(f"adapter_names must be among the loaded {list(self._peft_configs())}, got {name!r}.")
        num_experts = self.config.num_experts
        values = [weight] * num_experts if isinstance(weight, Real) else weight
        is_list = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == num_experts
        if not is_list or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
            raise ValueError(
                f"the weight of adapter {name!r} must be a finite number, or one for each of {num_experts} experts, "
                f"got {weight!r}."
            )
        return [float(value) for value in values]

    def _weight_in_module(self, name: str, per_expert: list[float], module_name: str, module: Any) -> float:
        layer = _TOWER_LAYER.match(module_name)
        if layer is None and len(set(per_expert)) > 1:
            raise ValueError(
                f"adapter {name!r} also adapts {module_name!r}, which all experts share: it takes one weight, got "
                f"{per_expert}."
            )
        weight = per_expert[0 if layer is None else self.config.expert_of_layer(int(layer[1]))]
        config = self._peft_configs()[name]
        if weight not in (0, 1) and not _is_scalable(config, module):
            raise ValueError(
                f"adapter {name!r} ({_method(config)}) has no weight in {module_name!r}: it can be used with 1 or 0, "
                f"got {weight}."
            )
        return weight

    def active_adapters(self) -> list[str]:
        """The adapters that some layer runs, in the order of loading."""
        active = {name for _, module in adapter_modules(self) for name in module.active_adapters}  # type: ignore[arg-type]
        return [name for name in self._peft_configs() if name in active]

    @property
    def fused_adapters(self) -> list[str]:
        """The adapters that are added to the weights at present."""
        fused = {name for _, module in adapter_modules(self) for name in module.merged_adapters}  # type: ignore[arg-type]
        return [name for name in self._peft_configs() if name in fused]

    @property
    def sampling(self) -> dict[str, Any]:
        """How the model is sampled by default: the `sampling` of its configuration, or that of an active adapter that
        was distilled to few steps, whatever its weight.

        Raises:
            `ValueError`: if several active adapters contradict each other.
        """
        if not self._peft_configs():
            return dict(self.config.sampling or {})
        # The pipeline reads this in each call, so modules are not named.
        modules: list[Any] = [module for module in all_modules(self) if _is_of_peft(type(module))]  # type: ignore[arg-type]
        is_disabled = any(module.disable_adapters for module in modules)
        active = set() if is_disabled else {name for module in modules for name in module.active_adapters}
        found = {
            name: sampling
            for name in self._peft_configs()
            if name in active
            and (sampling := read_sampling_mark(getattr(self._peft_configs()[name], "target_modules", None)))
        }
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            raise ValueError(
                f"adapters {list(found)} were distilled to different steps or guidance; activate one of them by "
                "set_adapters."
            )
        if values:
            return {key: value for key, value in values[0].items() if key != "expert_boundaries"}
        return dict(self.config.sampling or {})

    def _check_not_fused(self, method: str) -> None:
        # PEFT would take the fused adapters out of the weights without a word, or ignore the others.
        if self.fused_adapters:
            raise ValueError(
                f"adapters {self.fused_adapters} are fused. Before {method}, use unload_lora_weights to keep them in "
                "the weights, or unfuse_lora."
            )

    def fuse_adapters(self, scale: float = 1.0, safe_merge: bool = False) -> None:
        """Add the active adapters to the weights that they adapt.

        Args:
            scale (`float`, defaults to 1.0): multiplies their weights.
            safe_merge (`bool`, defaults to `False`): whether to refuse weights that became NaN.

        Raises:
            `ValueError`: if none is active, they are disabled or fused already, or one cannot be fused.
        """
        self._check_not_cast("fuse_adapters")
        weights = self.adapter_weights
        modules = list(adapter_modules(self))  # type: ignore[arg-type]
        if not weights:
            raise ValueError(f"no adapter is active; activate some of {list(self._peft_configs())} by set_adapters.")
        if any(module.disable_adapters for _, module in modules):
            raise ValueError(f"adapters {list(weights)} are disabled; enable them first.")
        for name, module in modules:
            if module.active_adapters and _replaces_module(module):
                raise ValueError(f"adapters {module.active_adapters} replace {name!r} and cannot be fused.")
        if scale != 1.0:
            self.set_adapter_weights(
                {name: [scale * value for value in per_expert] for name, per_expert in weights.items()}
            )
        else:
            self._check_not_fused("fuse_lora")
        try:
            for _, module in modules:
                if module.active_adapters:
                    module.merge(safe_merge=safe_merge, adapter_names=list(module.active_adapters))
        except Exception:
            self._unmerge()
            self.set_adapter_weights(weights)
            raise
        # `unfuse_adapters` restores these.
        self._weights().update(weights)

    def unfuse_adapters(self) -> None:
        """Subtract what `fuse_adapters` added; the weights are restored up to rounding, and the adapters active."""
        if self.fused_adapters:
            self._check_not_cast("unfuse_adapters")
        self._unmerge()
        self.set_adapter_weights(self.adapter_weights)

    def _unmerge(self) -> None:
        for _, module in adapter_modules(self):  # type: ignore[arg-type]
            if module.merged_adapters:
                module.unmerge()

    def enable_adapters(self) -> None:
        """Run the active adapters again after `disable_adapters`."""
        for _, module in adapter_modules(self):  # type: ignore[arg-type]
            module.enable_adapters(True)
        if not self.fused_adapters:
            # PEFT makes them trainable.
            self.set_adapter_weights(self.adapter_weights)

    def disable_adapters(self) -> None:
        """Run the model without adapters.

        Raises:
            `ValueError`: if they are fused.
        """
        self._check_not_fused("disable_lora")
        for _, module in adapter_modules(self):  # type: ignore[arg-type]
            module.enable_adapters(False)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Remove adapters; other active adapters stay active. With the last one, PEFT's layers are removed.

        Raises:
            `ValueError`: if one of them is not loaded, or is fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        configs = self._peft_configs()
        if not set(names) <= set(configs):
            raise ValueError(f"adapter_names must be among the loaded {list(configs)}, got {names}.")
        self._check_not_fused("delete_adapters")
        if set(names) == set(configs):
            self.unload_adapters()
            return
        active = {name: weight for name, weight in self.adapter_weights.items() if name not in names}
        for name in names:
            self._remove_from_modules(name)
        self.set_adapter_weights(active)

    def _remove_from_modules(self, name: str) -> None:
        for _, module in adapter_modules(self):  # type: ignore[arg-type]
            if name not in module._get_available_adapters():
                continue
            with warnings.catch_warnings():
                # PEFT warns that it activates another adapter; the caller sets the active ones.
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                module.delete_adapter(name, *([[]] if _replaces_module(module) else []))
        self._peft_configs().pop(name, None)
        self._weights().pop(name, None)

    def unload_adapters(self) -> None:
        """Remove all adapters and PEFT's layers around the plain ones. What is fused stays in the weights."""
        if self.fused_adapters:
            self.config.sampling = self.sampling or None
        removed: list[str] = []
        for name, module in adapter_modules(self):  # type: ignore[arg-type]
            if not name.startswith(tuple(removed)):
                plain = module.original_module if _replaces_module(module) else module.get_base_layer()
                self.set_submodule(name, plain)  # type: ignore[attr-defined]
                removed.append(f"{name}.")
        if hasattr(self, "peft_config"):
            del self.peft_config
        self._hf_peft_config_loaded = False
        self._weights().clear()

    def _load_from_state_dict(self, *args: Any) -> None:
        # peft's own loading, such as `PeftModel.from_pretrained`, ends here.
        for name, adapter in self._peft_configs().items():
            check_adapter(self.config, getattr(adapter, "target_modules", None), name)
        super()._load_from_state_dict(*args)  # type: ignore[misc]


def require_peft(method: str) -> None:
    """
    Raises:
        `ValueError`: if PEFT is not installed.
    """
    if not is_peft_available():
        raise ValueError(f"{method} needs PEFT, which is not installed: pip install peft.")


def _some(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
