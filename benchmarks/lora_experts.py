# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Which experts matter for a new concept: LoRA on several choices of them, judged on new and on old prompts.

Each row of the table is an adapter of its own, trained with the same pictures, steps and batch. A row is written as it
is finished, and a run that is started again goes on with the rows that are missing.
"""

import argparse
import json
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments, set_seed

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts
from latte_flow_hf.tinyworld.build import Paintings
from latte_flow_hf.tinyworld.datasets import Pictures
from latte_flow_hf.tinyworld.oracle import read_digit, read_scene
from latte_flow_hf.tinyworld.questions import parse_prompt
from latte_flow_hf.tinyworld.shapes import (
    ALL_OBJECTS,
    COLOURS,
    RELATIONS,
    SHAPES,
    Scene,
    WiderObject,
    draw_scene,
    place_objects,
)
from latte_flow_hf.training import TextToImageCollator, encode_prompts, expert_lora_config


@dataclass(frozen=True)
class Settings:
    """What `recipes/tinyworld/lora_experts.yaml` holds.

    Args:
        seed (`int`): of pictures, initial weights and noise.
        concept (`str`): the new colour or shape.
        rows (`list[str]`): `"autoencoder"` (drawn pictures that it alone takes there and back: what the adapters learn
            from), `"none"`, `"all"`, or experts joined by `+`.
        lora (`dict`): arguments of `expert_lora_config`.
        data (`dict`): `num_pictures`, `new_share`, `prompt_dropout`.
        training (`dict`): arguments of `TrainingArguments`.
        evaluation (`dict`): `new` (number of prompts), `old` (arguments of `generation_prompts`), `scheduler` (changes
            to the checkpoint's), `call` (of the pipeline).
    """

    seed: int
    concept: str
    rows: list
    lora: dict
    data: dict
    training: dict
    evaluation: dict

    def __post_init__(self) -> None:
        concepts = [word for word in (*WiderObject.colours, *WiderObject.shapes) if word not in (*COLOURS, *SHAPES)]
        if self.concept not in concepts:
            raise ValueError(f"concept must be one of {concepts}, got {self.concept!r}.")

    @classmethod
    def from_yaml(cls, path: Path) -> "Settings":
        """Read the settings.

        Raises:
            `ValueError`: if a field is unknown or missing, or the concept is not a new one.
        """
        found = yaml.safe_load(path.read_text())
        known = {item.name for item in fields(cls)}
        if not isinstance(found, dict) or set(found) != known:
            names = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"settings {path}: expected exactly the fields {sorted(known)}, found {names}.")
        return cls(**found)


def sample_new_scene(rng: np.random.Generator, concept: str) -> Scene:
    """One object with the new colour or shape (one third), or two of which one has it."""
    if concept in WiderObject.shapes:
        new = [WiderObject(colour, concept) for colour in COLOURS]
    else:
        new = [WiderObject(concept, shape) for shape in SHAPES]
    first = new[rng.integers(len(new))]
    if rng.random() < 1 / 3:
        return Scene((first,))
    # Held-out pairs stay unseen in pictures of two objects, or the old prompts would be judged on what was taught.
    old = [item for item in ALL_OBJECTS if not item.held_out]
    picked = old[rng.integers(len(old))]
    objects = (first, WiderObject(picked.colour, picked.shape))
    return Scene(objects if rng.random() < 0.5 else objects[::-1], list(RELATIONS)[rng.integers(len(RELATIONS))])


def shows_in_wider_world(image: Image.Image, wanted: Scene | int) -> bool:
    """Whether `image` shows `wanted`, by an oracle that knows the new colour and shape as well as the old ones."""
    if isinstance(wanted, int):
        return read_digit(image) == wanted
    seen = read_scene(image, WiderObject)
    return seen is not None and seen.prompt == wanted.canonical.prompt


def prepare_paintings(pipe: LatteFlowPipeline, settings: Settings, folder: Path) -> Paintings:
    """Latents and prompts of new and old pictures, encoded once."""
    if not folder.exists():
        data, old = settings.data, Pictures(settings.seed, settings.data["num_pictures"])
        examples = []
        for index in range(data["num_pictures"]):
            rng = np.random.default_rng((settings.seed, index, 1))
            if rng.random() < data["new_share"]:
                scene = sample_new_scene(rng, settings.concept)
                examples.append({"image": draw_scene(scene, place_objects(scene, rng)), "prompt": scene.prompt})
            else:
                examples.append(old[index])
        images = [example["image"] for example in examples]
        latents = [pipe.encode_images(images[start : start + 64]) for start in range(0, len(images), 64)]
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents).contiguous()}, partial / "latents.safetensors")
        (partial / "prompts.json").write_text(json.dumps([example["prompt"] for example in examples]))
        partial.rename(folder)
    return Paintings(folder)


def train_adapter(
    pipe: LatteFlowPipeline, experts: list[int], settings: Settings, paintings: Paintings, contexts, folder: Path
) -> dict:
    """Train an adapter of `experts` and leave it in `folder`; the pipeline is as before."""
    set_seed(settings.seed)
    pipe.model.add_adapter(expert_lora_config(pipe.model, experts, **settings.lora), "concept")
    parameters = sum(parameter.numel() for parameter in pipe.model.parameters() if parameter.requires_grad)
    trainer = Trainer(
        pipe.model,
        TrainingArguments(
            output_dir=str(folder.with_name(folder.name + ".run")),
            seed=settings.seed,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            **settings.training,
        ),
        train_dataset=paintings,
        data_collator=TextToImageCollator(contexts, settings.data["prompt_dropout"]),
    )
    start = time.perf_counter()
    loss = trainer.train().training_loss
    seconds = time.perf_counter() - start
    pipe.model.eval()
    pipe.save_lora_weights(folder, "concept")
    pipe.unload_lora_weights()
    return {"parameters": parameters, "training_seconds": round(seconds, 1), "mean_loss": loss}


def evaluate(pipe: LatteFlowPipeline, settings: Settings) -> dict:
    """Shares of right pictures of new and of old prompts, together and by kind."""
    rng = np.random.default_rng((settings.seed, 2))
    new = [sample_new_scene(rng, settings.concept) for _ in range(settings.evaluation["new"])]
    old = generation_prompts(settings.seed, **settings.evaluation["old"])
    wanted = {scene.prompt: scene for scene in new}
    wanted |= {prompt: parse_prompt(prompt) for prompts in old.values() for prompt in prompts}
    kinds = {
        "new, one object": [scene.prompt for scene in new if scene.relation is None],
        "new, two objects": [scene.prompt for scene in new if scene.relation is not None],
        **old,
    }
    results = evaluate_generation(
        pipe,
        {kind: prompts for kind, prompts in kinds.items() if prompts},
        settings.seed,
        judge=lambda image, prompt: shows_in_wider_world(image, wanted[prompt]),
        **settings.evaluation["call"],
    )

    def share(is_new: bool) -> float:
        chosen = [result for kind, result in results.items() if kind.startswith("new") == is_new]
        return sum(r["right"] * r["count"] for r in chosen) / sum(r["count"] for r in chosen)

    kinds_right = {kind: {"right": result["right"], "count": result["count"]} for kind, result in results.items()}
    return {"new": share(True), "old": share(False), "kinds": kinds_right}


@torch.no_grad()
def evaluate_autoencoder(pipe: LatteFlowPipeline, settings: Settings) -> dict:
    """Shares of right pictures among drawn ones, new and old, that the autoencoder encodes and decodes."""
    rng = np.random.default_rng((settings.seed, 3))
    old = generation_prompts(settings.seed, **settings.evaluation["old"])
    scenes = {
        "new": [sample_new_scene(rng, settings.concept) for _ in range(settings.evaluation["new"])],
        "old": [scene for prompts in old.values() for scene in map(parse_prompt, prompts) if isinstance(scene, Scene)],
    }
    shares = {}
    for kind, wanted in scenes.items():
        latents = pipe.encode_images([draw_scene(scene, place_objects(scene, rng)) for scene in wanted])
        pictures = pipe.decode_latents(latents, output_type="pil")
        judged = [shows_in_wider_world(picture, scene) for picture, scene in zip(pictures, wanted)]
        shares[kind] = sum(judged) / len(judged)
    return shares


def make_row(pipe: LatteFlowPipeline, row: str, settings: Settings, paintings, contexts, output: Path) -> dict:
    """Train (unless the adapter is there already) and judge one row."""
    if row == "autoencoder":
        return {"row": row, "experts": [], **evaluate_autoencoder(pipe, settings)}
    if row == "none":
        return {"row": row, "experts": [], **evaluate(pipe, settings)}
    experts = list(range(pipe.model.config.num_experts)) if row == "all" else [int(k) for k in row.split("+")]
    folder, note = output / "adapters" / row, output / "adapters" / f"{row}.json"
    if not note.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, train_adapter(pipe, experts, settings, paintings, contexts, folder))
    pipe.load_lora_weights(folder)
    judged = evaluate(pipe, settings)
    pipe.unload_lora_weights()
    return {"row": row, "experts": experts, **json.loads(note.read_text()), **judged}


def write_json(path: Path, content: dict | list) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)


def table(rows: list[dict], settings: Settings) -> str:
    """The rows in Markdown; what the old prompts lose is told against the row without an adapter."""
    plain = next((row["old"] for row in rows if row["row"] == "none"), None)
    lines = [
        f"| experts | adapter's weights | training | {settings.concept}: right | old prompts: right | change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        weights = f"{row['parameters']:,}" if row["experts"] else "-"
        minutes = f"{row['training_seconds'] / 60:.1f} min" if row["experts"] else "-"
        change = "-" if plain is None or not row["experts"] else f"{100 * (row['old'] - plain):+.1f}"
        shares = f"{100 * row['new']:.1f}% | {100 * row['old']:.1f}%"
        lines.append(f"| {row['row']} | {weights} | {minutes} | {shares} | {change} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, default=Path("outputs/lora_experts"), help="folder of rows and table")
    parser.add_argument("--model", default=tiny_checkpoint(), help="folder of a pipeline; the embedded checkpoint")
    arguments = parser.parse_args()
    settings = Settings.from_yaml(arguments.settings)
    pipe = LatteFlowPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, **settings.evaluation["scheduler"])
    # The faster one on a CPU at this size.
    pipe.model.set_attn_implementation("eager")
    output = arguments.output / settings.concept
    (output / "rows").mkdir(parents=True, exist_ok=True)
    paintings = prepare_paintings(pipe, settings, output / "paintings")
    contexts = encode_prompts(pipe.model, pipe.processor, [*paintings.prompts, ""])
    rows = []
    for row in map(str, settings.rows):
        file = output / "rows" / f"{row}.json"
        if not file.exists():
            write_json(file, make_row(pipe, row, settings, paintings, contexts, output))
        rows.append(json.loads(file.read_text()))
        write_json(output / "table.json", rows)
        (output / "table.md").write_text(table(rows, settings))
    print(table(rows, settings), end="")


if __name__ == "__main__":
    main()
