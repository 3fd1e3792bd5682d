# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""How many evaluations of the model a picture needs: solvers and allocations at equal counts, by prompt accuracy.

    python benchmarks/few_steps.py -o outputs/few_steps.json

Every row paints the same prompts from the same noise; the oracle of the tiny world reads the pictures back.
"""

import argparse
import json
from pathlib import Path

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_painting, painting_prompts


# (solver, arguments of the call); Heun evaluates twice a step but for the last. The first row is what others lose to.
ROWS: list[tuple[str, dict]] = [
    ("euler", {"num_inference_steps": 40}),
    *((solver, {"num_inference_steps": 20}) for solver in ("euler", "multistep")),
    ("heun", {"num_inference_steps": 10}),
    ("multistep", {"steps_per_expert": [3, 3, 4, 10]}),
    ("multistep", {"steps_per_expert": [4, 4, 5, 7]}),
    *((solver, {"num_inference_steps": 10}) for solver in ("euler", "multistep")),
    ("heun", {"num_inference_steps": 5}),
    ("multistep", {"steps_per_expert": [2, 2, 2, 4]}),
    ("multistep", {"steps_per_expert": [2, 2, 3, 3]}),
]


def measure(pipe: LatteFlowPipeline, solver: str, call: dict, prompts: dict, seed: int) -> dict:
    """One row: evaluations of the model a picture, the share of prompts painted right by kind, and over all."""
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, solver=solver)
    found = evaluate_painting(pipe, prompts, seed=seed, **call)
    counts = {kind: result["count"] for kind, result in found.items()}
    return {
        "solver": solver,
        **call,
        "evaluations": pipe.num_timesteps,
        "right": {kind: result["right"] for kind, result in found.items()},
        "all": sum(result["right"] * counts[kind] for kind, result in found.items()) / sum(counts.values()),
    }


def as_markdown(rows: list[dict]) -> str:
    """The rows as a table; the last column is what is lost to the first row, in points."""
    kinds = list(rows[0]["right"])
    lines = [
        f"| Solver | Steps | Evaluations | {' | '.join(kinds)} | all | lost |",
        f"|---|---|---|{'---|' * len(kinds)}---|---|",
    ]
    for row in rows:
        steps = row.get("steps_per_expert", row.get("num_inference_steps"))
        shares = " | ".join(f"{row['right'][kind]:.1%}" for kind in kinds)
        lost = 100 * (rows[0]["all"] - row["all"])
        lines.append(
            f"| {row['solver']} | {steps} | {row['evaluations']} | {shares} | {row['all']:.1%} | {lost:+.1f} |"
        )
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
    prompts = painting_prompts(options.seed)
    rows = []
    for solver, call in ROWS:
        rows.append(measure(pipe, solver, call, prompts, options.seed))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1))
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
