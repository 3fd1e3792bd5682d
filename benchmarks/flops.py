# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of one image, from a prompt to pixels, of models that need few steps.

    python -m benchmarks.flops

Everything runs on the meta device, so a model of any size is counted in seconds and without memory. Counted are the
text encoder, the steps and the decoder of the classes of transformers and diffusers at their published sizes.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel, ZImageTransformer2DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, DynamicCache, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from latte_flow_hf.modeling.context import LatteFlowContext

from .baselines import Sana
from .scenarios import LatteFlow, Scenario, compression_ratio
from .suite import make_scenario


# Tokens of `PROMPT` with its chat template; the unconditional prompt has fewer, and is padded.
NUM_PROMPT_TOKENS = 27
# FLUX.1-schnell: the defaults of diffusers are those of its transformer.
T5_XXL = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
T5_XXL_KIND = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
FLUX_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# Z-Image-Turbo: the defaults of diffusers are those of its transformer; its text encoder is Qwen3-4B.
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


@dataclass
class ImageFlops:
    """Operations of one image; a multiplication and an addition are two.

    Args:
        text (`int`): of the text encoder, for all prompts of the image.
        loop (`int`): of all steps.
        decode (`int`): of the decoder.
    """

    text: int
    loop: int
    decode: int

    @property
    def image(self) -> int:
        return self.text + self.loop + self.decode


def count(run: Callable[[], Any]) -> int:
    """The operations of `run()`. Attention counts as its matrix products, as in [`workers.count_flops`]."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def _tokens(batch_size: int, length: int) -> torch.Tensor:
    return _zeros(batch_size, length, dtype=torch.int64)


def count_scenario(scenario: Scenario) -> ImageFlops:
    """An image of a scenario of kind `latte_flow`, `sana` or `sana_sprint`."""
    assert scenario.batch_size == 1
    networks = scenario.build_networks()
    size = scenario.image_size // compression_ratio(networks["vae"])
    if isinstance(scenario, LatteFlow):
        text, loop = _count_latte_flow(scenario, networks["model"], size)
    else:
        assert isinstance(scenario, Sana)
        text, loop = _count_sana(scenario, networks, size)
    latents = _zeros(1, networks["vae"].config.latent_channels, size, size)
    return ImageFlops(text, loop, count(lambda: networks["vae"].decode(latents)))


def _count_latte_flow(scenario: LatteFlow, model: Any, size: int) -> tuple[int, int]:
    num_branches = 2 if scenario.guidance_scale > 1 else 1
    input_ids, cache = _tokens(num_branches, NUM_PROMPT_TOKENS), DynamicCache()
    position_ids = _tokens(num_branches, NUM_PROMPT_TOKENS).expand(3, -1, -1)
    text = count(
        lambda: model.vlm.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
    )
    context = LatteFlowContext(
        tuple(layer.keys for layer in cache.layers),
        tuple(layer.values for layer in cache.layers),
        torch.ones_like(input_ids, dtype=torch.bool),
        _tokens(num_branches, 1)[:, 0],
        has_padding=False,
    )
    latents = _zeros(num_branches, model.config.latent_channels, size, size)

    def run_loop() -> None:
        layout = model.latent_layout(latents, context)
        for expert in range(scenario.num_experts):
            # Steps are evenly spaced, and so are the boundaries of the experts.
            num_steps = scenario.num_steps * (expert + 1) // scenario.num_experts
            num_steps -= scenario.num_steps * expert // scenario.num_experts
            modulation = model.modulate(_zeros(num_steps), expert)
            for step in range(num_steps):
                model.predict_velocity(latents, _zeros(1), context, expert, modulation[step], layout)

    return text, count(run_loop)


def _count_sana(scenario: Sana, networks: dict[str, nn.Module], size: int) -> tuple[int, int]:
    transformer = networks["transformer"]
    has_guidance_input = transformer.config.guidance_embeds
    num_branches = 1 if has_guidance_input or scenario.guidance_scale <= 1 else 2
    prompt_embeds = networks["text_encoder"](_tokens(1, 300))[0].expand(num_branches, -1, -1)
    text = num_branches * count(lambda: networks["text_encoder"](_tokens(1, 300)))
    step = count(
        lambda: transformer(
            _zeros(num_branches, transformer.config.in_channels, size, size),
            encoder_hidden_states=prompt_embeds,
            encoder_attention_mask=_zeros(num_branches, 300),
            timestep=_zeros(num_branches),
            guidance=_zeros(num_branches) if has_guidance_input else None,
        )
    )
    return text, scenario.num_steps * step


def count_flux_schnell(image_size: int, num_steps: int = 4) -> ImageFlops:
    """FLUX.1-schnell: T5-XXL with 256 tokens, CLIP-L with 77, patches of 2x2 latent pixels, no guidance."""
    with init_empty_weights():
        t5 = T5EncoderModel(T5Config(**T5_XXL, **T5_XXL_KIND))
        clip = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        transformer = FluxTransformer2DModel()
        vae = AutoencoderKL(**FLUX_VAE)
    size = image_size // 8
    num_tokens = (size // 2) ** 2
    text = count(lambda: t5(_tokens(1, 256))) + count(lambda: clip(_tokens(1, 77)))
    step = count(
        lambda: transformer(
            hidden_states=_zeros(1, num_tokens, 64),
            encoder_hidden_states=_zeros(1, 256, 4096),
            pooled_projections=_zeros(1, 768),
            timestep=_zeros(1),
            img_ids=_zeros(num_tokens, 3),
            txt_ids=_zeros(256, 3),
        )
    )
    return ImageFlops(text, num_steps * step, count(lambda: vae.decode(_zeros(1, 16, size, size))))


def count_z_image_turbo(image_size: int, num_steps: int = 8) -> ImageFlops:
    """Z-Image-Turbo: Qwen3-4B with a prompt padded to 512 tokens, of which the transformer reads the real ones."""
    with init_empty_weights():
        text_encoder = Qwen3Model(Qwen3Config(**QWEN3_4B))
        transformer = ZImageTransformer2DModel()
        vae = AutoencoderKL(**FLUX_VAE)
    size = image_size // 8
    step = count(lambda: transformer([_zeros(16, 1, size, size)], _zeros(1), [_zeros(NUM_PROMPT_TOKENS, 2560)]))
    text = count(lambda: text_encoder(_tokens(1, 512)))
    return ImageFlops(text, num_steps * step, count(lambda: vae.decode(_zeros(1, 16, size, size))))


def count_all(image_size: int) -> dict[str, ImageFlops]:
    """Every model at one image size, by name."""
    few = {"kind": "latte_flow", "guidance_scale": 1, "image_size": image_size}
    scenarios = {
        "LaTtE-Flow 2B, K = 4, 4 steps": {**few, "num_steps": 4},
        "LaTtE-Flow 2B, K = 4, 8 steps": {**few, "num_steps": 8},
        "LaTtE-Flow 2B, K = 4, 40 steps with guidance": {"kind": "latte_flow", "image_size": image_size},
        **{
            f"SANA-Sprint 0.6B, {steps} step{'s' if steps > 1 else ''}": {
                "kind": "sana_sprint",
                "num_steps": steps,
                "image_size": image_size,
            }
            for steps in (1, 2, 4)
        },
        "Sana 0.6B, 20 steps with guidance": {"kind": "sana", "image_size": image_size},
    }
    counted = {name: count_scenario(make_scenario(name, content)) for name, content in scenarios.items()}
    return {
        **counted,
        "Z-Image-Turbo 6B, 8 steps": count_z_image_turbo(image_size),
        "FLUX.1-schnell 12B, 4 steps": count_flux_schnell(image_size),
    }


def to_markdown(counted: dict[str, ImageFlops]) -> str:
    """A row per model; the last column is relative to the first row."""
    first = next(iter(counted.values()))
    lines = ["| model | text encoder | steps | decoder | image, TFLOPs | relative |", "|---|---|---|---|---|---|"]
    for name, flops in counted.items():
        parts = " | ".join(f"{value / 1e12:.3f}" for value in (flops.text, flops.loop, flops.decode, flops.image))
        lines.append(f"| {name} | {parts} | {flops.image / first.image:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="height and width in pixels")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        if size < 32 or size % 32:
            parser.exit(1, f"Error: sizes must be positive multiples of 32, got {size}.\n")
    for size in options.sizes:
        print(f"{size}x{size}:\n\n{to_markdown(count_all(size))}\n")


if __name__ == "__main__":
    main()
