# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a folder is made from, and what each run in it does.

`study.json` is written first and decides whom the folder belongs to: the recipe, the starting model and the kind of
device. `plan.json` is written when everything that the runs share is there. Each result names the plan it belongs to.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..files import read_json, write_json
from .settings import CACHE_FOLDER, PARTS_FOLDER, Reproduction, Variant


STUDY_FILE = "study.json"
PLAN_FILE = "plan.json"
RUNS_FOLDER = "runs"
RESULT_FILE = "result.json"
REFERENCE_FILE = "reference.npz"
# Of the result of a run, see `runs.run`.
RESULT_KEYS = ("points", "grid", "grid_seconds", "understanding", "versions")


def points_of(budget: float, step_flops: int, num_points: int) -> list[int]:
    """The numbers of steps after which a run is measured: n / 2 ** i, i from `num_points` - 1 to 0, n being the steps
    that the budget pays for; all rounded down.

    Raises:
        `ValueError`: if the budget is too small for so many points.
    """
    total = int(budget // step_flops)
    if total < 2 ** (num_points - 1):
        raise ValueError(
            f"budget {budget:.4g} is {total} steps of {step_flops:.4g} operations each, but {num_points} points need "
            f"at least {2 ** (num_points - 1)}; use a budget of {2 ** (num_points - 1) * step_flops:.4g}, or fewer "
            "points."
        )
    return [total // 2**i for i in reversed(range(num_points))]


def check_common_steps(points: dict[str, list[int]]) -> None:
    """Check that all runs can be compared after equal steps.

    Args:
        points (`dict[str, list[int]]`): the measured steps, by variant.

    Raises:
        `ValueError`: if a run ends before another one is measured first.
    """
    first = max(points, key=lambda name: points[name][0])
    last = min(points, key=lambda name: points[name][-1])
    if points[first][0] > points[last][-1]:
        raise ValueError(
            f"num_points must be larger: {last} ends after {points[last][-1]} steps, and {first} is measured from "
            f"{points[first][0]} steps on."
        )


@dataclass(frozen=True)
class Plan:
    """What the runs do.

    Args:
        settings ([`Reproduction`]): the recipe.
        device (`str`): `"cpu"`, or the type of the accelerator.
        step_flops (`dict[str, int]`): counted operations of one training step, forward and backward, by variant.
        parameters (`dict[str, int]`): the number of trained parameters, by variant.
    """

    settings: Reproduction
    device: str
    step_flops: dict[str, int]
    parameters: dict[str, int]

    def points(self, variant: Variant) -> list[int]:
        """See [`points_of`]."""
        return points_of(self.settings.budget, self.step_flops[variant.name], self.settings.num_points)

    @property
    def id(self) -> str:
        """What results are marked with."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()[:16]

    def _content(self) -> dict[str, Any]:
        counts = {name: value for name, value in asdict(self).items() if name != "settings"}
        return {"settings": self.settings.model_dump(mode="json"), **counts}

    def write(self, folder: Path) -> None:
        write_json(self._content(), folder / PLAN_FILE)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            `OSError`: if the file is missing or damaged.
            `ValueError`: if it was written by another version.
        """
        path = folder / PLAN_FILE
        content = read_json(path)
        try:
            settings = Reproduction.from_dict(content.pop("settings"), str(path))
            return cls(settings=settings, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not of this version ({error}); use another folder.") from error


def check_study(folder: Path, study: dict[str, Any]) -> None:
    """Check that `folder` is free for a study, or belongs to it.

    Args:
        folder (`Path`): may not exist.
        study (`dict`): `settings`, `starting_model` and `device`, as JSON.

    Raises:
        `ValueError`: if it belongs to another study and runs may have begun, with what differs, or contains anything
            else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {folder} is a file; use another name.")
    path = folder / STUDY_FILE
    if path.exists():
        changes = _differences(read_json(path), study)
        if changes and (folder / PLAN_FILE).exists():
            raise ValueError(
                f"{folder} holds the results of another recipe, starting model or device ({'; '.join(changes)}); use "
                "another folder. Its finished runs are kept."
            )
    elif folder.exists() and any(path.name != "lock" and not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"folder {folder} is not empty and not one of this command; use another folder.")


def begin_study(folder: Path, study: dict[str, Any]) -> None:
    """Make `folder`, which is locked, the folder of a study. What was prepared for another one is removed, if no run
    can have begun: a recipe that was refused can be mended.

    Raises:
        `ValueError`: see [`check_study`].
    """
    check_study(folder, study)
    path = folder / STUDY_FILE
    if path.exists() and read_json(path) != study:
        for name in (PARTS_FOLDER, CACHE_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (REFERENCE_FILE, STUDY_FILE):
            (folder / name).unlink(missing_ok=True)
    if not path.exists():
        write_json(study, path)


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [
            change
            for key in keys
            for change in _differences(before.get(key), after.get(key), f"{name}: {key}" if name else key)
        ]
    return [] if before == after else [f"{name} {before} -> {after}"]


def load_result(folder: Path, name: str, plan: Plan) -> dict[str, Any] | None:
    """The result of a finished run, or `None`.

    Raises:
        `OSError`: if the file is damaged.
        `ValueError`: if it belongs to another plan or another run, or lacks what this version measures.
    """
    path = folder / RUNS_FOLDER / name / RESULT_FILE
    if not path.exists():
        return None
    result = read_own(path, name, plan)
    missing = [key for key in RESULT_KEYS if key not in result]
    variant, _ = plan.settings.runs[name]
    steps = [point.get("step") for point in result.get("points", [])]
    if missing or steps != plan.points(variant):
        what = f"{missing}" if missing else f"points: it has {steps}, the plan {plan.points(variant)}"
        raise ValueError(
            f"{path} lacks {what}; remove the folder {path.parent}, and run {name!r} is made again by this version."
        )
    return result


def read_own(path: Path, name: str, plan: Plan) -> dict[str, Any]:
    """Read a file that a run has written, with the names of the run and of its plan.

    Raises:
        `OSError`: if the file is damaged.
        `ValueError`: if it belongs to another plan or another run.
    """
    content = read_json(path)
    if content.get("run") != name or content.get("plan") != plan.id:
        raise ValueError(
            f"{path} is of run {content.get('run')!r} and of another recipe or start; remove the folder "
            f"{path.parent}, and run {name!r} is made again."
        )
    return content


def check_runs(folder: Path, plan: Plan) -> None:
    """
    Raises:
        `ValueError`: if there is a run that is not of this plan, or a result of another plan.
    """
    runs = folder / RUNS_FOLDER
    found = [path.name for path in runs.iterdir() if not path.name.startswith(".")] if runs.exists() else []
    unknown = sorted(set(found) - set(plan.settings.runs))
    if unknown:
        raise ValueError(f"{runs} contains {unknown}, which are no runs of this recipe; remove them.")
    for name in found:
        load_result(folder, name, plan)
