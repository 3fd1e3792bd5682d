# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of one K -> another K, as a starting point for training (the vanilla K = 1 into K = 4, say)."""

import json
from pathlib import Path
from typing import Any

from ..modeling.configuration_latte_flow import LatteFlowConfig
from .card import pipeline_card
from .folders import MODEL, edited, meta_model, one_velocity, read_pipeline
from .initialize import new_tensors
from .plan import Plan
from .streaming import stored_names


def regroup(source: str | Path, num_experts: int, expert_boundaries: list[float] | None = None) -> Plan:
    """Plan the same pipeline with its layers in other groups.

    All weights stay, but for the gates of the residual attention: a layer that no longer opens its group gets one that
    is zero, and a layer that now does loses its own, since no layer before it has a map to hand on. Shares of new
    noise by expert (the scheduler's `stochastic_sampling`) belong to the old groups: with another K there are none.

    Args:
        source (`str` or `Path`): a pipeline's folder or hub id.
        num_experts (`int`): the new K.
        expert_boundaries (`list[float]`, *optional*): K + 1 falling sigmas from 1 to 0; uniform if not given.

    Raises:
        `OSError`: if a file is missing or cut off.
        `ValueError`: if K does not divide the layers, or the boundaries do not fit K.
    """
    pipeline = read_pipeline(source)
    settings = {**pipeline.config.to_dict(), "num_experts": num_experts, "expert_boundaries": expert_boundaries}
    config = LatteFlowConfig.from_dict(settings)
    model = meta_model(config)
    old, names = pipeline.weights[MODEL], stored_names(model)
    gates = new_tensors(model, (name for name in names if name not in old), old["tower.head.proj.weight"].dtype)
    assert all(".residual_gate." in name for name in gates.keys() | (old.keys() - names.keys()))
    scheduler = json.loads(pipeline.texts["scheduler/scheduler_config.json"])
    steps: dict[str, Any] = {"expert_boundaries": config.expert_boundaries}
    if isinstance(scheduler.get("stochastic_sampling"), list) and num_experts != pipeline.config.num_experts:
        steps["stochastic_sampling"] = False
    groups = {"num_experts": config.num_experts, "expert_boundaries": config.expert_boundaries}
    origin = f"`{pipeline.name}`, its {pipeline.config.num_experts} groups of layers made {config.num_experts}."
    texts = {
        **pipeline.texts,
        "README.md": pipeline_card(config, origin),
        "model/config.json": edited(pipeline.texts["model/config.json"], **groups),
        "scheduler/scheduler_config.json": edited(pipeline.texts["scheduler/scheduler_config.json"], **steps),
    }
    weights = {**pipeline.weights, MODEL: {name: old.get(name) or gates[name] for name in names}}
    return Plan(texts, weights, lambda written: one_velocity(config, written[MODEL]))
