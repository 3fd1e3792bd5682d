# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How many evaluations of the model an image needs: solvers and allocations of steps, compared by accuracy.

    python benchmarks/few_steps.py -o outputs/few_steps.json

Every row generates images for the same prompts from the same noise; the oracle of the tiny world checks them.
"""

import argparse
from pathlib import Path

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts
from latte_flow_hf.files import write_json


# (arguments of the scheduler, arguments of the call). Heun evaluates the model twice per step, except in the last one.
# The first row is the reference: 40 steps with the checkpoint's share of new noise. PLAIN rows have no new noise.
PLAIN = {"stochastic_sampling": False}
ROWS: list[tuple[dict, dict]] = [
    ({}, {"num_inference_steps": 40}),
    (PLAIN, {"num_inference_steps": 40}),
    ({"stochastic_sampling": True}, {"num_inference_steps": 40}),
    ({}, {"num_inference_steps": 20}),
    (PLAIN, {"num_inference_steps": 20}),
    ({**PLAIN, "solver": "multistep"}, {"num_inference_steps": 20}),
    ({**PLAIN, "solver": "heun"}, {"num_inference_steps": 10}),
    ({}, {"num_inference_steps": 10}),
    (PLAIN, {"num_inference_steps": 10}),
    ({**PLAIN, "solver": "multistep"}, {"num_inference_steps": 10}),
    ({**PLAIN, "solver": "multistep"}, {"steps_per_expert": [3, 2, 2, 3]}),
    ({**PLAIN, "solver": "heun"}, {"num_inference_steps": 5}),
]


def measure(pipe: LatteFlowPipeline, scheduler: dict, call: dict, prompts: dict, seed: int) -> dict:
    """One row: the number of evaluations per image, and the accuracy by kind and over all prompts."""
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, **scheduler)
    results = evaluate_generation(pipe, prompts, seed=seed, **call)
    counts = {kind: result["count"] for kind, result in results.items()}
    return {
        "solver": pipe.scheduler.config.solver,
        "new_noise": pipe.scheduler.config.stochastic_sampling,
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
        columns = f"{row['solver']} | {row['new_noise'] or 'none'} | {steps} | {row['evaluations']}"
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
    for scheduler, call in ROWS:
        pipe.scheduler = checkpoint_scheduler
        rows.append(measure(pipe, scheduler, call, prompts, options.seed))
        write_json(rows, options.output)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
