# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How many evaluations of the model an image needs: solvers and allocations of steps, compared by accuracy.

    python benchmarks/few_steps.py -o outputs/few_steps.json

Every row generates images for the same prompts from the same noise; the oracle of the tiny world checks them.
"""

import argparse
from pathlib import Path
from typing import Any

from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file for all rows; a table is printed.")
    parser.add_argument(
        "-m", "--model", default=None, help="Folder of a pipeline; defaults to the embedded checkpoint."
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pipe = LatteFlowPipeline.from_pretrained(options.model or tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
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
