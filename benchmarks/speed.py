# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Speed and memory per image, compared with other models and with other configurations of this one.

    python -m benchmarks.speed benchmarks/suites/speed_tinyworld.yaml -o runs/speed
    python -m benchmarks.speed benchmarks/suites/few_steps_2b.yaml --parts latte-k4-4

Scenarios are measured in turn within a round, in worker processes that stay alive. Every second round runs in reverse
order, so that a change of the machine's load over time favours none of them.

`--parts` divides an image of one scenario into the functions that it runs instead.
"""

import argparse
import hashlib
import json
import os
import platform
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from tqdm.auto import tqdm

import latte_flow_hf
from latte_flow_hf.files import atomic_write, read_json, write_json

from .parts import parts_to_markdown, time_parts
from .report import save_plot, summarize, to_markdown
from .suite import Suite
from .workers import WorkerPool


def run_suite(suite: Suite, output_dir: Path) -> dict:
    """Measure what has not been measured yet, and write `results.json`, `results.md` and `results.png`.

    `results.json` is written after each measurement, so that an interrupted run can be resumed.

    Args:
        suite ([`Suite`]): what to measure.
        output_dir (`Path`): created if it does not exist.

    Returns:
        `dict`: the content of `results.json`: `suite`, `environment`, `scenarios` (information about each), `rounds`
            (measurements of each) and `summary`.

    Raises:
        `ValueError`: if the folder has results of another suite, machine or version of the code, or a scenario does
            not fit into memory.
        `RuntimeError`: if a scenario fails; earlier measurements are kept.
    """
    results = _load_results(suite, output_dir / "results.json")
    scenarios = suite.build_scenarios()
    families: dict[str, list[str]] = defaultdict(list)
    for name, scenario in scenarios.items():
        families[scenario.family].append(name)
    names = [name for family in families.values() for name in family]
    remaining = [
        (index, name)
        for index in range(suite.num_rounds)
        for name in (names if index % 2 == 0 else reversed(names))
        if len(results["rounds"][name]) <= index
    ]
    if remaining:
        with WorkerPool(suite, families) as workers, tqdm(total=len(remaining), unit="measurement") as progress:
            for index, name in remaining:
                progress.set_description(f"round {index + 1} of {suite.num_rounds}: {name}")
                load_average = round(os.getloadavg()[0], 2)
                info, measurement = workers.measure(scenarios[name].family, name)
                results["scenarios"][name] = info
                results["rounds"][name].append({**measurement, "load_average": load_average})
                write_json(results, output_dir / "results.json")
                progress.update()
    results["summary"] = summarize(suite, results)
    write_json(results, output_dir / "results.json")
    with atomic_write(output_dir / "results.md") as partial:
        partial.write_text(to_markdown(suite, results))
    save_plot(suite, results, output_dir / "results.png")
    return results


def _load_results(suite: Suite, path: Path) -> dict:
    """The results of an interrupted run, or empty ones."""
    new = {
        "suite": asdict(suite),
        "environment": describe_environment(suite),
        "scenarios": {},
        "rounds": {name: [] for name in suite.scenarios},
    }
    # As JSON returns it: lists instead of tuples.
    new = json.loads(json.dumps(new))
    if not path.exists():
        return new
    old = read_json(path)
    # Earlier measurements stay valid with another number of rounds and other ratios.
    for part, can_differ in (("suite", {"num_rounds", "ratios"}), ("environment", set())):
        different = {key for key in new[part] if key not in can_differ and old[part].get(key) != new[part][key]}
        if different:
            raise ValueError(f"{path} has results of another {part} ({sorted(different)}); use another output folder.")
    return {**new, "scenarios": old["scenarios"], "rounds": old["rounds"]}


def describe_environment(suite: Suite) -> dict:
    """What the results depend on in addition to the suite."""
    digest = hashlib.sha256()
    for folder in (Path(latte_flow_hf.__file__).parent, Path(__file__).parent):
        for source in sorted(folder.rglob("*.py")):
            digest.update(source.read_bytes())
    libraries = {module.__name__: module.__version__ for module in (latte_flow_hf, torch, transformers, diffusers)}
    environment = {
        "versions": {"python": platform.python_version(), **libraries},
        "code_sha256": digest.hexdigest()[:16],
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "num_threads": suite.num_threads or torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    if torch.device(suite.device).type == "cuda":
        environment["gpu"] = torch.cuda.get_device_name(suite.device)
    return environment


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, help="a YAML file, such as benchmarks/suites/speed_tinyworld.yaml")
    parser.add_argument("-o", "--output", type=Path, help="folder for results.json, results.md and results.png")
    parser.add_argument("--parts", metavar="SCENARIO", help="print where the time of an image of this scenario goes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, for a machine that does other work too"
    )
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.parts is None):
        parser.error("give either --output or --parts.")
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    try:
        suite = Suite.from_yaml(options.suite)
        if options.cpu_time:
            suite = replace(suite, clock="cpu", num_threads=1)
        if options.parts is not None:
            print(parts_to_markdown(time_parts(suite, options.parts)))
            return
        results = run_suite(suite, options.output)
    except (ValueError, OSError) as error:
        parser.exit(1, f"Error: {error}\n")
    print(to_markdown(suite, results))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
