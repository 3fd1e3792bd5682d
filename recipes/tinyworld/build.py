# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Builds the embedded checkpoint from scratch.

    python recipes/tinyworld/build.py --output my-checkpoint

`stages.yaml` configures the stages that build the processor, the autoencoder and the backbone (vision tower, then
language, then both), each with the stock Trainer. The experts are then trained by `latte_flow_hf.training.train` with
the recipe `checkpoint.yaml`. A stage writes its folder atomically: started again, the script skips finished stages and
resumes an unfinished one from its last checkpoint.
"""

import argparse
import functools
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint

from latte_flow_hf import LatteFlowPipeline, LatteFlowProcessor
from latte_flow_hf.files import atomic_write, read_json, store_hashes, write_json
from latte_flow_hf.tinyworld.datasets import Conversations, DoodleImages, LabelledImages, TinyWorldImages
from latte_flow_hf.tinyworld.shapes import IMAGE_SIZE
from latte_flow_hf.training import ConversationCollator
from latte_flow_hf.training.callbacks import TimeCallback
from latte_flow_hf.training.recipe import Recipe, Settings
from latte_flow_hf.training.train import train


FOLDER = Path(__file__).parent

SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Stages(Settings):
    """The content of `stages.yaml`.

    Args:
        seed (`int`): of initial weights, examples and noise.
        tokenizer (`dict`): `vocab_size`.
        autoencoder (`dict`): arguments of `AutoencoderDC`.
        autoencoder_data (`dict`): `doodle_share`, the share of images of random polygons.
        autoencoder_loss (`dict`): arguments of [`AutoencoderWithLoss`].
        backbone (`dict`): arguments of `Qwen2VLConfig`, without token ids.
        autoencoder_training, vision_training, language_training, joint_training, backbone_training (`dict`): arguments
            of `TrainingArguments`.
    """

    seed: int
    tokenizer: dict
    autoencoder: dict
    autoencoder_data: dict
    autoencoder_loss: dict
    autoencoder_training: dict
    backbone: dict
    vision_training: dict
    language_training: dict
    joint_training: dict
    backbone_training: dict


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Call `build` with a temporary folder that becomes `folder`, unless `folder` exists."""
    if not folder.exists():
        with atomic_write(folder) as partial:
            partial.mkdir()
            build(partial)
    return folder


def run_trainer(model: nn.Module, data: Dataset, collator: Callable, run_dir: Path, seed: int, settings: dict) -> None:
    """Train with the stock Trainer, or resume from the last checkpoint in `run_dir`."""
    if isinstance(model, PreTrainedModel):
        # The Trainer resumes with `load_state_dict`, which ignores Qwen2-VL's original names: checkpoints must contain
        # the names of the module, or training would continue from random weights.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    arguments = TrainingArguments(
        output_dir=str(run_dir), seed=seed, report_to=[], remove_unused_columns=False, save_total_limit=1, **settings
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[TimeCallback()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run_dir)) if run_dir.exists() else None)


def num_examples(settings: dict) -> int:
    """The number of examples that training uses, so that each is seen once."""
    return settings["max_steps"] * settings["per_device_train_batch_size"]


# Processor.


def build_processor(stages: Stages, work_dir: Path) -> LatteFlowProcessor:
    """Train the tokenizer on sentences of the tiny world; the image processor is that of Qwen2-VL."""

    def build(folder: Path) -> None:
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(
            tokenizer_texts(stages.seed), stages.tokenizer["vocab_size"], new_special_tokens=list(SPECIAL_TOKENS)
        )
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=stages.backbone["vision_config"]["patch_size"],
            min_pixels=IMAGE_SIZE**2,
            max_pixels=IMAGE_SIZE**2,
        )
        chat_template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
        LatteFlowProcessor(image_processor, tokenizer, chat_template=chat_template).save_pretrained(folder)

    return LatteFlowProcessor.from_pretrained(build_once(work_dir / "processor", build))


def tokenizer_texts(seed: int) -> Iterator[str]:
    """Sentences of every kind, and the words of the chat template."""
    conversations = Conversations(seed, 5_000, text_share=1.0)
    for index in range(len(conversations)):
        yield "system\nYou are a helpful assistant.\nuser\n"
        for message in conversations[index]["messages"]:
            yield "assistant\n"
            yield message["content"][0]["text"]
            yield " " + message["content"][0]["text"]


# Autoencoder.


class AutoencoderWithLoss(nn.Module):
    """An autoencoder with its training loss, for the stock Trainer.

    loss = mean (x' - x)^2 + 0.1 mean |x' - x| + latent_penalty * mean z^2, where x' is decoded from
    z + u * latent_noise * std(z) * e, with standard normal e, and u uniform in [0, 1) for each image. The noise makes
    latents robust to small errors of a sampler, as in latent denoising tokenizers (arXiv 2507.15856); the last term
    keeps them small. (Chosen: because DC-AE's own perceptual and adversarial losses need networks that do not exist at
    this size.)

    Args:
        autoencoder (`AutoencoderDC`): the network.
        latent_noise (`float`): the largest standard deviation of the noise, in standard deviations of the latents.
        latent_penalty (`float`): the weight of the mean square of the latents.
    """

    def __init__(self, autoencoder: AutoencoderDC, latent_noise: float, latent_penalty: float):
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise
        self.latent_penalty = latent_penalty

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (batch, 3, height, width) in [-1, 1] -> `{"loss": scalar}`."""
        latents = self.autoencoder.encode(pixel_values).latent
        strength = self.latent_noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        noisy_latents = latents + strength * latents.detach().std() * torch.randn_like(latents)
        decoded = self.autoencoder.decode(noisy_latents).sample
        loss = nn.functional.mse_loss(decoded, pixel_values) + 0.1 * nn.functional.l1_loss(decoded, pixel_values)
        return {"loss": loss + self.latent_penalty * latents.square().mean()}


def build_autoencoder(stages: Stages, work_dir: Path) -> Path:
    """Train the autoencoder, and set its scaling factor to one over the standard deviation of the latents."""

    def build(folder: Path) -> None:
        set_seed(stages.seed)
        model = AutoencoderWithLoss(AutoencoderDC(**stages.autoencoder), **stages.autoencoder_loss)
        settings = stages.autoencoder_training
        num_doodles = round(stages.autoencoder_data["doodle_share"] * num_examples(settings))
        images = TinyWorldImages(stages.seed, num_examples(settings) - num_doodles)
        data = ConcatDataset([images, DoodleImages(stages.seed, num_doodles)])
        run_trainer(model, data, collate_pixels, work_dir / "runs" / "autoencoder", stages.seed, settings)
        autoencoder = model.autoencoder.eval()
        with torch.no_grad():
            latents = autoencoder.encode(collate_pixels([images[i] for i in range(512)])["pixel_values"]).latent
        autoencoder.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
        autoencoder.save_pretrained(folder)

    return build_once(work_dir / "autoencoder", build)


def collate_pixels(examples: list[dict]) -> dict[str, torch.Tensor]:
    pixels = np.stack([np.asarray(example["image"], dtype=np.float32) for example in examples])
    return {"pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0}


# Backbone.


class VisionWithLoss(nn.Module):
    """The vision tower of the backbone with linear classifiers of each token, for the stock Trainer.

    Args:
        visual (`nn.Module`): the vision tower.
        hidden_size (`int`): the width of its output.
        num_labels (`tuple[int, ...]`): the number of labels of each classifier.
    """

    def __init__(self, visual: nn.Module, hidden_size: int, num_labels: tuple[int, ...]):
        super().__init__()
        self.visual = visual
        self.classifiers = nn.ModuleList(nn.Linear(hidden_size, count) for count in num_labels)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, labels: torch.Tensor) -> dict:
        """`labels` of shape (number of tokens, number of classifiers), tokens row by row -> `{"loss": scalar}`."""
        tokens = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        losses = [
            nn.functional.cross_entropy(classifier(tokens), target)
            for classifier, target in zip(self.classifiers, labels.unbind(-1))
        ]
        return {"loss": torch.stack(losses).sum()}


def new_backbone(stages: Stages, processor: LatteFlowProcessor) -> PreTrainedModel:
    """A small Qwen2-VL with random weights."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    text_config = {
        **stages.backbone["text_config"],
        "vocab_size": len(processor.tokenizer),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "bos_token_id": None,
    }
    config = Qwen2VLConfig(
        **{**stages.backbone, "text_config": text_config},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    set_seed(stages.seed)
    return Qwen2VLForConditionalGeneration(config)


def build_vision(stages: Stages, work_dir: Path) -> dict[str, torch.Tensor]:
    """Train the vision tower to classify what each of its tokens shows, which is faster than with questions alone."""

    def build(folder: Path) -> None:
        processor = build_processor(stages, work_dir)
        backbone = new_backbone(stages, processor)
        vision_config, settings = backbone.config.vision_config, stages.vision_training
        images = LabelledImages(
            stages.seed,
            num_examples(settings),
            grid=IMAGE_SIZE // (vision_config.patch_size * vision_config.spatial_merge_size),
        )
        model = VisionWithLoss(backbone.model.visual, backbone.config.text_config.hidden_size, images.num_labels)

        def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
            inputs = processor.image_processor([example["image"] for example in examples], return_tensors="pt")
            labels = torch.from_numpy(np.concatenate([example["cells"] for example in examples]))
            return {**inputs, "labels": labels}

        run_trainer(model, images, collate, work_dir / "runs" / "vision", stages.seed, settings)
        save_file(model.visual.state_dict(), folder / "visual.safetensors")

    return load_file(build_once(work_dir / "vision", build) / "visual.safetensors")


def train_backbone(
    stages: Stages, work_dir: Path, folder: Path, model: PreTrainedModel, settings: dict, seed: int, **data: Any
) -> None:
    """Train a backbone on conversations and save it in `folder`, with its processor."""
    processor = build_processor(stages, work_dir)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    # Faster on a CPU at this size.
    model.set_attn_implementation("eager")
    conversations = Conversations(seed, num_examples(settings), **data)
    run_dir = work_dir / "runs" / folder.name
    run_trainer(model, conversations, ConversationCollator(processor), run_dir, stages.seed, settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build_language(stages: Stages, work_dir: Path) -> PreTrainedModel:
    """Train a backbone on questions about sentences alone, where it learns to compare at little cost."""

    def build(folder: Path) -> None:
        model = new_backbone(stages, build_processor(stages, work_dir))
        settings = stages.language_training
        train_backbone(stages, work_dir, folder, model, settings, stages.seed + 2, text_share=1.0, turns=4)

    return Qwen2VLForConditionalGeneration.from_pretrained(build_once(work_dir / "language", build))


def build_joint(stages: Stages, work_dir: Path) -> PreTrainedModel:
    """Add the trained vision tower, and train on questions about images and about sentences."""

    def build(folder: Path) -> None:
        model = build_language(stages, work_dir)
        model.model.visual.load_state_dict(build_vision(stages, work_dir))
        train_backbone(stages, work_dir, folder, model, stages.joint_training, stages.seed)

    return Qwen2VLForConditionalGeneration.from_pretrained(build_once(work_dir / "joint", build))


def build_backbone(stages: Stages, work_dir: Path) -> Path:
    """Train on the questions with the most errors: hard ones, mostly about two objects."""

    def build(folder: Path) -> None:
        model, settings = build_joint(stages, work_dir), stages.backbone_training
        data = {"text_share": 0.15, "digit_share": 0.15, "single_share": 0.15, "practice": False}
        train_backbone(stages, work_dir, folder, model, settings, stages.seed + 3, **data)

    return build_once(work_dir / "backbone", build)


# Experts and checkpoint.


def build_pipeline(stages: Stages, recipe: Recipe, work_dir: Path) -> Path:
    """Train the experts, with the backbone and the autoencoder of the earlier stages."""
    folder = work_dir / "pipeline"
    if not folder.exists():
        model = {
            "backbone": str(build_backbone(stages, work_dir)),
            "autoencoder": str(build_autoencoder(stages, work_dir)),
        }
        update = {
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update={"cache": str(work_dir / "cache")}),
        }
        train(recipe.model_copy(update=update), work_dir / "runs" / "experts", folder)
    return folder


def build_checkpoint(stages: Stages, recipe: Recipe, work_dir: Path, output_dir: Path) -> Path:
    """Run all stages, and save the pipeline in half precision: the package allows 25 MB for the checkpoint.

    `training_log.json` beside it has what each stage logged, with the time since the stage began.

    Raises:
        `ValueError`: if `output_dir` exists.
    """
    if output_dir.exists():
        raise ValueError(f"output folder {output_dir} exists; remove it, or use another one.")
    pipe = LatteFlowPipeline.from_pretrained(build_pipeline(stages, recipe, work_dir))
    # Don't store local paths: a new pipeline has none.
    pipe.vae.register_to_config(_name_or_path="")
    # The processor as it was made: the stages that padded with it have stored how.
    pipe = LatteFlowPipeline(**{**pipe.components, "processor": build_processor(stages, work_dir)})
    texts = " ".join(tokenizer_texts(stages.seed)).lower()
    pipe.model.config.trained_words = sorted(set(re.findall(r"\w+", texts)))
    with atomic_write(output_dir) as folder:
        pipe.to(torch.float16).save_pretrained(folder)
        # transformers loads weights in the dtype of the configuration, and float32 is faster on a CPU.
        for config_file in (folder / "model" / "config.json", folder / "config.json"):
            config = config_file.read_text(encoding="utf-8")
            config_file.write_text(config.replace('"dtype": "float16"', '"dtype": "float32"'), encoding="utf-8")
        write_json(read_log(work_dir), folder / "training_log.json")
        store_hashes(folder)
    return output_dir


def read_log(work_dir: Path) -> dict[str, Any]:
    """What the stages logged, and the versions and the machine of the process that finished them."""
    machine = {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "diffusers")},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    runs = work_dir / "runs"
    folders = {name: runs / name for name in ("vision", "language", "joint", "backbone", "autoencoder")}
    folders["experts"] = runs / "experts" / "checkpoints"
    logs = {}
    for name, folder in folders.items():
        checkpoint = get_last_checkpoint(str(folder))
        assert checkpoint is not None, f"{folder} has no checkpoint."
        logs[name] = read_json(Path(checkpoint, "trainer_state.json"))["log_history"]
    return {**machine, "stages": logs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the checkpoint; must not exist")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/tinyworld"), help="folder for finished stages")
    parser.add_argument("--stages", type=Path, default=FOLDER / "stages.yaml", help="YAML file of the stages")
    parser.add_argument("--recipe", type=Path, default=FOLDER / "checkpoint.yaml", help="recipe of the experts")
    options = parser.parse_args()
    stages, recipe = Stages.from_yaml(options.stages), Recipe.from_yaml(options.recipe)
    print(f"wrote {build_checkpoint(stages, recipe, options.work_dir, options.output)}")


if __name__ == "__main__":
    main()
