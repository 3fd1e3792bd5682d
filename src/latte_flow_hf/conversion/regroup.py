# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A checkpoint with K experts -> one with another K, as a starting point for training (such as K = 1 -> K = 4)."""

import json
from pathlib import Path
from typing import Any

from ..cards import pipeline_card
from ..modeling.configuration_latte_flow import LatteFlowConfig
from .folders import MODEL, check_velocity, edit_json, model_on_meta, read_pipeline
from .initialize import new_tensors
from .plan import Plan
from .streaming import stored_names


def regroup(
    source: str | Path,
    num_experts: int,
    expert_boundaries: list[float] | None = None,
    layers_per_expert: list[int] | None = None,
) -> Plan:
    """Plan the same pipeline with its layers grouped into another number of experts.

    All weights are kept, except the gates of the residual attention: the first layer of an expert has none, because no
    earlier layer of that expert passes scores to it; a layer that is no longer the first gets a gate of zeros. The
    scheduler's `new_noise` by expert belongs to the old experts, and is switched off if K changes.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.
        num_experts (`int`): the new K.
        expert_boundaries (`list[float]`, *optional*): K + 1 decreasing sigmas from 1 to 0; uniform if not given.
        layers_per_expert (`list[int]`, *optional*): the number of layers of each expert; equal numbers if not given.

    Raises:
        `OSError`: if a file is missing or truncated.
        `ValueError`: if the layers cannot be grouped in this way, the boundaries do not fit K, or the model was
            distilled to few steps of its own experts.
    """
    pipeline = read_pipeline(source)
    sampling = pipeline.config.sampling or {}
    if sampling.get("distilled_experts"):
        raise ValueError(
            f"{pipeline.name} was distilled to steps_per_expert={sampling['steps_per_expert']}, which only its own "
            "experts can take; regroup the model that it was distilled from."
        )
    changes = {
        "num_experts": num_experts,
        "expert_boundaries": expert_boundaries,
        "layers_per_expert": layers_per_expert,
        # Values by expert belong to the old experts.
        "sampling": {key: value for key, value in sampling.items() if not isinstance(value, list)} or None,
    }
    settings = {**pipeline.config.to_dict(), **changes}
    config = LatteFlowConfig.from_dict(settings)
    model = model_on_meta(config)
    old, names = pipeline.weights[MODEL], stored_names(model)
    gates = new_tensors(model, (name for name in names if name not in old), old["tower.head.proj.weight"].dtype)
    assert all(".residual_gate." in name for name in gates.keys() | (old.keys() - names.keys()))
    scheduler = json.loads(pipeline.small_files["scheduler/scheduler_config.json"])
    scheduler_changes: dict[str, Any] = {"expert_boundaries": config.expert_boundaries}
    for key in ("new_noise", "stochastic_sampling"):  # the second one in configurations of earlier versions
        if isinstance(scheduler.get(key), list) and num_experts != pipeline.config.num_experts:
            scheduler_changes[key] = None
    changes |= {"expert_boundaries": config.expert_boundaries, "layers_per_expert": config.layers_per_expert}
    origin = f"`{pipeline.name}`, regrouped from {pipeline.config.num_experts} experts to {config.num_experts}."
    small_files = {
        **pipeline.small_files,
        "README.md": pipeline_card(config, origin),
        "model/config.json": edit_json(pipeline.small_files["model/config.json"], **changes),
        "scheduler/scheduler_config.json": edit_json(
            pipeline.small_files["scheduler/scheduler_config.json"], **scheduler_changes
        ),
    }
    weights = {**pipeline.weights, MODEL: {name: old.get(name) or gates[name] for name in names}}
    return Plan(small_files, weights, lambda written: check_velocity(config, written[MODEL]))
