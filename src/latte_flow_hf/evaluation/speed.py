# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How fast a picture is, against what a user would pick instead: contestants in turns, medians, paired ratios.

What is unusual here: each family of contestants lives in a process of its own, kept alive as long as memory allows, so
that the turns of a round lie seconds apart; ratios are taken within a round, where both sides met the same machine.
Every second round runs backwards, so that a drift favours nobody.

A picture is prefill, loop and decode: the three parts of one call. If fewer steps than a picture has are measured, its
time is prefill + first step + (steps - 1) * median of the other steps + decode, and the row says `extrapolated`.
"""

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
import yaml
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from ..version import __version__
from .contestants import Contestant, Paint, fill, make_contestant, named_parameters


# What a process needs beside its weights: libraries, activations, the allocator's reserves.
HEADROOM_BYTES = 3 * 2**29

# What a ratio may compare; all are seconds a picture but `step` (seconds a step a picture) and the counts.
QUANTITIES = ("picture", "prefill", "loop", "step", "decode", "loop_flops", "picture_flops", "step_parameters")


@dataclass(frozen=True)
class Suite:
    """What a file such as `benchmarks/speed_2b.yaml` holds.

    Args:
        name (`str`): heads the report.
        contestants (`dict`): by name, a `kind` of [`KINDS`] and its fields.
        ratios (`list[dict]`): `contestant`, `over` (another one), `of` (one of [`QUANTITIES`]) and, where something is
            aimed at, `at_most` or `at_least`.
        rounds (`int`): how often every contestant has its turn.
        measured_steps (`int` or `"all"`): steps of the loop that are run; `"all"` paints whole pictures.
        warmup (`int`): calls before the first that counts, in every process anew.
        threads (`int`, *optional*): of torch; its own choice if not given.
        device, dtype (`str`): as torch names them.

    Raises:
        `ValueError`: if a value is out of range, or a name is unknown.
    """

    name: str
    contestants: dict[str, dict]
    ratios: list[dict] = field(default_factory=list)
    rounds: int = 5
    measured_steps: int | str = "all"
    warmup: int = 1
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("measured_steps", 2), ("warmup", 1), ("threads", 1)):
            value = getattr(self, name)
            if (name, value) in (("measured_steps", "all"), ("threads", None)):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ValueError(f"dtype must be one of torch's, such as float32 or bfloat16, got {self.dtype!r}.")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be one of torch's, such as cpu or cuda, got {self.device!r}.") from error
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"device must be cpu, or cuda where there is one, got {self.device!r}.")
        if not isinstance(self.contestants, dict) or not self.contestants:
            raise ValueError(f"contestants must name at least one, got {self.contestants!r}.")
        self.made()
        for ratio in self.ratios:
            self._check_ratio(ratio)

    def _check_ratio(self, ratio: Any) -> None:
        wanted, optional = {"contestant", "over", "of"}, {"at_most", "at_least"}
        if not isinstance(ratio, dict) or not wanted <= set(ratio) <= wanted | optional:
            raise ValueError(f"a ratio has {sorted(wanted)}, and may have {sorted(optional)}, got {ratio!r}.")
        for name in (ratio["contestant"], ratio["over"]):
            if name not in self.contestants:
                raise ValueError(f"ratio of an unknown contestant {name!r}; known are {list(self.contestants)}.")
        if ratio["of"] not in QUANTITIES:
            raise ValueError(f"a ratio is of one of {list(QUANTITIES)}, got {ratio['of']!r}.")

    def made(self) -> dict[str, Contestant]:
        """The contestants, by name."""
        return {name: make_contestant(name, given) for name, given in self.contestants.items()}

    def steps_of(self, contestant: Contestant) -> int:
        """How many steps of its loop are run."""
        whole = self.measured_steps == "all"
        return contestant.steps if whole else min(int(self.measured_steps), contestant.steps)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Suite":
        """Read a suite.

        Raises:
            `ValueError`: if a field is unknown or missing, or as of the class.
            `OSError`: if there is no such file.
        """
        try:
            given = yaml.safe_load(Path(path).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"suite {path} is no YAML: {error}") from error
        known = [item.name for item in fields(cls)]
        if not isinstance(given, dict) or not set(given) <= set(known) or not {"name", "contestants"} <= set(given):
            found = sorted(given) if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"suite {path}: expected name, contestants and others of {known}, found {found}.")
        return cls(**given)


def run_suite(suite: Suite, output_dir: Path) -> dict:
    """Measure what is not measured yet, and write `results.json`, `results.md` and `results.png`.

    `results.json` is written anew after every turn: a run that was stopped goes on where it was.

    Args:
        suite ([`Suite`]): who runs.
        output_dir (`Path`): made if it is not there.

    Returns:
        `dict`: what `results.json` holds: `suite`, `environment`, `facts` and `rounds` of the contestants, `summary`.

    Raises:
        `ValueError`: if the folder holds results of another suite, machine or state of the package, or a contestant
            does not fit into memory.
        `RuntimeError`: if a contestant fails; what was measured before is kept.
    """
    results = _begin(suite, output_dir / "results.json")
    contestants = suite.made()
    families: dict[str, list[str]] = defaultdict(list)
    for name, contestant in contestants.items():
        families[contestant.family].append(name)
    turns = [name for names in families.values() for name in names]
    left = [
        (turn, name)
        for turn in range(suite.rounds)
        for name in (turns if turn % 2 == 0 else reversed(turns))
        if len(results["rounds"][name]) <= turn
    ]
    if left:
        needs = {name: _needed_bytes([contestants[item] for item in names], suite) for name, names in families.items()}
        with _Processes(suite, families, needs) as processes, tqdm(total=len(left), unit="turn") as progress:
            for turn, name in left:
                progress.set_description(f"round {turn + 1} of {suite.rounds}: {name}")
                load = os.getloadavg()[0]
                facts, measured = processes.measure(contestants[name].family, name)
                results["facts"][name] = facts
                results["rounds"][name].append({**measured, "load_average": round(load, 2)})
                _write(output_dir / "results.json", json.dumps(results, indent=1))
                progress.update()
    results["summary"] = summarise(suite, results)
    _write(output_dir / "results.json", json.dumps(results, indent=1))
    _write(output_dir / "results.md", as_markdown(suite, results))
    _draw(suite, results, output_dir / "results.png")
    return results


def _begin(suite: Suite, path: Path) -> dict:
    """What was measured before, or nothing yet."""
    new = {
        "suite": asdict(suite),
        "environment": environment(suite),
        "facts": {},
        "rounds": {name: [] for name in suite.contestants},
    }
    # As JSON gives it back: without tuples.
    new = json.loads(json.dumps(new))
    if not path.exists():
        return new
    old = json.loads(path.read_text())
    # More rounds and other ratios change nothing of what was measured.
    for part, free in (("suite", {"rounds", "ratios"}), ("environment", set())):
        differing = {key for key in new[part] if key not in free and old[part].get(key) != new[part][key]}
        if differing:
            raise ValueError(f"{path} holds results of another {part} ({sorted(differing)}): give another folder.")
    return {**new, "facts": old["facts"], "rounds": old["rounds"]}


def environment(suite: Suite) -> dict:
    """What the figures depend on and the suite does not say."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, diffusers)}
    found = {
        "versions": {"python": platform.python_version(), "latte_flow_hf": __version__, **libraries},
        "package_sha256": digest.hexdigest()[:16],
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": suite.threads or torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    if torch.device(suite.device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(suite.device)
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _needed_bytes(family: list[Contestant], suite: Suite) -> int:
    """Bytes of the weights that a family holds in common."""
    size = getattr(torch, suite.dtype).itemsize
    counts = {
        name: parameter.numel()
        for contestant in family
        for name, _, _, parameter in named_parameters(contestant.networks())
    }
    return size * sum(counts.values())


class _Processes:
    """One process a family, started at its first turn; the least recently used ones make room for the next."""

    def __init__(self, suite: Suite, families: dict[str, list[str]], needs: dict[str, int]):
        self.suite, self.families, self.needs = suite, families, needs
        self.live: dict[str, tuple[Any, Connection]] = {}
        # A server that has imported everything once, and from which processes start at once.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload([__name__])
        available = self._available()
        for family, need in needs.items():
            if need + HEADROOM_BYTES > available:
                raise ValueError(
                    f"contestants {families[family]} need about {(need + HEADROOM_BYTES) / 1e9:.1f} GB, "
                    f"{available / 1e9:.1f} GB are available; leave them out, or give them smaller `sizes`."
                )

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: Any) -> None:
        for family in list(self.live):
            self._stop(family)

    def measure(self, family: str, name: str) -> tuple[dict, dict]:
        """One turn of one contestant: its facts, and what was measured.

        Raises:
            `RuntimeError`: if it fails, with its own traceback.
        """
        if family not in self.live:
            self._start(family)
        process, connection = self.live[family] = self.live.pop(family)
        try:
            connection.send(name)
            failed, answer = connection.recv()
        except (EOFError, BrokenPipeError) as error:
            process.join()
            del self.live[family]
            raise RuntimeError(
                f"the process of contestant {name!r} ended (exit code {process.exitcode}; -9: out of memory)."
            ) from error
        if failed:
            raise RuntimeError(f"contestant {name!r} failed:\n{answer}")
        return answer

    def _start(self, family: str) -> None:
        while self.live and self._available() < self.needs[family] + HEADROOM_BYTES:
            self._stop(next(iter(self.live)))
        ours, theirs = self.context.Pipe()
        contestants = {name: self.suite.contestants[name] for name in self.families[family]}
        process = self.context.Process(target=_serve, args=(theirs, self.suite, contestants), daemon=True)
        process.start()
        theirs.close()
        self.live[family] = (process, ours)

    def _stop(self, family: str) -> None:
        process, connection = self.live.pop(family)
        connection.close()
        # Also where it is at work: after an interrupt nobody waits for its answer.
        process.terminate()
        process.join()

    def _available(self) -> int:
        if torch.device(self.suite.device).type == "cuda":
            return torch.cuda.mem_get_info(self.suite.device)[0]
        return psutil.virtual_memory().available


def _serve(connection: Connection, suite: Suite, given: dict[str, dict]) -> None:
    """A family's process: answers each name that comes with one turn of that contestant."""
    # An interrupt is the parent's matter: it ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if suite.threads:
        torch.set_num_threads(suite.threads)
    turns = _Turns(suite)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, turns.take(name, make_contestant(name, given[name]))))
        except Exception:
            connection.send((True, traceback.format_exc()))


class _Turns:
    """The contestants of one family, made ready at their first turn, with the weights that they share."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.pool: dict[str, torch.Tensor] = {}
        self.weights: dict[int, int] = {}
        self.ready: dict[str, tuple[dict, Paint]] = {}
        self.bare_bytes = _held_bytes(suite.device)

    @torch.no_grad()
    def take(self, name: str, contestant: Contestant) -> tuple[dict, dict]:
        """The contestant's facts, and what one turn of it measures."""
        if name not in self.ready:
            self.ready[name] = self._get_ready(contestant)
        facts, paint = self.ready[name]
        measured = measure(paint, self.suite.steps_of(contestant), self.suite.device)
        if measured["peak_bytes"] is not None:
            measured["peak_bytes"] -= self.bare_bytes + sum(self.weights.values())
        return facts, measured

    def _get_ready(self, contestant: Contestant) -> tuple[dict, Paint]:
        """Weights, facts, operations counted, warm-up."""
        suite = self.suite
        networks = contestant.networks()
        fill(networks, self.pool, suite.device, getattr(torch, suite.dtype))
        parameters = [parameter for *_, parameter in named_parameters(networks)]
        self.weights.update({parameter.data_ptr(): parameter.nbytes for parameter in parameters})
        paint = contestant.prepare(networks)
        steps = suite.steps_of(contestant)
        facts = {
            "kind": contestant.kind,
            "steps": contestant.steps,
            "measured_steps": steps,
            "extrapolated": steps < contestant.steps,
            "batch": contestant.batch,
            "pixels": contestant.pixels,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "step_parameters": sum(p.numel() for m in contestant.step_modules(networks) for p in m.parameters()),
            "note": contestant.note,
            "flops": count_flops(paint, min(8, steps)),
        }
        if contestant.compile:
            paint = contestant.prepare(networks, compiled=True)
        for _ in range(suite.warmup):
            picture = paint(min(2, steps), lambda part: None)
        # Overflowing numbers would be timed as something else.
        assert torch.isfinite(picture).all(), f"{contestant.kind} paints numbers that are not finite."
        return facts, paint


def count_flops(paint: Paint, num_steps: int) -> dict[str, Any]:
    """Floating-point operations by part of one call, as of `measure`; a product and its sum are two.

    Attention is computed as the matrix products that it is, since torch counts no operations for the CPU's fused one.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        marks = _marks(paint, num_steps, counter.get_total_flops)
    return _parts(marks, lambda start, end: end - start)


def measure(paint: Paint, num_steps: int, device: str = "cpu") -> dict[str, Any]:
    """One call: `prefill`, `steps` (one entry a step) and `decode` in seconds, and memory's peak.

    On a GPU the marks are events in its own queue: nothing waits for it but the end of the call.

    Returns:
        `dict`: also `peak_bytes`, what was held at most meanwhile; `None` where that cannot be read.
    """
    can_peak = _reset_peak(device)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        marks = _marks(paint, num_steps, _cuda_event)
        torch.cuda.synchronize(device)
        found = _parts(marks, lambda start, end: start.elapsed_time(end) / 1000)
    else:
        marks = _marks(paint, num_steps, time.perf_counter)
        found = _parts(marks, lambda start, end: end - start)
    return {**found, "peak_bytes": _held_bytes(device, peak=True) if can_peak else None}


def _marks(paint: Paint, num_steps: int, now: Callable[[], Any]) -> list[tuple[str, Any]]:
    """`now()` at the start of one call and where each of its parts ends."""
    marks = [("start", now())]
    paint(num_steps, lambda part: marks.append((part, now())))
    found = sum(part == "step" for part, _ in marks)
    assert found == num_steps, f"{num_steps} steps were asked for, {found} were made."
    return marks


def _parts(marks: list[tuple[str, Any]], difference: Callable[[Any, Any], Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {"prefill": 0, "steps": [], "decode": 0}
    for (_, start), (part, end) in pairwise(marks):
        if part == "step":
            parts["steps"].append(difference(start, end))
        else:
            parts[part] = difference(start, end)
    return parts


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _reset_peak(device: str) -> bool:
    """Start a new peak of held memory; `False` where the system does not tell one."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _held_bytes(device: str, peak: bool = False) -> int:
    """What this process holds of the device's memory, now or at most since `_reset_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if not peak:
        return psutil.Process().memory_info().rss
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def of_a_picture(parts: dict[str, Any], facts: dict) -> dict[str, float]:
    """Parts of one measured call -> `prefill`, `loop`, `step`, `decode` and `picture` of one whole picture.

    The first step also holds what is set up before it, so that `step` is the median of the others.
    """
    first, *others = parts["steps"]
    step = statistics.median(others or [first])
    # All steps, if all were run.
    loop = first + step * (facts["steps"] - 1) if len(parts["steps"]) < facts["steps"] else sum(parts["steps"])
    found = {"prefill": parts["prefill"], "loop": loop, "step": step, "decode": parts["decode"]}
    found["picture"] = parts["prefill"] + loop + parts["decode"]
    return {name: value / facts["batch"] for name, value in found.items()}


def summarise(suite: Suite, results: dict) -> dict:
    """Medians and ranges over the rounds, and the ratios that the suite asks for.

    A ratio of times is taken in each round by itself; `median`, `min` and `max` are over those.

    Returns:
        `dict`: `contestants` by name, with `seconds` (by part: `median`, `min`, `max`), `flops` (by part) and
            `peak_gb`; and `ratios`, each as in the suite with `median`, `min`, `max` and, with an aim, `met`.
    """
    facts, rounds = results["facts"], results["rounds"]
    pictures = {name: [of_a_picture(parts, facts[name]) for parts in rounds[name]] for name in suite.contestants}
    flops = {name: of_a_picture(facts[name]["flops"], facts[name]) for name in suite.contestants}
    contestants = {}
    for name, measured in pictures.items():
        peaks = [parts["peak_bytes"] for parts in rounds[name] if parts["peak_bytes"] is not None]
        contestants[name] = {
            "seconds": {part: _spread([picture[part] for picture in measured]) for part in measured[0]},
            "flops": flops[name],
            "peak_gb": round(max(peaks) / 1e9, 3) if peaks else None,
        }

    def value_of(name: str, turn: int, quantity: str) -> float:
        if quantity == "step_parameters":
            return facts[name][quantity]
        if quantity.endswith("_flops"):
            return flops[name][quantity.removesuffix("_flops")]
        return pictures[name][turn][quantity]

    ratios = []
    for ratio in suite.ratios:
        sides = (ratio["contestant"], ratio["over"])
        turns = range(min(len(rounds[name]) for name in sides))
        values = [[value_of(name, turn, ratio["of"]) for name in sides] for turn in turns]
        found = {**ratio, **_spread([value / over for value, over in values])}
        aims = [found["median"] <= ratio.get("at_most", float("inf")), found["median"] >= ratio.get("at_least", 0)]
        if "at_most" in ratio or "at_least" in ratio:
            found["met"] = all(aims)
        ratios.append(found)
    return {"contestants": contestants, "ratios": ratios}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def as_markdown(suite: Suite, results: dict) -> str:
    """The report: where it ran, a row a contestant, a row a ratio."""
    environment, facts, summary = results["environment"], results["facts"], results["summary"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rounds = max(len(turns) for turns in results["rounds"].values())
    loads = [turn["load_average"] for turns in results["rounds"].values() for turn in turns]
    columns = ["contestant", "pixels", "steps", "prefill", "step", "loop", "decode", "picture", "TFLOPs a picture"]
    columns += ["parameters a step", "peak"]
    lines = [
        f"# {suite.name}",
        "",
        f"{environment.get('gpu') or environment['cpu']}, {environment['threads']} threads of {environment['cores']} "
        f"cores, {suite.dtype}, {rounds} round(s), load average {min(loads)} to {max(loads)}; {versions}.",
        "",
        "Seconds a picture: median over the rounds (least to most). `~`: extrapolated from fewer steps than a picture "
        "has. Peak: memory beyond the weights.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for name in suite.contestants:
        fact, found = facts[name], summary["contestants"][name]
        cells = {part: f"{found['seconds'][part]['median']:.4g}" for part in found["seconds"]}
        picture = found["seconds"]["picture"]
        batch = f" x{fact['batch']}" if fact["batch"] > 1 else ""
        measured = f" ({fact['measured_steps']} run)" if fact["extrapolated"] else ""
        lines.append(
            f"| {name}{batch} | {fact['pixels']} | {fact['steps']}{measured} | {cells['prefill']} | {cells['step']} "
            f"| {cells['loop']} | {cells['decode']} | {'~' if fact['extrapolated'] else ''}{cells['picture']} "
            f"({picture['min']:.4g} to {picture['max']:.4g}) | {found['flops']['picture'] / 1e12:.3g} "
            f"| {fact['step_parameters'] / 1e6:.4g} M "
            f"| {'' if found['peak_gb'] is None else format(found['peak_gb'], '.2f') + ' GB'} |"
        )
    if summary["ratios"]:
        lines += ["", "Ratios, each taken within a round:", "", "| of | ratio | median | least to most | aim | met |"]
        lines += ["|---|---|---|---|---|---|"]
    for ratio in summary["ratios"]:
        aims = [f"{name.replace('_', ' ')} {ratio[name]}" for name in ("at_most", "at_least") if name in ratio]
        met = {True: "yes", False: "no", None: ""}[ratio.get("met")]
        lines.append(
            f"| {ratio['of'].replace('_', ' ')} | {ratio['contestant']} / {ratio['over']} | {ratio['median']:.4g} "
            f"| {ratio['min']:.4g} to {ratio['max']:.4g} | {', '.join(aims)} | {met} |"
        )
    notes = sorted({(fact["kind"], fact["note"]) for fact in facts.values() if fact["note"]})
    lines += ["", "What is left out or differs from the published model:", ""]
    lines += [f"- `{kind}`: {note}." for kind, note in notes]
    resized = {name: given["sizes"] for name, given in suite.contestants.items() if given.get("sizes")}
    lines += [f"- {name} is not at its published size: {json.dumps(sizes)}." for name, sizes in resized.items()]
    return "\n".join(lines) + "\n"


def _draw(suite: Suite, results: dict, path: Path) -> None:
    """Seconds a picture on a logarithmic axis, and how they divide into the three parts."""
    found = results["summary"]["contestants"]
    names = sorted(found, key=lambda name: -found[name]["seconds"]["picture"]["median"])
    figure = Figure(figsize=(10, 1.2 + 0.38 * len(names)), layout="constrained")
    whole, shares = figure.subplots(1, 2, sharey=True)
    pictures = [found[name]["seconds"]["picture"] for name in names]
    medians = [picture["median"] for picture in pictures]
    reach = [[p["median"] - p["min"] for p in pictures], [p["max"] - p["median"] for p in pictures]]
    whole.errorbar(medians, names, xerr=reach, fmt="o", color="#4a5aa8", capsize=3)
    for median, name in zip(medians, names):
        whole.annotate(f"{median:.3g}", (median, name), xytext=(0, 6), textcoords="offset points", ha="center", size=8)
    whole.set(xscale="log", xlabel="seconds a picture (median, least to most)")
    whole.grid(axis="x", alpha=0.3)
    start = [0.0] * len(names)
    for part, colour in (("prefill", "#dd9a2b"), ("loop", "#4a5aa8"), ("decode", "#2b93a3")):
        widths = [100 * found[name]["seconds"][part]["median"] / median for name, median in zip(names, medians)]
        shares.barh(names, widths, left=start, label=part, color=colour)
        start = [left + width for left, width in zip(start, widths)]
    shares.set(xlabel="% of the picture")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle(suite.name, x=0.01, ha="left")
    partial = path.with_name("." + path.name)
    figure.savefig(partial, dpi=130, format="png")
    partial.rename(path)


def _write(path: Path, text: str) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("." + path.name)
    partial.write_text(text)
    partial.rename(path)
