# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How many evaluations of the model a picture needs: solvers and allocations at equal counts, by prompt accuracy.

    python benchmarks/few_steps.py -o outputs/few_steps.json

Every row paints the same prompts from the same noise; the oracle of the tiny world reads the pictures back.
"""

import argparse
import json
from pathlib import Path

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts


# (arguments of the scheduler, arguments of the call); Heun evaluates twice a step but for the last. The first row is
# what others lose to: 40 steps with the checkpoint's own share of new noise. Where a row says PLAIN, none is drawn.
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
    """One row: evaluations of the model a picture, the share of prompts painted right by kind, and over all."""
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, **scheduler)
    found = evaluate_generation(pipe, prompts, seed=seed, **call)
    counts = {kind: result["count"] for kind, result in found.items()}
    return {
        "solver": pipe.scheduler.config.solver,
        "new_noise": pipe.scheduler.config.stochastic_sampling,
        **call,
        "evaluations": pipe.num_timesteps,
        "right": {kind: result["right"] for kind, result in found.items()},
        "all": sum(result["right"] * counts[kind] for kind, result in found.items()) / sum(counts.values()),
    }


def as_markdown(rows: list[dict]) -> str:
    """The rows as a table; the last column is what is lost to the first row, in points."""
    kinds = list(rows[0]["right"])
    lines = [
        f"| Solver | New noise | Steps | Evaluations | {' | '.join(kinds)} | all | lost |",
        f"|---|---|---|---|{'---|' * len(kinds)}---|---|",
    ]
    for row in rows:
        steps = row.get("steps_per_expert", row.get("num_inference_steps"))
        shares = " | ".join(f"{row['right'][kind]:.1%}" for kind in kinds)
        lost = 100 * (rows[0]["all"] - row["all"])
        how = f"{row['solver']} | {row['new_noise'] or 'none'} | {steps} | {row['evaluations']}"
        lines.append(f"| {how} | {shares} | {row['all']:.1%} | {lost:+.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON with all rows; a table is printed.")
    parser.add_argument(
        "-m", "--model", default=None, help="A pipeline's folder; the embedded checkpoint if left out."
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pipe = LatteFlowPipeline.from_pretrained(options.model or tiny_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    prompts = generation_prompts(options.seed)
    rows = []
    own = pipe.scheduler
    for scheduler, call in ROWS:
        pipe.scheduler = own
        rows.append(measure(pipe, scheduler, call, prompts, options.seed))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
