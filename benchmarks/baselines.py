# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Models by other people, as scenarios: DiT-XL/2, Sana-0.6B, SANA-Sprint-0.6B and Janus-Pro-1B.

Each is the class of diffusers or transformers at its published size, with random weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LogitsProcessorList,
)

from latte_flow_hf import LatteFlowProcessor, tiny_checkpoint

from .scenarios import DC_AE_F32C32, PROMPT, Generate, Mark, Scenario, compression_ratio, mark_after, mark_step_end


# sd-vae-ft-ema, the autoencoder of DiT.
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
DIT_XL_2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# Sana_600M_512px, as in the conversion script of diffusers.
SANA_600M = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
}
# Sana_Sprint_0.6B_1024px, as in the conversion script of diffusers.
SANA_SPRINT_600M = {**SANA_600M, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1000.0}
# gemma-2-2b, whose sizes are the defaults of its configuration.
GEMMA_2_2B: dict[str, Any] = {}
JANUS_PRO_1B_TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
    "max_position_embeddings": 16384,
}


@dataclass(frozen=True, kw_only=True)
class DiT(Scenario):
    """DiT-XL/2 in the pipeline of diffusers: a class label, latents of 32x32x4, guidance."""

    kind = "dit"
    published_sizes = {"transformer": DIT_XL_2, "vae": SD_VAE}
    note = (
        "without the encoder of the autoencoder; a class label instead of text; diffusers embeds the timestep in "
        "every layer"
    )

    num_steps: int = 250

    def build_networks(self) -> dict[str, nn.Module]:
        with init_empty_weights():
            vae = AutoencoderKL(**self.size_of("vae"), sample_size=self.image_size)
            sample_size = self.image_size // compression_ratio(vae)
            transformer = DiTTransformer2DModel(**self.size_of("transformer"), sample_size=sample_size)
        vae.encoder = nn.Identity()
        return {"transformer": transformer, "vae": vae}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return [networks["transformer"]]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        pipe = DiTPipeline(scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False), **networks)
        pipe.set_progress_bar_config(disable=True)
        scheduler_step = pipe.scheduler.step

        def generate(num_steps: int, mark: Mark) -> torch.Tensor:
            # DiTPipeline takes no `callback_on_step_end`.
            pipe.scheduler.step = mark_after(scheduler_step, mark, "step")
            labels = [1] * self.batch_size
            images = pipe(labels, self.guidance_scale, num_inference_steps=num_steps, output_type="pt").images
            mark("decode")
            return images

        return generate


@dataclass(frozen=True, kw_only=True)
class Sana(Scenario):
    """Sana-0.6B in the pipeline of diffusers, from a prompt that its text encoder sees as 300 tokens."""

    kind = "sana"
    published_sizes = {"transformer": SANA_600M, "text_encoder": GEMMA_2_2B, "vae": DC_AE_F32C32}
    note = (
        "small tokenizer; without the instruction that diffusers puts before a prompt by default, which favours it; "
        "without the encoder of the autoencoder"
    )

    num_steps: int = 20
    guidance_scale: float = 4.5
    image_size: int = 512

    def build_networks(self) -> dict[str, nn.Module]:
        with init_empty_weights():
            vae = AutoencoderDC(**self.size_of("vae"))
            sample_size = self.image_size // compression_ratio(vae)
            transformer = SanaTransformer2DModel(**self.size_of("transformer"), sample_size=sample_size)
            text_encoder = Gemma2Model(Gemma2Config(**self.size_of("text_encoder")))
        vae.encoder = nn.Identity()
        return {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return [networks["transformer"]]

    def build_pipeline(self, **components: Any) -> Any:
        """The pipeline, with the scheduler of the published checkpoints."""
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
        return SanaPipeline(scheduler=scheduler, **components)

    def step_arguments(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the call that only one of the pipelines takes."""
        return {"negative_prompt": ""}

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        tokenizer = LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor").tokenizer
        pipe = self.build_pipeline(tokenizer=tokenizer, **networks)
        pipe.set_progress_bar_config(disable=True)
        encode_prompt = pipe.encode_prompt

        def generate(num_steps: int, mark: Mark) -> torch.Tensor:
            pipe.encode_prompt = mark_after(encode_prompt, mark, "prefill")
            images = pipe(
                PROMPT,
                height=self.image_size,
                width=self.image_size,
                num_inference_steps=num_steps,
                guidance_scale=self.guidance_scale,
                num_images_per_prompt=self.batch_size,
                complex_human_instruction=None,
                use_resolution_binning=False,
                output_type="pt",
                callback_on_step_end=mark_step_end(mark),
                **self.step_arguments(num_steps),
            ).images
            mark("decode")
            return images

        return generate


@dataclass(frozen=True, kw_only=True)
class SanaSprint(Sana):
    """SANA-Sprint-0.6B: Sana distilled to 1 to 4 steps, with its guidance as an input."""

    kind = "sana_sprint"
    published_sizes = {"transformer": SANA_SPRINT_600M, "text_encoder": GEMMA_2_2B, "vae": DC_AE_F32C32}

    num_steps: int = 2

    def build_pipeline(self, **components: Any) -> Any:
        return SanaSprintPipeline(scheduler=SCMScheduler(), **components)

    def step_arguments(self, num_steps: int) -> dict[str, Any]:
        # The timestep between the two of the published checkpoints, which were made for two steps.
        return {"intermediate_timesteps": 1.3 if num_steps == 2 else None}


@dataclass(frozen=True, kw_only=True)
class JanusPro(Scenario):
    """Janus-Pro-1B with `generate` of transformers: 576 image tokens in sequence, static cache, guidance."""

    kind = "janus"
    published_sizes = {"text": JANUS_PRO_1B_TEXT, "vision": {}, "vq": {}}
    note = "vision tower of one layer, no language head; the prefill gives the first of the 576 tokens"

    num_steps: int = 575
    guidance_scale: float = 5.0
    image_size: int = 384

    def build_networks(self) -> dict[str, nn.Module]:
        text, vision, vq = self.size_of("text"), self.size_of("vision"), self.size_of("vq")
        projection = {"projection_dim": text["hidden_size"]}
        config = JanusConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"num_hidden_layers": 1, "image_size": self.image_size, **projection, **vision},
            vq_config={"image_token_embed_dim": text["hidden_size"], **projection, **vq},
        )
        with init_empty_weights():
            model = JanusForConditionalGeneration(config)
        model.lm_head = nn.Identity()
        return {"model": model}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"].model
        return [
            model.language_model.layers,
            model.language_model.norm,
            model.generation_head,
            model.generation_aligner,
        ]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        model = networks["model"]
        device = next(model.parameters()).device
        bos_token, pad_token, image_token = 0, 1, 2
        input_ids = torch.tensor([[bos_token, *range(3, 27), image_token]], device=device).repeat(self.batch_size, 1)
        num_image_tokens = model.config.vq_config.num_patches**2
        # `max_length` sets the size of the cache, also where fewer steps are measured.
        generation_config = GenerationConfig(
            bos_token_id=bos_token,
            pad_token_id=pad_token,
            eos_token_id=pad_token,
            do_sample=True,
            guidance_scale=self.guidance_scale,
            max_length=input_ids.shape[1] + num_image_tokens,
            generation_kwargs={"boi_token_id": image_token},
        )

        def generate(num_steps: int, mark: Mark) -> torch.Tensor:
            parts = iter(["prefill"] + ["step"] * num_steps)

            def mark_scores(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                mark(next(parts))
                return scores

            model.model.vision_model.config.num_image_tokens = num_steps + 1
            tokens = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_mode="image",
                generation_config=generation_config,
                logits_processor=LogitsProcessorList([mark_scores]),
            )
            # Shorter runs decode a full image too, with the missing tokens as zeros.
            images = model.decode_image_tokens(nn.functional.pad(tokens, (0, num_image_tokens - tokens.shape[1])))
            mark("decode")
            return images

        return generate
