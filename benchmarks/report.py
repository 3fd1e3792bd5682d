# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""From measurements to medians, paired ratios, tables and a plot."""

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from latte_flow_hf.files import atomic_write

from .suite import Suite


def per_image(parts: dict[str, Any], info: dict) -> dict[str, float]:
    """Convert the parts of one measured call to values per image.

    The first step includes what is set up before it, so `step` is the median of the others. If fewer steps were run
    than an image has, the loop is extrapolated: first step + (steps - 1) * median of the other steps.

    Returns:
        `dict`: `prefill`, `loop`, `step`, `decode` and `image` (their sum without `step`), divided by the batch size.
    """
    first, *others = parts["steps"]
    step = statistics.median(others or [first])
    extrapolated = len(parts["steps"]) < info["num_steps"]
    loop = first + step * (info["num_steps"] - 1) if extrapolated else sum(parts["steps"])
    values = {"prefill": parts["prefill"], "loop": loop, "step": step, "decode": parts["decode"]}
    values["image"] = parts["prefill"] + loop + parts["decode"]
    return {name: value / info["batch_size"] for name, value in values.items()}


def summarize(suite: Suite, results: dict) -> dict:
    """Medians and ranges over the rounds, and the ratios of the suite.

    A ratio of times is computed within each round, when both scenarios were measured under the same load; its median
    and range are over these values.

    Returns:
        `dict`: `scenarios` by name, with `seconds` (by part: `median`, `min`, `max`), `flops` (by part) and
            `peak_gb`; and `ratios`, each as in the suite plus `median`, `min`, `max` and, if it has a target, `met`.
    """
    infos, rounds = results["scenarios"], results["rounds"]
    images = {name: [per_image(parts, infos[name]) for parts in rounds[name]] for name in suite.scenarios}
    flops = {name: per_image(infos[name]["flops"], infos[name]) for name in suite.scenarios}
    scenarios = {}
    for name, measurements in images.items():
        peaks = [parts["peak_bytes"] for parts in rounds[name] if parts["peak_bytes"] is not None]
        scenarios[name] = {
            "seconds": {part: _median_and_range([image[part] for image in measurements]) for part in measurements[0]},
            "flops": flops[name],
            "peak_gb": round(max(peaks) / 1e9, 3) if peaks else None,
        }

    def value(name: str, round_index: int, quantity: str) -> float:
        if quantity == "step_parameters":
            return infos[name][quantity]
        if quantity.endswith("_flops"):
            return flops[name][quantity.removesuffix("_flops")]
        return images[name][round_index][quantity]

    ratios = []
    for ratio in suite.ratios:
        name, over, quantity = ratio["scenario"], ratio["over"], ratio["quantity"]
        num_rounds = min(len(rounds[name]), len(rounds[over]))
        values = [value(name, index, quantity) / value(over, index, quantity) for index in range(num_rounds)]
        result = {**ratio, **_median_and_range(values)}
        if "at_most" in ratio or "at_least" in ratio:
            result["met"] = ratio.get("at_least", 0) <= result["median"] <= ratio.get("at_most", float("inf"))
        ratios.append(result)
    return {"scenarios": scenarios, "ratios": ratios}


def _median_and_range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def to_markdown(suite: Suite, results: dict) -> str:
    """The report: the environment, a row per scenario, a row per ratio, and what each scenario leaves out."""
    environment, infos, summary = results["environment"], results["scenarios"], results["summary"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    num_rounds = max(len(measurements) for measurements in results["rounds"].values())
    loads = [item["load_average"] for measurements in results["rounds"].values() for item in measurements]
    seconds = "Processor seconds" if suite.clock == "cpu" else "Seconds"
    columns = ["scenario", "image size", "steps", "prefill", "step", "loop", "decode", "image", "TFLOPs per image"]
    columns += ["parameters per step", "peak"]
    lines = [
        f"# {suite.name}",
        "",
        f"{environment.get('gpu') or environment['cpu']}, {environment['num_threads']} threads of "
        f"{environment['num_cores']} cores, {suite.dtype}, {num_rounds} round(s), load average {min(loads)} to "
        f"{max(loads)}; {versions}.",
        "",
        f"{seconds} per image: median over the rounds (min to max). `~`: extrapolated from fewer steps than an "
        "image has. Peak: memory in addition to the weights.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for name in suite.scenarios:
        info, result = infos[name], summary["scenarios"][name]
        cells = {part: f"{seconds['median']:.4g}" for part, seconds in result["seconds"].items()}
        image = result["seconds"]["image"]
        batch = f" x{info['batch_size']}" if info["batch_size"] > 1 else ""
        steps_run = f" ({info['num_measured_steps']} run)" if info["extrapolated"] else ""
        lines.append(
            f"| {name}{batch} | {info['image_size']} | {info['num_steps']}{steps_run} | {cells['prefill']} "
            f"| {cells['step']} | {cells['loop']} | {cells['decode']} "
            f"| {'~' if info['extrapolated'] else ''}{cells['image']} ({image['min']:.4g} to {image['max']:.4g}) "
            f"| {result['flops']['image'] / 1e12:.3g} | {info['step_parameters'] / 1e6:.4g} M "
            f"| {'' if result['peak_gb'] is None else format(result['peak_gb'], '.2f') + ' GB'} |"
        )
    if summary["ratios"]:
        lines += ["", "Ratios, each computed within a round:", ""]
        lines += ["| quantity | ratio | median | min to max | target | met |", "|---|---|---|---|---|---|"]
    for ratio in summary["ratios"]:
        targets = [f"{name.replace('_', ' ')} {ratio[name]}" for name in ("at_most", "at_least") if name in ratio]
        met = {True: "yes", False: "no", None: ""}[ratio.get("met")]
        lines.append(
            f"| {ratio['quantity'].replace('_', ' ')} | {ratio['scenario']} / {ratio['over']} "
            f"| {ratio['median']:.4g} | {ratio['min']:.4g} to {ratio['max']:.4g} | {', '.join(targets)} | {met} |"
        )
    notes = sorted({(info["kind"], info["note"]) for info in infos.values() if info["note"]})
    lines += ["", "What is left out or differs from the published model:", ""]
    lines += [f"- `{kind}`: {note}." for kind, note in notes]
    resized = {name: content["sizes"] for name, content in suite.scenarios.items() if content.get("sizes")}
    lines += [f"- {name} is not at its published size: {json.dumps(sizes)}." for name, sizes in resized.items()]
    return "\n".join(lines) + "\n"


def save_plot(suite: Suite, results: dict, path: Path) -> None:
    """Plot seconds per image on a logarithmic axis, and the shares of prefill, loop and decode."""
    seconds = {name: result["seconds"] for name, result in results["summary"]["scenarios"].items()}
    names = sorted(seconds, key=lambda name: -seconds[name]["image"]["median"])
    figure = Figure(figsize=(10, 1.2 + 0.38 * len(names)), layout="constrained")
    times, shares = figure.subplots(1, 2, sharey=True)
    images = [seconds[name]["image"] for name in names]
    medians = [image["median"] for image in images]
    errors = [[i["median"] - i["min"] for i in images], [i["max"] - i["median"] for i in images]]
    times.errorbar(medians, names, xerr=errors, fmt="o", color="#4a5aa8", capsize=3)
    for median, name in zip(medians, names):
        times.annotate(f"{median:.3g}", (median, name), xytext=(0, 6), textcoords="offset points", ha="center", size=8)
    times.set(xscale="log", xlabel="seconds per image (median, min to max)")
    times.grid(axis="x", alpha=0.3)
    left = [0.0] * len(names)
    for part, color in (("prefill", "#dd9a2b"), ("loop", "#4a5aa8"), ("decode", "#2b93a3")):
        widths = [100 * seconds[name][part]["median"] / median for name, median in zip(names, medians)]
        shares.barh(names, widths, left=left, label=part, color=color)
        left = [start + width for start, width in zip(left, widths)]
    shares.set(xlabel="% of an image")
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    figure.suptitle(suite.name, x=0.01, ha="left")
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")
