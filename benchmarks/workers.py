# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Measuring one scenario, in worker processes.

Each family of scenarios has a process of its own that is kept alive as long as memory allows. The scenarios of a round
are therefore measured seconds apart, without loading weights in between.
"""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .scenarios import Generate, Scenario, materialize, named_parameters
from .suite import Suite, make_scenario


# What a process needs in addition to its weights: libraries, activations, memory that the allocator reserves.
HEADROOM_BYTES = 3 * 2**29


class WorkerPool:
    """One process per family, started when it is first needed.

    When memory is short, the least recently used processes are stopped.

    Args:
        suite ([`Suite`]): the suite.
        families (`dict[str, list[str]]`): names of scenarios by family.

    Raises:
        `ValueError`: if a family does not fit into memory.
    """

    def __init__(self, suite: Suite, families: dict[str, list[str]]):
        self.suite, self.families = suite, families
        self.running: dict[str, tuple[Any, Connection]] = {}
        # The server of "forkserver" imports the libraries once; processes forked from it start immediately.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload([__name__])
        scenarios = suite.build_scenarios()
        self.required_bytes = {
            family: _num_weight_bytes([scenarios[name] for name in names], suite) + HEADROOM_BYTES
            for family, names in families.items()
        }
        available = self._available_bytes()
        for family, required in self.required_bytes.items():
            if required > available:
                raise ValueError(
                    f"scenarios {families[family]} need about {required / 1e9:.1f} GB, {available / 1e9:.1f} GB are "
                    "available; remove them from the suite, or set smaller `sizes`."
                )

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: Any) -> None:
        for family in list(self.running):
            self._stop(family)

    def measure(self, family: str, name: str) -> tuple[dict, dict]:
        """Measure one scenario once.

        Returns:
            `tuple[dict, dict]`: information about the scenario, and the measurement.

        Raises:
            `RuntimeError`: with the traceback of the worker, if the scenario fails.
        """
        if family not in self.running:
            self._start(family)
        # Moved to the end: the most recently used one.
        process, connection = self.running[family] = self.running.pop(family)
        try:
            connection.send(name)
            failed, answer = connection.recv()
        except (EOFError, BrokenPipeError) as error:
            process.join()
            del self.running[family]
            raise RuntimeError(
                f"the process of scenario {name!r} ended with exit code {process.exitcode} (-9: out of memory)."
            ) from error
        if failed:
            raise RuntimeError(f"scenario {name!r} failed:\n{answer}")
        return answer

    def _start(self, family: str) -> None:
        while self.running and self._available_bytes() < self.required_bytes[family]:
            self._stop(next(iter(self.running)))
        connection, worker_connection = self.context.Pipe()
        scenarios = {name: self.suite.scenarios[name] for name in self.families[family]}
        arguments = (worker_connection, self.suite, scenarios)
        process = self.context.Process(target=_run_worker, args=arguments, daemon=True)
        process.start()
        worker_connection.close()
        self.running[family] = (process, connection)

    def _stop(self, family: str) -> None:
        process, connection = self.running.pop(family)
        connection.close()
        # After an interrupt the worker can still be in the middle of a measurement.
        process.terminate()
        process.join()

    def _available_bytes(self) -> int:
        if torch.device(self.suite.device).type == "cuda":
            return torch.cuda.mem_get_info(self.suite.device)[0]
        return psutil.virtual_memory().available


def _num_weight_bytes(family: list[Scenario], suite: Suite) -> int:
    """Bytes of the weights that the scenarios of a family share."""
    num_elements = {
        name: parameter.numel()
        for scenario in family
        for name, _, _, parameter in named_parameters(scenario.build_networks())
    }
    return getattr(torch, suite.dtype).itemsize * sum(num_elements.values())


def _run_worker(connection: Connection, suite: Suite, scenarios: dict[str, dict]) -> None:
    """Main function of a worker: receives names of scenarios and sends back their measurements."""
    # On an interrupt the parent terminates this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if suite.num_threads:
        torch.set_num_threads(suite.num_threads)
    worker = _Worker(suite)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, worker.measure(name, make_scenario(name, scenarios[name]))))
        except Exception:
            connection.send((True, traceback.format_exc()))


class _Worker:
    """The scenarios of one family, each set up at its first measurement, and the weights that they share."""

    def __init__(self, suite: Suite):
        self.suite = suite
        self.shared_weights: dict[str, torch.Tensor] = {}
        self.bytes_by_pointer: dict[int, int] = {}
        self.ready: dict[str, tuple[dict, Generate]] = {}
        self.initial_bytes = _held_bytes(suite.device)

    @torch.no_grad()
    def measure(self, name: str, scenario: Scenario) -> tuple[dict, dict]:
        """Information about the scenario, and one measurement of it."""
        if name not in self.ready:
            self.ready[name] = self._set_up(scenario)
        info, generate = self.ready[name]
        num_steps = self.suite.num_steps_to_run(scenario)
        measurement = measure(generate, num_steps, self.suite.device, self.suite.clock)
        if measurement["peak_bytes"] is not None:
            measurement["peak_bytes"] -= self.initial_bytes + sum(self.bytes_by_pointer.values())
        return info, measurement

    def _set_up(self, scenario: Scenario) -> tuple[dict, Generate]:
        """Create the weights, count parameters and operations, and warm up."""
        suite = self.suite
        networks = scenario.build_networks()
        materialize(networks, self.shared_weights, suite.device, getattr(torch, suite.dtype))
        parameters = [parameter for *_, parameter in named_parameters(networks)]
        self.bytes_by_pointer.update({parameter.data_ptr(): parameter.nbytes for parameter in parameters})
        generate = scenario.prepare(networks)
        num_steps = suite.num_steps_to_run(scenario)
        info = {
            "kind": scenario.kind,
            "num_steps": scenario.num_steps,
            "num_measured_steps": num_steps,
            "extrapolated": num_steps < scenario.num_steps,
            "batch_size": scenario.batch_size,
            "image_size": scenario.image_size,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "step_parameters": sum(p.numel() for m in scenario.step_modules(networks) for p in m.parameters()),
            "note": scenario.note,
            "flops": count_flops(generate, min(8, num_steps)),
        }
        if scenario.compile:
            generate = scenario.prepare(networks, compiled=True)
        for _ in range(suite.num_warmup_calls):
            # Four steps run each of four experts, and are all that a model distilled to four steps can run.
            images = generate(min(4, num_steps), lambda part: None)
        # The speed of operations on infinite or NaN values can differ.
        assert torch.isfinite(images).all(), f"{scenario.kind} generates values that are not finite."
        return info, generate


def count_flops(generate: Generate, num_steps: int) -> dict[str, Any]:
    """Count floating-point operations by part of one call, same parts as in [`measure`].

    A multiplication and an addition count as two operations. Attention is computed as matrix products, since torch
    does not count the operations of the fused CPU kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        marks = _collect_marks(generate, num_steps, counter.get_total_flops)
    return _split_into_parts(marks, lambda start, end: end - start)


def measure(generate: Generate, num_steps: int, device: str = "cpu", clock: str = "wall") -> dict[str, Any]:
    """Time one call by part and read its peak of memory.

    On a GPU the marks are CUDA events; the host synchronizes only before and after the call. `clock` is that of
    [`Suite`].

    Returns:
        `dict`: `prefill`, `steps` (a list with one entry per step) and `decode` in seconds, and `peak_bytes`: the most
            memory held during the call, `None` if it cannot be read.
    """
    can_read_peak = _reset_peak(device)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        marks = _collect_marks(generate, num_steps, _record_cuda_event)
        torch.cuda.synchronize(device)
        parts = _split_into_parts(marks, lambda start, end: start.elapsed_time(end) / 1000)
    else:
        now = time.process_time if clock == "cpu" else time.perf_counter
        marks = _collect_marks(generate, num_steps, now)
        parts = _split_into_parts(marks, lambda start, end: end - start)
    return {**parts, "peak_bytes": _held_bytes(device, peak=True) if can_read_peak else None}


def _collect_marks(generate: Generate, num_steps: int, now: Callable[[], Any]) -> list[tuple[str, Any]]:
    """`now()` at the start of one call and at the end of each of its parts."""
    marks = [("start", now())]
    generate(num_steps, lambda part: marks.append((part, now())))
    num_marked = sum(part == "step" for part, _ in marks)
    assert num_marked == num_steps, f"{num_steps} steps were requested, {num_marked} were run."
    return marks


def _split_into_parts(marks: list[tuple[str, Any]], difference: Callable[[Any, Any], Any]) -> dict[str, Any]:
    parts: dict[str, Any] = {"prefill": 0, "steps": [], "decode": 0}
    for (_, start), (part, end) in pairwise(marks):
        if part == "step":
            parts["steps"].append(difference(start, end))
        else:
            parts[part] = difference(start, end)
    return parts


def _record_cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _reset_peak(device: str) -> bool:
    """Reset the peak of held memory; returns `False` if the system has none to read."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _held_bytes(device: str, peak: bool = False) -> int:
    """Memory of the device that this process holds now, or its peak since `_reset_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if not peak:
        return psutil.Process().memory_info().rss
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
