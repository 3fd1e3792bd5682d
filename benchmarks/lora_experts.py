# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Which experts matter for a new concept: LoRA on different experts, evaluated on new and on old prompts.

Each row of the table is an adapter, trained with the same images, steps and batch size. Started again, the script
skips finished rows.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler, tiny_checkpoint
from latte_flow_hf.evaluation.tinyworld import evaluate_generation, generation_prompts
from latte_flow_hf.files import atomic_write, read_json, write_json
from latte_flow_hf.modeling.context import LatteFlowContext
from latte_flow_hf.tinyworld.datasets import TinyWorldImages
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
from latte_flow_hf.training.recipe import Settings


class ExperimentSettings(Settings):
    """The content of `recipes/tinyworld/lora_experts.yaml`.

    Args:
        seed (`int`): of images, initial weights and noise.
        concept (`str`): the new colour or shape.
        rows (`list[str]`): experts joined by `+`; `"all"`; `"none"`, the checkpoint without an adapter; or
            `"autoencoder"`, drawn images after encoding and decoding, an upper bound for the adapters.
        lora (`dict`): arguments of `expert_lora_config`.
        data (`dict`): `num_images`, `new_share` (of images with the concept), `prompt_dropout`.
        training (`dict`): arguments of `TrainingArguments`.
        evaluation (`dict`): `new` (number of prompts), `old` (arguments of `generation_prompts`), `scheduler` (changes
            to that of the checkpoint), `call` (arguments of the pipeline).
    """

    seed: int
    concept: str
    rows: list[str]
    lora: dict
    data: dict
    training: dict
    evaluation: dict

    @model_validator(mode="after")
    def _check_concept(self) -> Self:
        concepts = [word for word in (*WiderObject.colours, *WiderObject.shapes) if word not in (*COLOURS, *SHAPES)]
        if self.concept not in concepts:
            raise ValueError(f"concept must be one of {concepts}, got {self.concept!r}")
        return self


class EncodedImages(Dataset):
    """Latents with prompts, as `{"latents", "prompt"}`; the prompt is an index into `prompts`.

    Args:
        folder (`Path`): the folder of `encode_images`.
    """

    def __init__(self, folder: Path):
        self.latents = load_file(folder / "latents.safetensors")["latents"]
        prompts = json.loads((folder / "prompts.json").read_text())
        self.prompts = sorted(set(prompts))
        index = {prompt: i for i, prompt in enumerate(self.prompts)}
        self.indices = [index[prompt] for prompt in prompts]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return {"latents": self.latents[index], "prompt": self.indices[index]}


def sample_new_scene(rng: np.random.Generator, concept: str) -> Scene:
    """One object with the new colour or shape (one third), or two objects, one of which has it."""
    if concept in WiderObject.shapes:
        new = [WiderObject(colour, concept) for colour in COLOURS]
    else:
        new = [WiderObject(concept, shape) for shape in SHAPES]
    first = new[rng.integers(len(new))]
    if rng.random() < 1 / 3:
        return Scene((first,))
    # Without held-out pairs, because they are part of the evaluation on old prompts.
    old = [item for item in ALL_OBJECTS if not item.held_out]
    other = old[rng.integers(len(old))]
    objects = (first, WiderObject(other.colour, other.shape))
    return Scene(objects if rng.random() < 0.5 else objects[::-1], list(RELATIONS)[rng.integers(len(RELATIONS))])


def shows_in_wider_world(image: Image.Image, expected: Scene | int) -> bool:
    """Whether `image` shows `expected`, by an oracle that knows the new colour and shape as well as the old ones."""
    if isinstance(expected, int):
        return read_digit(image) == expected
    scene = read_scene(image, WiderObject)
    return scene is not None and scene.prompt == expected.canonical.prompt


def encode_images(pipe: LatteFlowPipeline, settings: ExperimentSettings, folder: Path) -> EncodedImages:
    """Encode the images for training, with and without the concept, or load them from `folder`."""
    if not folder.exists():
        data, old = settings.data, TinyWorldImages(settings.seed, settings.data["num_images"])
        examples = []
        for index in range(data["num_images"]):
            rng = np.random.default_rng((settings.seed, index, 1))
            if rng.random() < data["new_share"]:
                scene = sample_new_scene(rng, settings.concept)
                examples.append({"image": draw_scene(scene, place_objects(scene, rng)), "prompt": scene.prompt})
            else:
                examples.append(old[index])
        images = [example["image"] for example in examples]
        latents = [pipe.encode_images(images[start : start + 64]).cpu() for start in range(0, len(images), 64)]
        with atomic_write(folder) as partial:
            partial.mkdir()
            save_file({"latents": torch.cat(latents).contiguous()}, partial / "latents.safetensors")
            write_json([example["prompt"] for example in examples], partial / "prompts.json")
    return EncodedImages(folder)


def train_adapter(
    pipe: LatteFlowPipeline,
    experts: list[int],
    settings: ExperimentSettings,
    images: EncodedImages,
    contexts: LatteFlowContext,
    folder: Path,
) -> dict:
    """Train an adapter of `experts` and save it in `folder`; the pipeline is not changed."""
    set_seed(settings.seed)
    pipe.model.add_adapter(expert_lora_config(pipe.model, experts, **settings.lora), "concept")
    parameters = sum(parameter.numel() for parameter in pipe.model.parameters() if parameter.requires_grad)
    trainer = Trainer(
        pipe.model,
        TrainingArguments(
            dataloader_pin_memory=pipe.device.type != "cpu",
            output_dir=str(folder.with_name(folder.name + ".run")),
            use_cpu=pipe.device.type == "cpu",
            seed=settings.seed,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            **settings.training,
        ),
        train_dataset=images,
        data_collator=TextToImageCollator(contexts, settings.data["prompt_dropout"]),
    )
    start = time.perf_counter()
    loss = trainer.train().training_loss
    seconds = time.perf_counter() - start
    pipe.model.eval()
    pipe.save_lora_weights(folder, "concept")
    pipe.unload_lora_weights()
    return {"parameters": parameters, "training_seconds": round(seconds, 1), "mean_loss": loss}


def evaluate(pipe: LatteFlowPipeline, settings: ExperimentSettings) -> dict:
    """Accuracy of the images for new and for old prompts, and by kind."""
    rng = np.random.default_rng((settings.seed, 2))
    new = [sample_new_scene(rng, settings.concept) for _ in range(settings.evaluation["new"])]
    old = generation_prompts(settings.seed, **settings.evaluation["old"])
    expected = {scene.prompt: scene for scene in new}
    expected |= {prompt: parse_prompt(prompt) for prompts in old.values() for prompt in prompts}
    kinds = {
        "new, one object": [scene.prompt for scene in new if scene.relation is None],
        "new, two objects": [scene.prompt for scene in new if scene.relation is not None],
        **old,
    }
    results = evaluate_generation(
        pipe,
        {kind: prompts for kind, prompts in kinds.items() if prompts},
        settings.seed,
        is_correct=lambda image, prompt: shows_in_wider_world(image, expected[prompt]),
        **settings.evaluation["call"],
    )

    def accuracy(is_new: bool) -> float:
        selected = [result for kind, result in results.items() if kind.startswith("new") == is_new]
        return sum(r["accuracy"] * r["count"] for r in selected) / sum(r["count"] for r in selected)

    kinds = {kind: {name: result[name] for name in ("accuracy", "count")} for kind, result in results.items()}
    return {"new": accuracy(True), "old": accuracy(False), "kinds": kinds}


@torch.no_grad()
def evaluate_autoencoder(pipe: LatteFlowPipeline, settings: ExperimentSettings) -> dict:
    """Accuracy of drawn images, new and old, after they are encoded and decoded."""
    rng = np.random.default_rng((settings.seed, 3))
    old = generation_prompts(settings.seed, **settings.evaluation["old"])
    scenes = {
        "new": [sample_new_scene(rng, settings.concept) for _ in range(settings.evaluation["new"])],
        "old": [scene for prompts in old.values() for scene in map(parse_prompt, prompts) if isinstance(scene, Scene)],
    }
    accuracies = {}
    for kind, kind_scenes in scenes.items():
        latents = pipe.encode_images([draw_scene(scene, place_objects(scene, rng)) for scene in kind_scenes])
        images = pipe.decode_latents(latents, output_type="pil")
        correct = [shows_in_wider_world(image, scene) for image, scene in zip(images, kind_scenes)]
        accuracies[kind] = sum(correct) / len(correct)
    return accuracies


def make_row(
    pipe: LatteFlowPipeline,
    row: str,
    settings: ExperimentSettings,
    images: EncodedImages,
    contexts: LatteFlowContext,
    output: Path,
) -> dict:
    """Train an adapter, unless it exists, and evaluate it."""
    if row == "autoencoder":
        return {"row": row, "experts": [], **evaluate_autoencoder(pipe, settings)}
    if row == "none":
        return {"row": row, "experts": [], **evaluate(pipe, settings)}
    experts = list(range(pipe.model.config.num_experts)) if row == "all" else [int(k) for k in row.split("+")]
    folder, log_file = output / "adapters" / row, output / "adapters" / f"{row}.json"
    if not log_file.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(train_adapter(pipe, experts, settings, images, contexts, folder), log_file)
    pipe.load_lora_weights(folder)
    accuracies = evaluate(pipe, settings)
    pipe.unload_lora_weights()
    return {"row": row, "experts": experts, **read_json(log_file), **accuracies}


def as_markdown(rows: list[dict], settings: ExperimentSettings) -> str:
    """The rows as a table; the last column is the change of the old prompts against the row without an adapter."""
    baseline = next((row["old"] for row in rows if row["row"] == "none"), None)
    lines = [
        f"| experts | trained weights | training | {settings.concept} | old prompts | change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        weights = f"{row['parameters']:,}" if row["experts"] else "-"
        minutes = f"{row['training_seconds'] / 60:.1f} min" if row["experts"] else "-"
        change = "-" if baseline is None or not row["experts"] else f"{100 * (row['old'] - baseline):+.1f}"
        accuracies = f"{100 * row['new']:.1f}% | {100 * row['old']:.1f}%"
        lines.append(f"| {row['row']} | {weights} | {minutes} | {accuracies} | {change} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="YAML file")
    parser.add_argument("--output", type=Path, default=Path("outputs/lora_experts"), help="folder for rows and table")
    parser.add_argument(
        "--model", default=tiny_checkpoint(), help="folder of a pipeline; defaults to the embedded checkpoint"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda")
    arguments = parser.parse_args()
    settings = ExperimentSettings.from_yaml(arguments.settings)
    pipe = LatteFlowPipeline.from_pretrained(arguments.model).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LatteFlowScheduler.from_config(pipe.scheduler.config, **settings.evaluation["scheduler"])
    # Faster on a CPU at this size.
    pipe.model.set_attn_implementation("eager")
    output = arguments.output / settings.concept
    (output / "rows").mkdir(parents=True, exist_ok=True)
    images = encode_images(pipe, settings, output / "images")
    contexts = encode_prompts(pipe.model, pipe.processor, [*images.prompts, ""]).to("cpu")
    rows = []
    for row in settings.rows:
        file = output / "rows" / f"{row}.json"
        if not file.exists():
            write_json(make_row(pipe, row, settings, images, contexts, output), file)
        rows.append(read_json(file))
        write_json(rows, output / "table.json")
        (output / "table.md").write_text(as_markdown(rows, settings))
    print(as_markdown(rows, settings), end="")


if __name__ == "__main__":
    main()
