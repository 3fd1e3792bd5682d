# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Builds the embedded checkpoint from nothing: tokenizer, autoencoder, vision tower, language, backbone, experts.

Each stage is the stock Trainer over a stock class; it leaves a finished folder in the working directory, which appears
whole or not at all. Started again, a finished stage is skipped and an unfinished one goes on from its last checkpoint.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
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

from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline, encode_pixels
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler
from ..training.callbacks import EMACallback, IntervalWarmupCallback
from ..training.collator import ConversationCollator, TextToImageCollator, encode_prompts
from .autoencoder import AutoencoderWithLoss
from .datasets import Conversations, Doodles, LabelledPictures, Pictures
from .shapes import IMAGE_SIZE


SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True)
class Recipe:
    """What `recipes/tinyworld/checkpoint.yaml` holds; every section is passed on to the class that it names.

    Args:
        seed (`int`): of initial weights, examples and noise.
        tokenizer (`dict`): `vocab_size`.
        autoencoder (`dict`): arguments of `AutoencoderDC`.
        autoencoder_data (`dict`): `doodle_share`, of pictures that show no object of the world.
        autoencoder_loss (`dict`): `latent_noise`, `latent_penalty`.
        autoencoder_training, vision_training, language_training, joint_training, backbone_training,
        experts_training (`dict`): `TrainingArguments` each.
        backbone (`dict`): arguments of `Qwen2VLConfig`, token ids left out.
        experts (`dict`): arguments of `LatteFlowForConditionalGeneration.from_vlm`.
        scheduler (`dict`): arguments of `LatteFlowScheduler`, the boundaries left out.
        experts_data (`dict`): `num_pictures`, `digit_share`, `single_share`, `prompt_dropout`, `ema_decay`,
            `interval_warmup_steps`.
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
    experts: dict
    scheduler: dict
    experts_data: dict
    experts_training: dict

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe.

        Raises:
            `ValueError`: if a section is unknown or missing.
        """
        sections = yaml.safe_load(Path(path).read_text())
        known = {item.name for item in fields(cls)}
        if not isinstance(sections, dict) or set(sections) != known:
            found = sorted(sections) if isinstance(sections, dict) else type(sections).__name__
            raise ValueError(f"recipe {path}: expected exactly the sections {sorted(known)}, found {found}.")
        return cls(**sections)


def _finished(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` if it is not there yet; it appears whole or not at all."""
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


def _train(model, data: Dataset, collator: Callable, run_dir: Path, seed: int, settings: dict, **trainer) -> None:
    """Run the stock Trainer to the end, from the last checkpoint in `run_dir` if there is one."""
    if isinstance(model, PreTrainedModel):
        # The stock Trainer resumes by `load_state_dict`: checkpoints must hold the module's own names. Qwen2-VL's
        # original ones would be passed over, and the run would go on from random weights.
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    arguments = TrainingArguments(
        output_dir=str(run_dir), seed=seed, report_to=[], remove_unused_columns=False, save_total_limit=1, **settings
    )
    Trainer(model, arguments, train_dataset=data, data_collator=collator, **trainer).train(
        resume_from_checkpoint=get_last_checkpoint(str(run_dir)) if run_dir.exists() else None
    )


def build_processor(recipe: Recipe, work_dir: Path) -> LatteFlowProcessor:
    """Train the tokenizer on the world's sentences; with Qwen2-VL's image processor and chat template."""

    def make(folder: Path) -> None:
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(
            _sentences(recipe.seed), vocab_size=recipe.tokenizer["vocab_size"], new_special_tokens=list(SPECIAL_TOKENS)
        )
        image_processor = Qwen2VLImageProcessorPil(
            patch_size=recipe.backbone["vision_config"]["patch_size"],
            min_pixels=IMAGE_SIZE**2,
            max_pixels=IMAGE_SIZE**2,
        )
        chat_template = Path(__file__).with_name("chat_template.jinja").read_text()
        LatteFlowProcessor(image_processor, tokenizer, chat_template=chat_template).save_pretrained(folder)

    return LatteFlowProcessor.from_pretrained(_finished(work_dir / "processor", make))


def _sentences(seed: int) -> Iterator[str]:
    """Every kind of sentence, and the words of the chat template around them."""
    conversations = Conversations(seed, 5_000, text_share=1.0)
    for index in range(len(conversations)):
        yield "system\nYou are a helpful assistant.\nuser\n"
        for message in conversations[index]["messages"]:
            yield "assistant\n"
            yield message["content"][0]["text"]
            yield " " + message["content"][0]["text"]


def build_autoencoder(recipe: Recipe, work_dir: Path) -> AutoencoderDC:
    """Train the autoencoder on pictures and set its scaling factor to one over the latents' standard deviation."""

    def make(folder: Path) -> None:
        set_seed(recipe.seed)
        model = AutoencoderWithLoss(AutoencoderDC(**recipe.autoencoder), **recipe.autoencoder_loss)
        settings = recipe.autoencoder_training
        size = settings["max_steps"] * settings["per_device_train_batch_size"]
        num_doodles = round(recipe.autoencoder_data["doodle_share"] * size)
        pictures = Pictures(recipe.seed, size - num_doodles)
        data = ConcatDataset([pictures, Doodles(recipe.seed, num_doodles)])
        _train(model, data, _collate_pixels, work_dir / "runs" / "autoencoder", recipe.seed, settings)
        autoencoder = model.autoencoder.eval()
        with torch.no_grad():
            latents = autoencoder.encode(_collate_pixels([pictures[i] for i in range(512)])["pixel_values"]).latent
        autoencoder.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 4))
        autoencoder.save_pretrained(folder)

    return AutoencoderDC.from_pretrained(_finished(work_dir / "autoencoder", make))


def _collate_pixels(examples: list[dict]) -> dict[str, torch.Tensor]:
    pixels = np.stack([np.asarray(example["image"], dtype=np.float32) for example in examples])
    return {"pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0}


class VisionWithLoss(torch.nn.Module):
    """The backbone's vision tower with linear classifiers on every merged token: inputs in, loss out."""

    def __init__(self, visual: torch.nn.Module, hidden_size: int, num_labels: tuple[int, ...]):
        super().__init__()
        self.visual = visual
        self.classifiers = torch.nn.ModuleList(torch.nn.Linear(hidden_size, count) for count in num_labels)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, labels: torch.Tensor) -> dict:
        """`labels` (number of merged tokens, number of classifiers), tokens in reading order -> `{"loss": scalar}`."""
        tokens = self.visual(pixel_values, grid_thw=image_grid_thw).pooler_output
        losses = [
            torch.nn.functional.cross_entropy(classifier(tokens), wanted)
            for classifier, wanted in zip(self.classifiers, labels.unbind(-1))
        ]
        return {"loss": torch.stack(losses).sum()}


def _new_backbone(recipe: Recipe, processor: LatteFlowProcessor) -> PreTrainedModel:
    """A small Qwen2-VL with random weights."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    text = {
        **recipe.backbone["text_config"],
        "vocab_size": len(processor.tokenizer),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "bos_token_id": None,
    }
    config = Qwen2VLConfig(
        **{**recipe.backbone, "text_config": text},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    set_seed(recipe.seed)
    return Qwen2VLForConditionalGeneration(config)


def build_vision(recipe: Recipe, work_dir: Path) -> dict[str, torch.Tensor]:
    """Train the vision tower alone to say what each of its tokens shows: questions teach it far more slowly."""

    def make(folder: Path) -> None:
        processor = build_processor(recipe, work_dir)
        backbone = _new_backbone(recipe, processor)
        vision = backbone.config.vision_config
        settings = recipe.vision_training
        pictures = LabelledPictures(
            recipe.seed,
            settings["max_steps"] * settings["per_device_train_batch_size"],
            grid=IMAGE_SIZE // (vision.patch_size * vision.spatial_merge_size),
        )
        model = VisionWithLoss(backbone.model.visual, backbone.config.text_config.hidden_size, pictures.num_labels)

        def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
            inputs = processor.image_processor([example["image"] for example in examples], return_tensors="pt")
            labels = torch.from_numpy(np.concatenate([example["cells"] for example in examples]))
            return {**inputs, "labels": labels}

        _train(model, pictures, collate, work_dir / "runs" / "vision", recipe.seed, settings)
        save_file(model.visual.state_dict(), folder / "visual.safetensors")

    return load_file(_finished(work_dir / "vision", make) / "visual.safetensors")


def _train_backbone(
    recipe: Recipe, work_dir: Path, folder: Path, model: PreTrainedModel, settings: dict, seed: int, **data: Any
) -> None:
    """Train `model` on conversations, in `runs/` under the name of `folder`, and save it there."""
    processor = build_processor(recipe, work_dir)
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    # The faster one on a CPU at this size.
    model.set_attn_implementation("eager")
    conversations = Conversations(seed, settings["max_steps"] * settings["per_device_train_batch_size"], **data)
    run_dir = work_dir / "runs" / folder.stem
    _train(model, conversations, ConversationCollator(processor), run_dir, recipe.seed, settings)
    model.save_pretrained(folder)


def build_language(recipe: Recipe, work_dir: Path) -> PreTrainedModel:
    """Train a small Qwen2-VL on questions about sentences alone: cheap, and the way to compare is found here."""

    def make(folder: Path) -> None:
        model = _new_backbone(recipe, build_processor(recipe, work_dir))
        settings = recipe.language_training
        _train_backbone(recipe, work_dir, folder, model, settings, recipe.seed + 2, text_share=1.0, turns=4)

    return Qwen2VLForConditionalGeneration.from_pretrained(_finished(work_dir / "language", make))


def build_joint(recipe: Recipe, work_dir: Path) -> PreTrainedModel:
    """Give it the vision tower, and train on questions about pictures and about sentences."""

    def make(folder: Path) -> None:
        model = build_language(recipe, work_dir)
        model.model.visual.load_state_dict(build_vision(recipe, work_dir))
        _train_backbone(recipe, work_dir, folder, model, recipe.joint_training, recipe.seed)

    return Qwen2VLForConditionalGeneration.from_pretrained(_finished(work_dir / "joint", make))


def build_backbone(recipe: Recipe, work_dir: Path) -> PreTrainedModel:
    """Train it once more where mistakes are left: on hard questions, mostly about two objects."""

    def make(folder: Path) -> None:
        model, settings = build_joint(recipe, work_dir), recipe.backbone_training
        data = {"text_share": 0.15, "digit_share": 0.15, "single_share": 0.15, "practice": False}
        _train_backbone(recipe, work_dir, folder, model, settings, recipe.seed + 3, **data)

    return Qwen2VLForConditionalGeneration.from_pretrained(_finished(work_dir / "backbone", make))


class Paintings(Dataset):
    """Latents and prompts from the stage before, as `{"latents", "prompt"}`; the prompt is an index."""

    def __init__(self, folder: Path):
        self.latents = load_file(folder / "latents.safetensors")["latents"]
        prompts = json.loads((folder / "prompts.json").read_text())
        self.prompts = sorted(set(prompts))
        index = {prompt: i for i, prompt in enumerate(self.prompts)}
        self.rows = [index[prompt] for prompt in prompts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"latents": self.latents[index], "prompt": self.rows[index]}


def build_paintings(recipe: Recipe, work_dir: Path) -> Paintings:
    """Encode the pictures that the experts learn from."""

    def make(folder: Path) -> None:
        vae = build_autoencoder(recipe, work_dir)
        shares = (recipe.experts_data["digit_share"], recipe.experts_data["single_share"])
        pictures = Pictures(recipe.seed + 1, recipe.experts_data["num_pictures"], *shares)
        batches = DataLoader(pictures, batch_size=64, collate_fn=lambda examples: examples)
        latents, prompts = [], []
        with torch.no_grad():
            for batch in tqdm(batches, desc="encoding pictures", mininterval=5):
                latents.append(encode_pixels(vae, _collate_pixels(batch)["pixel_values"]))
                prompts += [example["prompt"] for example in batch]
        save_file({"latents": torch.cat(latents)}, folder / "latents.safetensors")
        (folder / "prompts.json").write_text(json.dumps(prompts))

    return Paintings(_finished(work_dir / "paintings", make))


def build_experts(recipe: Recipe, work_dir: Path) -> LatteFlowForConditionalGeneration:
    """Train the generation tower beside the frozen backbone; it ends as its moving average."""

    def make(folder: Path) -> None:
        set_seed(recipe.seed)
        model = LatteFlowForConditionalGeneration.from_vlm(build_backbone(recipe, work_dir), **recipe.experts)
        # The faster one on a CPU at this size.
        model.set_attn_implementation("eager")
        before = hash_parameters(model.vlm)
        paintings, data = build_paintings(recipe, work_dir), recipe.experts_data
        contexts = encode_prompts(model, build_processor(recipe, work_dir), [*paintings.prompts, ""])
        collator = TextToImageCollator(contexts, data["prompt_dropout"])
        callbacks = [EMACallback(data["ema_decay"]), IntervalWarmupCallback(data["interval_warmup_steps"])]
        run_dir = work_dir / "runs" / "experts"
        _train(model, paintings, collator, run_dir, recipe.seed, recipe.experts_training, callbacks=callbacks)
        if hash_parameters(model.vlm) != before:
            raise RuntimeError("the frozen backbone changed during the experts' training.")
        model.save_pretrained(folder)

    return LatteFlowForConditionalGeneration.from_pretrained(_finished(work_dir / "experts", make))


def hash_parameters(module: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_checkpoint(recipe: Recipe, work_dir: Path, output_dir: Path) -> Path:
    """All stages, then the pipeline in half precision (a checkpoint of 25 MB has no room for more) in `output_dir`.

    Raises:
        `ValueError`: if `output_dir` exists.
    """
    if output_dir.exists():
        raise ValueError(f"output folder {output_dir} exists; give another one, or remove it.")

    def make(folder: Path) -> None:
        model = build_experts(recipe, work_dir)
        vae = build_autoencoder(recipe, work_dir)
        # Where the parts lay while they were built is nobody's business.
        model.config.vlm_config._name_or_path = ""
        vae.register_to_config(_name_or_path="")
        scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, **recipe.scheduler)
        pipeline = LatteFlowPipeline(model, build_processor(recipe, work_dir), vae, scheduler)
        pipeline.to(torch.float16).save_pretrained(folder)
        # Stored in half precision, computed in single: transformers takes the dtype that the configuration names, and
        # float32 is the fast one on a CPU.
        config_file = folder / "model" / "config.json"
        config_file.write_text(config_file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))

    return _finished(output_dir, make)
