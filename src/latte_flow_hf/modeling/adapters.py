# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters of the tower, and which model they were trained for.

`LoraConfig` has no field for that, so the regular expression in `target_modules` starts with a comment,
`(?#latte_flow num_experts=4 ...)`. It matches nothing, and every library keeps it in `adapter_config.json`.
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from ..files import read_json
from .configuration_latte_flow import LatteFlowConfig


_MARK = re.compile(r"\(\?#latte_flow ([^)]*)\)")


def _architecture(config: LatteFlowConfig) -> dict[str, str]:
    """The values that an adapter and a model must have in common, by the names of the configuration."""
    text_config = config.text_config
    return {
        "num_experts": str(config.num_experts),
        "num_hidden_layers": str(text_config.num_hidden_layers),
        "hidden_size": str(text_config.hidden_size),
    }


def adapter_mark(config: LatteFlowConfig, experts: Sequence[int]) -> str:
    """The comment at the start of the `target_modules` of an adapter for `experts` of a model like this."""
    fields = {**_architecture(config), "experts": ",".join(map(str, experts))}
    return f"(?#latte_flow {' '.join(f'{name}={value}' for name, value in fields.items())})"


def read_adapter_mark(target_modules: Any) -> dict[str, str]:
    """The fields of the comment: `num_experts`, `num_hidden_layers`, `hidden_size`, `experts` (e.g. `"0,3"`).

    Empty if there is no comment, as in an adapter whose target modules were written by hand.
    """
    match = _MARK.match(target_modules) if isinstance(target_modules, str) else None
    return dict(field.split("=") for field in match[1].split()) if match else {}


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
    trained_for = {key: mark.get(key) for key in architecture}
    if mark and trained_for != architecture:

        def describe(values: dict) -> str:
            return ", ".join(f"{key}={value}" for key, value in values.items())

        raise ValueError(
            f"adapter {name!r} was trained for a model with {describe(trained_for)}; this model has "
            f"{describe(architecture)}."
        )


class LatteFlowAdapterMixin:
    """Checks every adapter before it is loaded, by transformers or by peft."""

    config: LatteFlowConfig

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        load_config: Any = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Same as `PreTrainedModel.load_adapter`, but for adapters of this model alone.

        Raises:
            `ValueError`: if the adapter was trained for another number of experts or layers, or another width.
        """
        name = peft_model_id or adapter_name or "default"
        if peft_config is not None:
            check_adapter(self.config, getattr(peft_config, "target_modules", None), name)
        elif peft_model_id is not None:
            download = {**(load_config.download_kwargs if load_config else {}), **(adapter_kwargs or {})}
            file = find_adapter_config_file(peft_model_id, **download)
            if file is not None:
                check_adapter(self.config, read_json(file).get("target_modules"), name)
        loaded_before = set(getattr(self, "peft_config", ()))
        try:
            return super().load_adapter(  # type: ignore[misc]
                peft_model_id,
                adapter_name,
                peft_config,
                load_config=load_config,
                adapter_kwargs=adapter_kwargs,
                **kwargs,
            )
        except Exception:
            # transformers has inserted the adapter's layers by now, but not their weights.
            for added in set(getattr(self, "peft_config", ())) - loaded_before:
                self.delete_adapter(added)  # type: ignore[attr-defined]
            raise

    def _load_from_state_dict(self, *args: Any) -> None:
        # peft's own loading, such as `PeftModel.from_pretrained`, ends here.
        for name, adapter in (getattr(self, "peft_config", None) or {}).items():
            check_adapter(self.config, getattr(adapter, "target_modules", None), name)
        super()._load_from_state_dict(*args)  # type: ignore[misc]
