# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Benchmark suites: the YAML files in `suites/`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from latte_flow_hf.files import read_yaml

from .baselines import DiT, JanusPro, Sana, SanaSprint
from .scenarios import EmbeddedCheckpoint, LatteFlow, Matmul, Scenario


KINDS: dict[str, type[Scenario]] = {
    scenario.kind: scenario for scenario in (LatteFlow, Matmul, EmbeddedCheckpoint, DiT, Sana, SanaSprint, JanusPro)
}

# What a ratio can compare: seconds per image, seconds per step and image (`step`), and the counts.
QUANTITIES = ("image", "prefill", "loop", "step", "decode", "loop_flops", "image_flops", "step_parameters")


@dataclass(frozen=True)
class Suite:
    """The content of a file such as `benchmarks/suites/speed_2b.yaml`.

    Args:
        name (`str`): the title of the report.
        scenarios (`dict`): by name, a `kind` of [`KINDS`] and its fields.
        ratios (`list[dict]`): `scenario`, `over` (another scenario), `quantity` (one of [`QUANTITIES`]) and, if there
            is a target, `at_most` or `at_least`.
        num_rounds (`int`): how often each scenario is measured.
        num_measured_steps (`int` or `"all"`): steps of the loop to run; `"all"` generates complete images.
        num_warmup_calls (`int`): calls before the first measured one, in each process.
        num_threads (`int`, *optional*): of torch; its default if not given.
        device, dtype (`str`): a torch device and dtype.
        clock (`str`):
            `"wall"`, or `"cpu"` for the processor time of the process, which other work on the machine changes little;
            give it one thread, since threads that wait count too.

    Raises:
        `ValueError`: if a value is out of range, or a name is unknown.
    """

    name: str
    scenarios: dict[str, dict]
    ratios: list[dict] = field(default_factory=list)
    num_rounds: int = 5
    num_measured_steps: int | str = "all"
    num_warmup_calls: int = 1
    num_threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    clock: str = "wall"

    def __post_init__(self) -> None:
        minimums = {"num_rounds": 1, "num_measured_steps": 2, "num_warmup_calls": 1, "num_threads": 1}
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if (name, value) in (("num_measured_steps", "all"), ("num_threads", None)):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ValueError(f"dtype must be a dtype of torch such as float32 or bfloat16, got {self.dtype!r}.")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be a device of torch such as cpu or cuda, got {self.device!r}.") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be cpu, or cuda if it is available, got {self.device!r}.")
        if self.clock not in ("wall", "cpu") or (self.clock == "cpu" and device.type != "cpu"):
            raise ValueError(f"clock must be wall, or cpu on the device cpu, got {self.clock!r} on {self.device!r}.")
        if not isinstance(self.scenarios, dict) or not self.scenarios:
            raise ValueError(f"scenarios must contain at least one scenario, got {self.scenarios!r}.")
        self.build_scenarios()
        for ratio in self.ratios:
            self._check_ratio(ratio)

    def _check_ratio(self, ratio: Any) -> None:
        required, optional = {"scenario", "over", "quantity"}, {"at_most", "at_least"}
        if not isinstance(ratio, dict) or not required <= set(ratio) <= required | optional:
            raise ValueError(f"a ratio must have {sorted(required)}, and can have {sorted(optional)}, got {ratio!r}.")
        for name in (ratio["scenario"], ratio["over"]):
            if name not in self.scenarios:
                raise ValueError(f"ratio of an unknown scenario {name!r}; must be one of {list(self.scenarios)}.")
        if ratio["quantity"] not in QUANTITIES:
            raise ValueError(f"quantity of a ratio must be one of {list(QUANTITIES)}, got {ratio['quantity']!r}.")

    def build_scenarios(self) -> dict[str, Scenario]:
        """The scenarios by name."""
        return {name: make_scenario(name, fields_) for name, fields_ in self.scenarios.items()}

    def num_steps_to_run(self, scenario: Scenario) -> int:
        """How many steps of the scenario's loop are run."""
        if self.num_measured_steps == "all":
            return scenario.num_steps
        return min(int(self.num_measured_steps), scenario.num_steps)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Suite":
        """Read a suite.

        Raises:
            `ValueError`: if a field is unknown, missing or out of range.
            `OSError`: if the file does not exist.
        """
        content = read_yaml(path, "suite")
        known = [item.name for item in fields(cls)]
        if not isinstance(content, dict) or not {"name", "scenarios"} <= set(content) <= set(known):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise ValueError(
                f"suite {path} must have name and scenarios, and can have others of {known}, got {found}."
            )
        return cls(**content)


def make_scenario(name: str, content: Any) -> Scenario:
    """Build a scenario from its entry in a suite.

    Raises:
        `ValueError`: if its kind or a field is unknown, or a value is out of range.
    """
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        found = content.get("kind") if isinstance(content, dict) else content
        raise ValueError(f"scenario {name!r}: kind must be one of {list(KINDS)}, got {found!r}.")
    kind = KINDS[content["kind"]]
    known = {item.name for item in fields(kind) if item.init}
    unknown = set(content) - known - {"kind"}
    if unknown:
        raise ValueError(f"scenario {name!r}: fields of {kind.kind!r} are {sorted(known)}, got {sorted(unknown)}.")
    try:
        return kind(**{key: value for key, value in content.items() if key != "kind"})
    except ValueError as error:
        raise ValueError(f"scenario {name!r}: {error}") from error
