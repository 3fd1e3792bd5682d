# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The report: the same blocks as Markdown and as HTML, with the figures beside them."""

import html
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files import atomic_write, read_json
from .claims import Claim, Evidence, judge_claims
from .figures import common_step, grid_values, save_figures, values_of
from .measures import ACCURACY, FRECHET, MEASURES, mean_and_spread
from .plan import STUDY_FILE, Plan
from .quality import distance_of_drawn_images
from .timing import TIMING_FILE, waiting_share


MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

# Chosen: what a quiet machine does not reach.
_MAX_WAITING = 0.05

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    "img{max-width:100%}pre,code{background:#f4f4f4}pre{padding:.6rem;overflow-x:auto}"
)


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text; `code` in backticks and **bold** are the only markup."""

    text: str


@dataclass(frozen=True)
class Code:
    lines: list[str]


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    file: str
    caption: str


Block = Heading | Paragraph | Code | Table | Figure


def write_report(folder: Path, plan: Plan, results: dict[str, Any], timing: dict[str, Any]) -> Path:
    """Write `report.md`, `report.html` and the figures into `folder`, from finished results.

    Returns:
        `Path`: `report.md`.
    """
    evidence = Evidence(plan, results, timing, distance_of_drawn_images(plan.settings, folder))
    figures = [Figure(*figure) for figure in save_figures(evidence, folder)]
    starting_model = read_json(folder / STUDY_FILE)["starting_model"]
    blocks = compose(evidence, judge_claims(evidence), figures, starting_model)
    for name, text in ((MARKDOWN_FILE, to_markdown(blocks)), (HTML_FILE, to_html(blocks))):
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / MARKDOWN_FILE


def to_markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Code(lines):
                parts.append("\n".join(["```text", *lines, "```"]))
            case Table(header, rows):
                table = [header, ["---"] * len(header), *rows]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
            case Figure(file, caption):
                parts.append(f"![{caption.split('.')[0]}]({file})\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    def inline(text: str) -> str:
        text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text))
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)

    def row(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{inline(cell)}</{tag}>' for cell in cells)}</tr>"

    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{inline(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{inline(text)}</p>")
            case Code(lines):
                parts.append(f"<pre>{html.escape(chr(10).join(lines))}</pre>")
            case Table(header, rows):
                parts.append(
                    "\n".join(["<table>", row(header, "th"), *(row(cells, "td") for cells in rows), "</table>"])
                )
            case Figure(file, caption):
                text = html.escape(caption)
                parts.append(f'<figure><img src="{file}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    title = next(block.text for block in blocks if isinstance(block, Heading))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def compose(
    evidence: Evidence, claims: list[Claim], figures: list[Figure], starting_model: dict[str, str]
) -> list[Block]:
    """All blocks of the report. `starting_model` has the hashes of its parts, as in `study.json`."""
    settings = evidence.plan.settings
    start = "the embedded checkpoint" if settings.pipeline == "tinyworld" else f"`{settings.pipeline}`"
    hashes = " and ".join(f"`{starting_model[part][:12]}`" for part in ("backbone", "autoencoder"))
    num_seeds = len(settings.seeds)
    variants = settings.variants
    images = {figure.file: figure for figure in figures}
    spread = "mean ± standard deviation over the seeds" if num_seeds > 1 else "one seed, no spread"

    def show(name: str) -> list[Block]:
        return [images[name]] if name in images else []

    blocks: list[Block] = [
        Heading(1, "The paper's comparisons on the tiny world"),
        Paragraph(
            f"{len(variants)} networks, {num_seeds} {'seeds' if num_seeds > 1 else 'seed'} each, with the same data, "
            f"frozen backbone and autoencoder, and {settings.budget:.3g} floating-point operations (FLOPs) of "
            f"training for every run. Backbone and autoencoder are those of {start} (their hashes begin with "
            f"{hashes}): the networks are hundreds of times smaller than the paper's, and what holds here need not "
            "hold there, nor the other way round. Made by `latte-flow reproduce`, with the recipe at the end."
        ),
        Heading(2, "Verdicts"),
        Table(
            ["", "Claim of the paper", "Verdict", "Measured"],
            [
                [
                    str(number),
                    claim.statement,
                    f"**{claim.verdict}**",
                    "; ".join(finding.text for finding in claim.findings),
                ]
                for number, claim in enumerate(claims, 1)
            ],
        ),
        Paragraph(
            "How to read them: for each seed and measure there is one difference between two networks, which have the "
            "same data, prompts and noise. The interval is the 95% interval of the mean difference, by Student's t "
            "distribution. A claim says where the true difference lies. It **holds here** if the whole interval lies "
            "there, it **does not hold here** if the whole interval lies elsewhere, and otherwise these runs **cannot "
            "tell**. With two measures, a claim holds if both say so, and does not hold if one says so and the other "
            "does not contradict. One seed has no spread and decides nothing. Ratios of times have an interval over "
            "rounds in which the networks take turns; operations are counted and have none. Nothing is corrected for "
            f"judging {len(claims)} claims: one in twenty intervals misses its true value by chance."
        ),
        Table(
            ["", "Compared", "Verdict by measure"],
            [
                [str(number), claim.criterion, "; ".join(finding.verdict for finding in claim.findings)]
                for number, claim in enumerate(claims, 1)
            ],
        ),
        Heading(2, "Quality over training"),
        *show("convergence.svg"),
        Paragraph(
            f"After equal compute ({spread}). Accuracy: the share of images in which the oracle of the tiny world "
            "finds what the prompt asks for. Fréchet distance: to drawn images, in the features of the embedded "
            "checkpoint's vision tower; smaller is better, and it cannot be compared with FID. It falls with the "
            f"number of images: {settings.evaluation.num_prompts} drawn images, which are perfect, have a distance of "
            f"{evidence.drawn_distance:.2f} themselves. Near it, different networks have similar distances."
        ),
        _compute_table(evidence),
        Paragraph(
            f"After equal steps, {common_step(evidence, variants):,} for all; between the measured points, linear "
            f"over the logarithm of the steps ({spread})."
        ),
        _steps_table(evidence),
        Heading(2, "Group size and time"),
        *show("group_size.svg"),
        _timing_table(evidence),
        Paragraph(_describe_load(evidence)),
        Heading(2, "Residual attention"),
        *(show("residual_attention.svg") or [Paragraph("Not compared by this recipe.")]),
        Heading(2, "Steps and guidance"),
        *(show("steps_guidance.svg") or [Paragraph("Not measured by this recipe.")]),
        *_grid_tables(evidence),
        Heading(2, "Images"),
        *show("samples.png"),
        Heading(2, "How it was made"),
        *_origin(evidence),
    ]
    return blocks


def _with_spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    mean, spread = mean_and_spread([scale * value for value in values])
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form}}")


def _compute_table(evidence: Evidence) -> Table:
    plan = evidence.plan
    kinds = list(evidence.runs[plan.settings.variants[0].name][0]["points"][-1]["accuracy"])
    rows = []
    for variant in plan.settings.variants:
        points = [run["points"][-1] for run in evidence.runs[variant.name]]
        rows.append(
            [
                variant.label,
                f"{points[0]['step']:,}",
                f"{plan.step_flops[variant.name] / 1e9:.2f}",
                *(_with_spread([point["accuracy"][kind] for point in points], ".1f", 100) for kind in kinds),
                _with_spread([FRECHET.value(point) for point in points], ".3g"),
            ]
        )
    counts = evidence.runs[plan.settings.variants[0].name][0]["points"][-1]["count"]
    header = [f"{kind} ({counts[kind]}), %" for kind in kinds]
    return Table(["Network", "Steps", "GFLOPs per step", *header, "Fréchet distance"], rows)


def _steps_table(evidence: Evidence) -> Table:
    variants = evidence.plan.settings.variants
    step = common_step(evidence, variants)
    rows = [
        [
            variant.label,
            _with_spread(values_of(evidence, variant, ACCURACY, step), ".1f", 100),
            _with_spread(values_of(evidence, variant, FRECHET, step), ".3g"),
        ]
        for variant in variants
    ]
    return Table(["Network", "accuracy, %", "Fréchet distance"], rows)


def _timing_table(evidence: Evidence) -> Table:
    timing = evidence.timing
    sizes = sorted(map(int, timing["rounds"]))
    header = ["Network", "Trained parameters", "GFLOPs per image", "of them the steps"]
    header += [f"ms per image, batch {size}: median (quartiles); CPU" for size in sizes]
    rows = []
    for variant in evidence.plan.settings.variants:
        flops = timing["flops"][variant.name]
        row = [
            variant.label,
            f"{evidence.plan.parameters[variant.name] / 1e6:.2f} M",
            f"{flops['image'] / 1e9:.2f}",
            f"{flops['loop'] / 1e9:.2f}",
        ]
        for size in sizes:
            rounds = timing["rounds"][str(size)][variant.name]
            low, median, high = statistics.quantiles([1000 * item["wall"] for item in rounds], n=4, method="inclusive")
            cpu = statistics.median(1000 * item["cpu"] for item in rounds)
            row.append(f"{median:.1f} ({low:.1f} to {high:.1f}); {cpu:.1f}")
        rows.append(row)
    return Table(header, rows)


def _describe_load(evidence: Evidence) -> str:
    """What else the machine did while times were measured."""
    timing = evidence.timing
    text = (
        f"The load average of the machine was {timing['load_average']:.1f} in the last minute of these measurements, "
        "their own process included."
    )
    if evidence.plan.device != "cpu":
        return text
    share = waiting_share(timing)
    text += f" The process waited for the processor for {share:.0%} of the time."
    if share > _MAX_WAITING:
        text += (
            " **Other programs ran meanwhile**: the times are longer than those of this machine alone, and only their "
            f"ratios can be used. To measure them again, remove `{TIMING_FILE}` and start the command again."
        )
    return text


def _grid_tables(evidence: Evidence) -> list[Block]:
    grid = evidence.plan.settings.grid
    blocks: list[Block] = []
    if grid is None:
        return blocks
    for variant in evidence.plan.settings.variants:
        if not evidence.runs[variant.name][0]["grid"]:
            continue
        for measure in MEASURES:
            values = grid_values(evidence, variant, measure)
            scale, form = (100, ".1f") if measure is ACCURACY else (1, ".3g")
            unit = ", %" if measure is ACCURACY else ""
            rows = [
                [str(steps), *(f"{scale * value:{form}}" for value in row)]
                for steps, row in zip(grid.num_inference_steps, values)
            ]
            header = ["steps", *(f"guidance {value:g}" for value in grid.guidance_scale)]
            blocks += [Paragraph(f"{variant.label}: {measure.label}{unit}, mean over the seeds."), Table(header, rows)]
    return blocks


def _origin(evidence: Evidence) -> list[Block]:
    plan, timing = evidence.plan, evidence.timing
    runs = [run for runs in evidence.runs.values() for run in runs]
    versions = sorted({json.dumps(run["versions"], sort_keys=True) for run in [*runs, timing]})
    lines = [", ".join(f"{name} {version}" for name, version in json.loads(item).items()) for item in versions]
    rows = []
    for variant in plan.settings.variants:
        totals = [_seconds(run) for run in evidence.runs[variant.name]]
        cells = [
            _with_spread([total[part][clock] / 60 for total in totals], ".1f")
            for part in ("training", "evaluation")
            for clock in ("cpu", "wall")
        ]
        rows.append([variant.label, *cells])
    sums = {
        clock: sum(_seconds(run)[part][clock] for run in runs for part in ("training", "evaluation")) / 60
        for clock in ("cpu", "wall")
    }
    settings = plan.settings
    evaluation, times = settings.evaluation, settings.timing
    return [
        Paragraph(
            f"On {timing['device']} ({plan.device}), with {'; '.join(lines)}. All runs together took "
            f"{sums['cpu']:.0f} minutes of processor time; one after the other they would have taken "
            f"{sums['wall']:.0f} minutes. Minutes per run, with others beside it:"
        ),
        Table(["Network", "training, CPU", "training, wall", "evaluation, CPU", "evaluation, wall"], rows),
        Paragraph(
            "Initial weights, training images, order and noise depend on the seed "
            f"({', '.join(map(str, settings.seeds))}). "
            "Operations are counted by PyTorch on one training step of each network, forward and backward; each run "
            "has as many steps as the budget pays for. Evaluated are the moving averages of the weights, with "
            f"{evaluation.num_inference_steps} steps and guidance {evaluation.guidance_scale:g}, on "
            f"{evaluation.num_prompts} prompts, the same for all, with noise that "
            f"depends on the seed. The Fréchet distance compares with {evaluation.num_reference_images} drawn images. "
            f"Times are those of {times.num_inference_steps} steps with guidance {times.guidance_scale:g}, from the "
            f"prompt to the decoded image, with {timing['num_threads']} thread(s), in {times.num_rounds} rounds. "
            "Learning rate and batch are the same for all networks and were not tuned for each."
        ),
        Paragraph("The recipe:"),
        Code(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=110).splitlines()),
    ]


def _seconds(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The seconds of a run by part and clock. A training that was stopped while it saved its result has none."""
    parts = {
        part: [point["seconds"][part] for point in run["points"] if point["seconds"][part] is not None]
        for part in ("training", "evaluation")
    }
    parts["evaluation"].append(run["grid_seconds"])
    return {
        part: {clock: sum(item[clock] for item in items) for clock in ("cpu", "wall")} for part, items in parts.items()
    }
