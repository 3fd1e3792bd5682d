# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The figures of the report, with matplotlib (extra `benchmarks`)."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_write, save_image
from .claims import MAIN, NO_RESIDUAL, PROBABILITIES, Evidence
from .measures import ACCURACY, FRECHET, MEASURES, Measure, mean_and_spread, value_at_step
from .plan import RUNS_FOLDER
from .runs import SAMPLE_PROMPTS, SAMPLES_FILE
from .settings import Variant


COLOURS = {1: "#4d4d4d", 2: "#2b93a3", 4: "#4a5aa8", 8: "#dd9a2b"}
# Of the other modes of residual attention.
MODE_COLOURS = {MAIN.name: COLOURS[4], PROBABILITIES.name: "#2b93a3", NO_RESIDUAL.name: "#dd9a2b"}


def save_figures(evidence: Evidence, folder: Path) -> list[tuple[str, str]]:
    """Draw all figures that the recipe has the variants for.

    Returns:
        `list[tuple[str, str]]`: the name of each file and its caption.
    """
    scored = [variant for variant in evidence.plan.settings.variants if variant.residual_attention == "scores"]
    modes = [variant for variant in evidence.plan.settings.variants if variant.num_experts == MAIN.num_experts]
    figures = [
        (
            "convergence.svg",
            convergence_figure(evidence, scored),
            "Quality over training, by training steps and by operations. Lines are means over the seeds, bands reach "
            "from the lowest to the highest seed.",
        ),
        (
            "group_size.svg",
            group_size_figure(evidence, scored),
            "Quality over the time per image (one at a time) by group size, after equal compute and after equal "
            "steps. Bars are one standard deviation over the seeds.",
        ),
    ]
    if len(modes) > 1:
        caption = "Quality over training with K = 4: residual attention with scores, with probabilities, without."
        figures.append(("residual_attention.svg", convergence_figure(evidence, modes), caption))
    grids = [variant for variant in scored if evidence.runs[variant.name][0]["grid"]]
    if grids:
        caption = "Quality over steps and guidance, means over the seeds."
        figures.append(("steps_guidance.svg", grid_figure(evidence, grids), caption))
    for name, figure, _ in figures:
        save_figure(figure, folder / name)
    save_image(sample_grid(evidence, folder), folder / "samples.png")
    seed = evidence.plan.settings.seeds[0]
    caption = f"Images of the same prompts from the same noise (seed {seed} of the training), after equal compute."
    return [(name, caption) for name, _, caption in figures] + [("samples.png", caption)]


def save_figure(figure: Figure, path: Path) -> None:
    """Write an SVG file, the same bytes for the same figure."""
    with (
        matplotlib.rc_context({"svg.hashsalt": "latte_flow_hf", "svg.fonttype": "none"}),
        atomic_write(path) as partial,
    ):
        figure.savefig(partial, format="svg", metadata={"Date": None})


def colour_of(variant: Variant) -> Any:
    return MODE_COLOURS.get(variant.name) or COLOURS.get(variant.num_experts)


def convergence_figure(evidence: Evidence, variants: list[Variant]) -> Figure:
    """Rows: measures. Columns: over training steps, over operations."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(len(MEASURES), 2, sharey="row", sharex="col", squeeze=False)
    for variant in variants:
        runs = evidence.runs[variant.name]
        steps = np.array([point["step"] for point in runs[0]["points"]])
        for row, measure in enumerate(MEASURES):
            values = np.array([[measure.value(point) for point in run["points"]] for run in runs])
            for column, x in enumerate((steps, steps * evidence.plan.step_flops[variant.name])):
                axis = axes[row, column]
                (line,) = axis.plot(x, values.mean(axis=0), "o-", label=variant.label, color=colour_of(variant), ms=4)
                axis.fill_between(x, values.min(axis=0), values.max(axis=0), alpha=0.15, color=line.get_color(), lw=0)
    for row, measure in enumerate(MEASURES):
        axes[row, 0].set_ylabel(measure.label)
        if measure is FRECHET:
            for axis in axes[row]:
                axis.set_yscale("log")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("training steps")
    axes[-1, 1].set_xlabel("training operations (FLOPs)")
    axes[0, 0].legend()
    return figure


def group_size_figure(evidence: Evidence, variants: list[Variant]) -> Figure:
    """One panel for each measure; a point for each number of experts."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for axis, measure in zip(axes, MEASURES):
        for label, marker, step in (
            ("equal compute", "o-", None),
            ("equal steps", "s--", common_step(evidence, variants)),
        ):
            times, means, spreads = [], [], []
            for variant in sorted(variants, key=lambda variant: variant.num_experts):
                mean, spread = mean_and_spread(values_of(evidence, variant, measure, step))
                times.append(1000 * median_time(evidence, variant))
                means.append(mean)
                spreads.append(spread or 0.0)
            axis.errorbar(times, means, yerr=spreads, fmt=marker, capsize=3, label=label)
            if step is None:
                for variant, x, y in zip(sorted(variants, key=lambda item: item.num_experts), times, means):
                    axis.annotate(variant.label, (x, y), xytext=(5, 5), textcoords="offset points", size=8)
        axis.set(xlabel="milliseconds per image", ylabel=measure.label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def grid_figure(evidence: Evidence, variants: list[Variant]) -> Figure:
    """Rows: variants. Columns: measures. Colours and numbers: the mean over the seeds."""
    grid = evidence.plan.settings.grid
    assert grid is not None
    figure = Figure(figsize=(9, 3.2 * len(variants)), layout="constrained")
    axes = figure.subplots(len(variants), len(MEASURES), squeeze=False)
    for row, variant in enumerate(variants):
        for axis, measure in zip(axes[row], MEASURES):
            values = grid_values(evidence, variant, measure)
            axis.imshow(values, cmap="viridis" if measure is ACCURACY else "viridis_r", aspect="auto")
            middle = (values.min() + values.max()) / 2
            for (y, x), value in np.ndenumerate(values):
                is_bright = value > middle if measure is ACCURACY else value < middle
                text = f"{value:.0%}" if measure is ACCURACY else f"{value:.3g}"
                axis.text(x, y, text, ha="center", va="center", color="black" if is_bright else "white")
            axis.set_xticks(range(len(grid.guidance_scale)), [f"{scale:g}" for scale in grid.guidance_scale])
            axis.set_yticks(range(len(grid.num_inference_steps)), [str(steps) for steps in grid.num_inference_steps])
            axis.set(xlabel="guidance", ylabel="steps", title=f"{measure.label}, {variant.label}")
    return figure


def grid_values(evidence: Evidence, variant: Variant, measure: Measure) -> np.ndarray:
    """The means over the seeds: (number of steps, number of scales)."""
    grid = evidence.plan.settings.grid
    assert grid is not None
    shape = (len(grid.num_inference_steps), len(grid.guidance_scale))
    cells = [[measure.value(cell) for cell in run["grid"]] for run in evidence.runs[variant.name]]
    return np.mean(cells, axis=0).reshape(shape)


def sample_grid(evidence: Evidence, folder: Path, scale: int = 2) -> Image.Image:
    """The samples of the first seed, a row for each variant, with labels and prompts."""
    settings, line, left = evidence.plan.settings, 14, 130
    font = ImageFont.load_default(11)
    rows = []
    for variant in settings.variants:
        with Image.open(folder / RUNS_FOLDER / f"{variant.name}-seed-{settings.seeds[0]}" / SAMPLES_FILE) as image:
            rows.append(image.convert("RGB").resize((scale * image.width, scale * image.height)))
    side, top = rows[0].height, 4 * line
    grid = Image.new("RGB", (left + rows[0].width, top + len(rows) * (side + 4)), "white")
    drawing = ImageDraw.Draw(grid)
    for column, prompt in enumerate(SAMPLE_PROMPTS):
        words, lines = prompt.split(), [""]
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if drawing.textlength(longer, font) <= side - 4:
                lines[-1] = longer
            else:
                lines.append(word)
        drawing.text((left + column * side + 2, 2), "\n".join(lines), fill="black", font=font)
    for index, (variant, row) in enumerate(zip(settings.variants, rows)):
        y = top + index * (side + 4)
        grid.paste(row, (left, y))
        drawing.text((4, y + side // 2 - line // 2), variant.label, fill="black", font=font)
    return grid


def common_step(evidence: Evidence, variants: list[Variant]) -> int:
    """The last step of the variant that has the fewest."""
    return min(evidence.runs[variant.name][0]["points"][-1]["step"] for variant in variants)


def values_of(evidence: Evidence, variant: Variant, measure: Measure, step: int | None = None) -> list[float]:
    """The values of all seeds, at the end of the budget or after `step` steps."""
    runs = evidence.runs[variant.name]
    if step is None:
        return [measure.value(run["points"][-1]) for run in runs]
    return [value_at_step(run["points"], step, measure) for run in runs]


def median_time(evidence: Evidence, variant: Variant) -> float:
    """Seconds per image, one image at a time."""
    rounds = evidence.timing["rounds"][str(min(evidence.plan.settings.timing.batch_sizes))][variant.name]
    return statistics.median(item["wall"] for item in rounds)
