# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How many evaluations of the model an image needs: solvers and allocations of steps, compared by accuracy.

    python benchmarks/few_steps.py -o outputs/few_steps.json
    python benchmarks/few_steps.py -o outputs/distilled.json --distilled FULL --lora ADAPTER --figure few_steps.svg

Every row generates images for the same prompts from the same noise; the oracle of the tiny world checks them. With
`--distilled` or `--lora`, models that were distilled to few steps are compared with the guided checkpoint at 40, 20
and 10 steps, also in time and in the diversity of the images of a prompt; `--figure` plots them.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, evaluate_variety, generation_prompts
from latte_flow_hf.files import write_json


# (name, scheduler, changes of the checkpoint's configuration, arguments of the call). Heun evaluates the model twice
# per step, except in the last one. The first row is the reference: 40 steps with the checkpoint's share of new noise.
PLAIN = {"new_noise": 0.0}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SDE = {**FLOW, "algorithm_type": "sde-dpmsolver++"}
ROWS: list[tuple[str, Any, dict, dict]] = [
    ("Euler", LatteFlowScheduler, {}, {"num_inference_steps": 40}),
    ("Euler", LatteFlowScheduler, PLAIN, {"num_inference_steps": 40}),
    ("Euler", LatteFlowScheduler, {"new_noise": 1.0}, {"num_inference_steps": 40}),
    ("Euler", LatteFlowScheduler, {}, {"num_inference_steps": 20}),
    ("Euler", LatteFlowScheduler, PLAIN, {"num_inference_steps": 20}),
    ("UniPC", UniPCMultistepScheduler, FLOW, {"num_inference_steps": 20}),
    ("DPM++ 2M SDE", DPMSolverMultistepScheduler, SDE, {"num_inference_steps": 20}),
    ("Heun", LatteFlowScheduler, {**PLAIN, "solver": "heun"}, {"num_inference_steps": 10}),
    ("Euler", LatteFlowScheduler, {}, {"num_inference_steps": 10}),
    ("Euler", LatteFlowScheduler, PLAIN, {"num_inference_steps": 10}),
    ("UniPC", UniPCMultistepScheduler, FLOW, {"num_inference_steps": 10}),
    ("DPM++ 2M", DPMSolverMultistepScheduler, FLOW, {"num_inference_steps": 10}),
    ("DEIS", DEISMultistepScheduler, FLOW, {"num_inference_steps": 10}),
    ("LCM", FlowMatchLCMScheduler, {}, {"num_inference_steps": 10}),
    ("Euler", LatteFlowScheduler, PLAIN, {"steps_per_expert": [3, 2, 2, 3]}),
    ("Heun", LatteFlowScheduler, {**PLAIN, "solver": "heun"}, {"num_inference_steps": 5}),
    ("Heun of diffusers", FlowMatchHeunDiscreteScheduler, {}, {"num_inference_steps": 5}),
    ("UniPC", UniPCMultistepScheduler, FLOW, {"num_inference_steps": 5}),
    ("DPM++ 2M", DPMSolverMultistepScheduler, FLOW, {"num_inference_steps": 5}),
]


def measure(
    pipe: LatteFlowPipeline, name: str, scheduler: Any, changes: dict, call: dict, prompts: dict, seed: int
) -> dict:
    """One row: the number of evaluations per image, and the accuracy by kind and over all prompts."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes)
    results = evaluate_generation(pipe, prompts, seed=seed, **call)
    counts = {kind: result["count"] for kind, result in results.items()}
    return {
        "solver": name,
        "new_noise": pipe.scheduler.config.new_noise if scheduler is LatteFlowScheduler else None,
        **call,
        "evaluations": pipe.num_timesteps,
        "accuracy": {kind: result["accuracy"] for kind, result in results.items()},
        "all": sum(result["accuracy"] * counts[kind] for kind, result in results.items()) / sum(counts.values()),
    }


def as_markdown(rows: list[dict]) -> str:
    """The rows as a table; the last column is the loss against the first row, in percentage points."""
    kinds = list(rows[0]["accuracy"])
    lines = [
        f"| Solver | New noise | Steps | Evaluations | {' | '.join(kinds)} | all | lost |",
        f"|---|---|---|---|{'---|' * len(kinds)}---|---|",
    ]
    for row in rows:
        steps = row.get("steps_per_expert", row.get("num_inference_steps"))
        accuracies = " | ".join(f"{row['accuracy'][kind]:.1%}" for kind in kinds)
        lost = 100 * (rows[0]["all"] - row["all"])
        new_noise = "-" if row["new_noise"] is None else row["new_noise"] or "none"
        columns = f"{row['solver']} | {new_noise} | {steps} | {row['evaluations']}"
        lines.append(f"| {columns} | {accuracies} | {row['all']:.1%} | {lost:+.1f} |")
    return "\n".join(lines)


# Of each kind of prompt, for the diversity of the images of a prompt.
VARIETY_PROMPTS = {
    "one object": ("a red circle", "a white cross", "a purple triangle"),
    "two objects": ("a red circle left of a blue square", "a green cross above a yellow triangle"),
    "digit": ("a handwritten three", "a handwritten seven", "a handwritten nine"),
}


def measure_variety(pipe: LatteFlowPipeline, **call: Any) -> dict[str, float]:
    """By kind of prompt, the mean distance between the pixels of two images of a prompt, of 16 seeds."""
    distances: dict[str, float] = {}
    for kind, prompts in VARIETY_PROMPTS.items():
        results = [evaluate_variety(pipe, prompt, **call) for prompt in prompts]
        if any(result["num_distinct"] < result["num_images"] for result in results):
            print(f"{kind}: equal images from different noise: {results}")
        distances[kind] = sum(result["mean_distance"] for result in results) / len(results)
    return distances


def measure_seconds(pipe: LatteFlowPipeline, clock: Any, repeats: int = 5, **call: Any) -> float:
    """The shortest time for one image, from the prompt to PIL."""
    seconds = []
    for _ in range(repeats + 1):
        start = clock()
        pipe("a red circle left of a blue square", generator=torch.Generator().manual_seed(0), **call)
        seconds.append(clock() - start)
    return min(seconds[1:])


def load(folder: str, device: str | None, lora: str | None = None) -> LatteFlowPipeline:
    pipe = LatteFlowPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        # As `--fast` does.
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe if device is None else pipe.to(device)


def compare_distilled(options: argparse.Namespace) -> list[dict]:
    """The rows of the guided checkpoint, and of each distilled folder or adapter, whose steps are its own."""
    base = options.model or tiny_checkpoint()
    models = [("guided", base, None, {"num_inference_steps": steps}) for steps in (40, 20, 10)]
    models += [("distilled", folder, None, {}) for folder in options.distilled]
    models += [("adapter, fused", base, folder, {}) for folder in options.lora]
    rows = []
    prompts = generation_prompts(options.seed)
    for name, folder, lora, call in models:
        pipe = load(folder, options.device, lora)
        results = evaluate_generation(pipe, prompts, seed=options.seed, batch_size=options.batch_size, **call)
        guided = 2 if pipe.do_classifier_free_guidance else 1
        counts = {kind: result["count"] for kind, result in results.items()}
        accuracy = {kind: result["accuracy"] for kind, result in results.items()}
        variety = measure_variety(pipe, **call)
        rows.append(
            {
                "model": name,
                "folder": lora or folder,
                "evaluations": guided * pipe.num_timesteps,
                "seconds": measure_seconds(pipe, time.process_time if options.cpu_time else time.perf_counter, **call),
                "accuracy": accuracy,
                "all": sum(accuracy[kind] * counts[kind] for kind in counts) / sum(counts.values()),
                "variety": variety,
                "diversity": {
                    kind: variety[kind] / (rows[0] if rows else {"variety": variety})["variety"][kind]
                    for kind in variety
                },
            }
        )
        write_json(rows, options.output)
    return rows


def distilled_as_markdown(rows: list[dict]) -> str:
    """The rows as a table. Diversity is relative to the first row."""
    kinds, varieties = list(rows[0]["accuracy"]), list(rows[0]["diversity"])
    columns = ["Model", "Evaluations", "Seconds", *kinds, "all", "lost", *(f"diversity, {kind}" for kind in varieties)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["model"], str(row["evaluations"]), f"{row['seconds']:.3f}"]
        cells += [f"{row['accuracy'][kind]:.1%}" for kind in kinds]
        cells += [f"{row['all']:.1%}", f"{100 * (rows[0]['all'] - row['all']):+.1f}"]
        cells += [f"{row['diversity'][kind]:.2f}" for kind in varieties]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_distilled(rows: list[dict], path: Path) -> None:
    """Accuracy against evaluations, and against seconds per image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, quantity, label in zip(axes, ("evaluations", "seconds"), ("evaluations per image", "seconds per image")):
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == name]
            axis.plot([row[quantity] for row in own], [100 * row["all"] for row in own], "o-", label=name)
        axis.set_xscale("log")
        axis.set_xticks(values := sorted({row[quantity] for row in rows}), [f"{value:.2g}" for value in values])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("correct images, %")
    axes[0].set_ylim(min(90, min(100 * row["all"] for row in rows) - 1), 100)
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file for all rows; a table is printed.")
    parser.add_argument(
        "-m", "--model", default=None, help="Folder of a pipeline; defaults to the embedded checkpoint."
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--distilled", action="append", default=[], help="Folder of a distilled pipeline; repeatable.")
    parser.add_argument("--lora", action="append", default=[], help="Few-step adapter of the model; repeatable.")
    parser.add_argument("--figure", type=Path, default=None, help="File for a plot of the distilled models.")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="Processor seconds per image, for one thread on a machine that is busy.",
    )
    parser.add_argument("--device", default=None, help="Such as cuda; the CPU if left out.")
    parser.add_argument("--batch-size", type=int, default=50, help="Images generated at once.")
    options = parser.parse_args()
    if options.distilled or options.lora:
        distilled_rows = compare_distilled(options)
        print(distilled_as_markdown(distilled_rows))
        if options.figure is not None:
            plot_distilled(distilled_rows, options.figure)
        return
    pipe = load(options.model or tiny_checkpoint(), options.device)
    prompts = generation_prompts(options.seed)
    rows = []
    checkpoint_scheduler = pipe.scheduler
    for name, scheduler, changes, call in ROWS:
        pipe.scheduler = checkpoint_scheduler
        rows.append(measure(pipe, name, scheduler, changes, call, prompts, options.seed))
        write_json(rows, options.output)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
