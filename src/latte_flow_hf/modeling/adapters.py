# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Which model an adapter was made for.

`LoraConfig` has no field of its own for that, so the regular expression that names the adapted modules begins with a
comment, `(?#latte_flow num_experts=4 ...)`: it matches nothing, and stays in `adapter_config.json` whoever saves it.
"""

import re
from collections.abc import Sequence
from typing import Any

from .configuration_latte_flow import LatteFlowConfig


_MARK = re.compile(r"\(\?#latte_flow ([^)]*)\)")


def _shape(config: LatteFlowConfig) -> dict[str, str]:
    """What an adapter and a model must agree on, in the words of the configuration."""
    text_config = config.text_config
    return {
        "num_experts": str(config.num_experts),
        "num_hidden_layers": str(text_config.num_hidden_layers),
        "hidden_size": str(text_config.hidden_size),
    }


def adapter_mark(config: LatteFlowConfig, experts: Sequence[int]) -> str:
    """The comment that opens the `target_modules` of an adapter for `experts` of such a model."""
    fields = {**_shape(config), "experts": ",".join(map(str, experts))}
    return f"(?#latte_flow {' '.join(f'{name}={value}' for name, value in fields.items())})"


def read_adapter_mark(target_modules: Any) -> dict[str, str]:
    """What the comment says, by name: `num_experts`, `num_hidden_layers`, `hidden_size`, `experts` (`"0,3"`).

    Empty without one, as of an adapter whose targets somebody wrote by hand.
    """
    found = _MARK.match(target_modules) if isinstance(target_modules, str) else None
    return dict(field.split("=") for field in found[1].split()) if found else {}


def check_adapter(config: LatteFlowConfig, target_modules: Any, name: str) -> None:
    """Refuse an adapter of another model: its layers would be those of other experts, or of other sizes.

    Args:
        config ([`LatteFlowConfig`]): the model's.
        target_modules: the adapter's, from its configuration; one without a comment passes.
        name (`str`): the adapter's name or folder, for the error.

    Raises:
        `ValueError`: with what the adapter was made for and what the model is.
    """
    mark, shape = read_adapter_mark(target_modules), _shape(config)
    made_for = {key: mark.get(key) for key in shape}
    if mark and made_for != shape:

        def words(values: dict) -> str:
            return ", ".join(f"{key}={value}" for key, value in values.items())

        raise ValueError(f"adapter {name!r} was made for a model of {words(made_for)}; this one has {words(shape)}.")
