# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The working folder of a training run belongs to one recipe, one starting model and the same data."""

from pathlib import Path
from typing import Any

from ..files import read_json
from .callbacks import check_checkpoint


# What a working folder remembers, beside the checkpoints.
RUN_FILE = "run.json"

# Changes of a recipe that leave the weights as they are.
_HARMLESS_CHANGES = {"samples", "data: cache", "data: max_unreadable", "ema: device"} | {
    f"training: {name}"
    for name in (
        "dataloader_num_workers",
        "disable_tqdm",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
    )
}


def check_run(resume_from: Path, run: dict[str, Any], max_steps: int, allow_changes: bool) -> None:
    """Check that a run may go on from a checkpoint.

    Args:
        resume_from (`Path`): the checkpoint; `run.json` beside it was written when the run began.
        run (`dict`): `recipe`, `starting_model` and `data` of now.
        max_steps (`int`): of the recipe; -1 if it gives epochs.
        allow_changes (`bool`): see `train`.

    Raises:
        `ValueError`: naming what changed, or if the checkpoint has more steps than the recipe.
        `OSError`: if a file of the checkpoint or `run.json` is missing or damaged.
    """
    folder = resume_from.parent
    before, other = read_json(folder / RUN_FILE), "use another --work-dir"
    changes = _changes(before["recipe"], run["recipe"])
    parts = [part for part, value in run["starting_model"].items() if before["starting_model"].get(part) != value]
    changes += [f"{part} of the starting model" for part in parts]
    # Missing in a folder of an earlier version.
    data = before.get("data", {})
    changes += [f"the files of `{part}`" for part, value in run["data"].items() if data.get(part, value) != value]
    fixed = [change for change in changes if change.startswith(("trainable", "lora", "ema"))]
    if fixed:
        raise ValueError(f"{folder} holds a run with other weights or averages ({'; '.join(fixed)}); {other}.")
    if changes and not allow_changes:
        raise ValueError(
            f"{folder} holds a run of another recipe, starting model or data ({'; '.join(changes)}); {other}, or "
            f"go on from {resume_from.name} with what is new by --allow-changes."
        )
    step = int(resume_from.name.removeprefix("checkpoint-"))
    if 0 < max_steps < step:
        raise ValueError(f"{folder} holds a run of {step} steps already, but max_steps is {max_steps}; {other}.")
    check_checkpoint(resume_from)


def _changes(before: dict, after: dict, section: str = "") -> list[str]:
    """What differs between two recipes and decides the weights, such as `training: learning_rate 0.001 -> 0.002`."""
    changes = []
    for key in sorted(before.keys() | after.keys()):
        name, old, new = section + key, before.get(key), after.get(key)
        has_more_steps = name in ("training: max_steps", "training: num_train_epochs") and old and new and new > old
        if old == new or name in _HARMLESS_CHANGES or has_more_steps:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{name}: ")
        else:
            changes.append(f"{name} {old} -> {new}")
    return changes
