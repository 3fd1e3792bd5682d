# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What `latte-flow bench` lets run against each other: this model, its bare matrix products, and what else paints.

What is unusual here: every contestant is the stock class at its published size with random weights, timed through the
call a user would make (`pipe(...)`, `model.generate(...)`). `paint(num_steps, mark)` makes one such call with so many
steps and returns the picture; `mark("prefill")`, `mark("step")` and `mark("decode")` are called where that part of it
has ended.

Networks are built on the meta device. `fill` then gives them weights, out of a pool by name: contestants of one family
(the same layers, grouped differently) share theirs, so that they are compared on the same memory.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

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
    SanaTransformer2DModel,
)
from torch import nn
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LogitsProcessorList,
    Qwen2VLConfig,
)

from ..checkpoints import tiny_checkpoint
from ..modeling.configuration_latte_flow import LatteFlowConfig
from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
from ..modeling.processing_latte_flow import LatteFlowProcessor
from ..pipelines.pipeline_latte_flow import LatteFlowPipeline
from ..schedulers.scheduling_latte_flow import LatteFlowScheduler


Mark = Callable[[str], None]
Paint = Callable[[int, Mark], torch.Tensor]

PROMPT = "a red circle left of a blue square"

# Qwen2-VL-2B-Instruct's text model. The vision tower sees no picture here and is kept to one small layer.
QWEN2_VL_2B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
# dc-ae-f32c32-sana-1.0 by diffusers' conversion script.
DC_AE_F32C32 = {
    "latent_channels": 32,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
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
# Sana_600M_512px by diffusers' conversion script.
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
class Contestant:
    """One way to paint a picture; the subclasses are what a suite may name as `kind`.

    Args:
        sizes (`dict`): by part of the network, numbers that replace the published ones, for runs at reduced size.
        steps (`int`): steps of a whole picture.
        guidance_scale (`float`): every contestant computes both branches of guidance in one batch.
        pixels (`int`): side of the picture.
        batch (`int`): pictures painted at once.

    Raises:
        `ValueError`: if a count is not positive, or `sizes` names an unknown part.
    """

    kind: ClassVar[str] = ""
    published: ClassVar[dict[str, dict]] = {}
    note: ClassVar[str] = ""

    sizes: dict = field(default_factory=dict)
    compile: bool = field(default=False, init=False)
    steps: int = 40
    guidance_scale: float = 4.0
    pixels: int = 256
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "pixels", "batch", "num_experts"):
            value = getattr(self, name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        unknown = set(self.sizes) - set(self.published)
        if unknown:
            raise ValueError(f"sizes of {self.kind!r} may name {sorted(self.published)}, got {sorted(unknown)}.")

    def size_of(self, part: str) -> dict:
        """The published numbers of one part, with what `sizes` replaces."""
        return {**self.published[part], **self.sizes.get(part, {})}

    @property
    def family(self) -> str:
        """Contestants of one family share their weights and hence a process."""
        return f"{self.kind} {json.dumps(self.sizes, sort_keys=True)}"

    def networks(self) -> dict[str, nn.Module]:
        """Everything with weights, on the meta device."""
        raise NotImplementedError

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        """What one step of the loop runs."""
        raise NotImplementedError

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        """Networks with weights -> the call that is timed; `compiled` only where the contestant asks for it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LatteFlow(Contestant):
    """This model at the paper's size: Qwen2-VL-2B, DC-AE f32c32.

    Args:
        num_experts (`int`): K.
        residual_attention (`str` or `None`): as of [`LatteFlowConfig`].
        compile (`bool`): whether `pipe.compile()` is called.
    """

    kind = "latte_flow"
    published = {"backbone": QWEN2_VL_2B, "vae": DC_AE_F32C32}
    note = "vision tower, language head and the autoencoder's encoder left out; small tokenizer"

    num_experts: int = 4
    residual_attention: str | None = "scores"
    compile: bool = False

    @property
    def family(self) -> str:
        return f"latte_flow {json.dumps(self.sizes, sort_keys=True)}"

    def networks(self) -> dict[str, nn.Module]:
        text, vae = self.size_of("backbone"), self.size_of("vae")
        vision = {"depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": text["hidden_size"]}
        config = LatteFlowConfig(
            vlm_config=Qwen2VLConfig(text_config=text, vision_config=vision),
            num_experts=self.num_experts,
            latent_channels=vae["latent_channels"],
            residual_attention=self.residual_attention,
        )
        with init_empty_weights():
            model = LatteFlowForConditionalGeneration(config)
            autoencoder = AutoencoderDC(**vae)
        model.vlm.lm_head = nn.Identity()
        autoencoder.encoder = nn.Identity()
        return {"model": model, "vae": autoencoder}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"]
        shared = [child for name, child in model.tower.named_children() if name != "layers"]
        return [*shared, *(model.tower.layers[index] for index in model.expert_layers(0))]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        processor = LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor")
        scheduler = LatteFlowScheduler(expert_boundaries=networks["model"].config.expert_boundaries)
        pipe = LatteFlowPipeline(processor=processor, scheduler=scheduler, **networks)
        if compiled:
            pipe.compile()
        pipe.set_progress_bar_config(disable=True)
        encode_prompt = pipe.encode_prompt

        def paint(num_steps: int, mark: Mark) -> torch.Tensor:
            pipe.encode_prompt = _then(encode_prompt, mark, "prefill")  # type: ignore[method-assign]
            images = pipe(
                PROMPT,
                height=self.pixels,
                width=self.pixels,
                num_inference_steps=num_steps,
                guidance_scale=self.guidance_scale,
                num_images_per_prompt=self.batch,
                output_type="pt",
                callback_on_step_end=_at_step_end(mark),
            ).images
            mark("decode")
            return images

        return paint


@dataclass(frozen=True, kw_only=True)
class Floor(LatteFlow):
    """The bare matrix products of [`LatteFlow`]'s active layers: same shapes, same weights, nothing between them."""

    kind = "floor"
    note = "matrix products of the latents' projections and feed-forwards alone"

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return self._linears(networks["model"], 0)

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        model = networks["model"]
        weights = [[m.weight for m in self._linears(model, expert)] for expert in range(self.num_experts)]
        branches = 2 if self.guidance_scale > 1 else 1
        tokens = branches * self.batch * (self.pixels // _compression(networks["vae"])) ** 2
        like = weights[0][0]
        inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]).to(like) for group in weights for w in group}

        def paint(num_steps: int, mark: Mark) -> torch.Tensor:
            for step in range(num_steps):
                for weight in weights[step * self.num_experts // num_steps]:
                    output = nn.functional.linear(inputs[weight.shape[1]], weight)
                mark("step")
            return output

        return paint

    def _linears(self, model: nn.Module, expert: int) -> list[nn.Module]:
        layers = [model.tower.layers[index] for index in model.expert_layers(expert)]
        found = [model.tower.latent_embedding]
        for layer in layers:
            found += [getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"]
            found += [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)]
        return [*found, model.tower.head.proj]


@dataclass(frozen=True, kw_only=True)
class Embedded(LatteFlow):
    """The checkpoint inside the package, with its own weights."""

    kind = "embedded"
    published = {}
    note = "the embedded checkpoint, trained weights"

    num_experts: int = field(default=4, init=False)
    residual_attention: str | None = field(default="scores", init=False)
    pixels: int = 64

    @property
    def family(self) -> str:
        return self.kind

    def networks(self) -> dict[str, nn.Module]:
        pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
        return {"model": pipe.model, "vae": pipe.vae}


@dataclass(frozen=True, kw_only=True)
class DiT(Contestant):
    """DiT-XL/2 by diffusers' own pipeline: a class label, latents of 32x32x4, guidance."""

    kind = "dit"
    published = {"transformer": DIT_XL_2, "vae": SD_VAE}
    note = "the autoencoder's encoder left out; no text, a class label; diffusers embeds the timestep in every layer"

    steps: int = 250

    def networks(self) -> dict[str, nn.Module]:
        with init_empty_weights():
            vae = AutoencoderKL(**self.size_of("vae"), sample_size=self.pixels)
            size = self.pixels // _compression(vae)
            transformer = DiTTransformer2DModel(**self.size_of("transformer"), sample_size=size)
        vae.encoder = nn.Identity()
        return {"transformer": transformer, "vae": vae}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return [networks["transformer"]]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        pipe = DiTPipeline(scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False), **networks)
        pipe.set_progress_bar_config(disable=True)
        step = pipe.scheduler.step

        def paint(num_steps: int, mark: Mark) -> torch.Tensor:
            pipe.scheduler.step = _then(step, mark, "step")
            labels = [1] * self.batch
            images = pipe(labels, self.guidance_scale, num_inference_steps=num_steps, output_type="pt").images
            mark("decode")
            return images

        return paint


@dataclass(frozen=True, kw_only=True)
class Sana(Contestant):
    """Sana-0.6B by diffusers' own pipeline, with 300 prompt embeddings given."""

    kind = "sana"
    published = {"transformer": SANA_600M, "vae": DC_AE_F32C32}
    note = "its text encoder (Gemma-2-2B, 300 tokens) left out, in its favour; the autoencoder's encoder left out"

    steps: int = 20
    guidance_scale: float = 4.5
    pixels: int = 512

    def networks(self) -> dict[str, nn.Module]:
        with init_empty_weights():
            vae = AutoencoderDC(**self.size_of("vae"))
            size = self.pixels // _compression(vae)
            transformer = SanaTransformer2DModel(**self.size_of("transformer"), sample_size=size)
        vae.encoder = nn.Identity()
        return {"transformer": transformer, "vae": vae}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return [networks["transformer"]]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        # The scheduler of the published checkpoints.
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
        pipe = SanaPipeline(tokenizer=None, text_encoder=None, scheduler=scheduler, **networks)
        pipe.set_progress_bar_config(disable=True)
        like = next(networks["transformer"].parameters())
        embeds = torch.randn(1, 300, self.size_of("transformer")["caption_channels"]).to(like)
        mask = torch.ones(1, 300, device=like.device)

        def paint(num_steps: int, mark: Mark) -> torch.Tensor:
            images = pipe(
                negative_prompt=None,
                prompt_embeds=embeds,
                prompt_attention_mask=mask,
                negative_prompt_embeds=embeds,
                negative_prompt_attention_mask=mask,
                height=self.pixels,
                width=self.pixels,
                num_inference_steps=num_steps,
                guidance_scale=self.guidance_scale,
                num_images_per_prompt=self.batch,
                use_resolution_binning=False,
                output_type="pt",
                callback_on_step_end=_at_step_end(mark),
            ).images
            mark("decode")
            return images

        return paint


@dataclass(frozen=True, kw_only=True)
class Janus(Contestant):
    """Janus-Pro-1B by transformers' own `generate`: 576 image tokens one after the other, static cache, guidance."""

    kind = "janus"
    published = {"text": JANUS_PRO_1B_TEXT, "vision": {}, "vq": {}}
    note = "vision tower of one layer, no language head; the prefill gives the first of the 576 tokens"

    steps: int = 575
    guidance_scale: float = 5.0
    pixels: int = 384

    def networks(self) -> dict[str, nn.Module]:
        text, vision, vq = self.size_of("text"), self.size_of("vision"), self.size_of("vq")
        width = {"projection_dim": text["hidden_size"]}
        config = JanusConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"num_hidden_layers": 1, "image_size": self.pixels, **width, **vision},
            vq_config={"image_token_embed_dim": text["hidden_size"], **width, **vq},
        )
        with init_empty_weights():
            model = JanusForConditionalGeneration(config)
        model.lm_head = nn.Identity()
        return {"model": model}

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"].model
        heads = [model.generation_head, model.generation_aligner]
        return [model.language_model.layers, model.language_model.norm, *heads]

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Paint:
        model = networks["model"]
        device = next(model.parameters()).device
        bos, pad, image = 0, 1, 2
        prompt = torch.tensor([[bos, *range(3, 27), image]], device=device).repeat(self.batch, 1)
        num_tokens = model.config.vq_config.num_patches**2
        # `max_length` sizes the cache, also where fewer steps are measured.
        generation = GenerationConfig(
            bos_token_id=bos,
            pad_token_id=pad,
            eos_token_id=pad,
            do_sample=True,
            guidance_scale=self.guidance_scale,
            max_length=prompt.shape[1] + num_tokens,
            generation_kwargs={"boi_token_id": image},
        )

        def paint(num_steps: int, mark: Mark) -> torch.Tensor:
            marks = iter(["prefill"] + ["step"] * num_steps)

            def scores_are_there(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                mark(next(marks))
                return scores

            model.model.vision_model.config.num_image_tokens = num_steps + 1
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_mode="image",
                generation_config=generation,
                logits_processor=LogitsProcessorList([scores_are_there]),
            )
            images = model.decode_image_tokens(nn.functional.pad(tokens, (0, num_tokens - tokens.shape[1])))
            mark("decode")
            return images

        return paint


KINDS: dict[str, type[Contestant]] = {kind.kind: kind for kind in (LatteFlow, Floor, Embedded, DiT, Sana, Janus)}


def make_contestant(name: str, given: Any) -> Contestant:
    """A contestant from its entry in a suite.

    Raises:
        `ValueError`: if its kind or a field is unknown, or a value is out of range.
    """
    if not isinstance(given, dict) or given.get("kind") not in KINDS:
        found = given.get("kind") if isinstance(given, dict) else given
        raise ValueError(f"contestant {name!r}: kind must be one of {list(KINDS)}, got {found!r}.")
    kind = KINDS[given["kind"]]
    known = {item.name for item in fields(kind) if item.init}
    unknown = set(given) - known - {"kind"}
    if unknown:
        raise ValueError(f"contestant {name!r}: fields of {kind.kind!r} are {sorted(known)}, got {sorted(unknown)}.")
    try:
        return kind(**{key: value for key, value in given.items() if key != "kind"})
    except ValueError as error:
        raise ValueError(f"contestant {name!r}: {error}") from error


def named_parameters(networks: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name in the pool, module, name in the module, parameter) of all networks."""
    for part, network in networks.items():
        for path, module in network.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{part}.{path}.{name} {tuple(parameter.shape)}", module, name, parameter


def fill(networks: dict[str, nn.Module], pool: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> None:
    """Give the networks weights: those of the pool, and new random ones for names that it lacks, which it then holds.

    One block of normal numbers is laid over all of them (drawing billions would take minutes), scaled by one over the
    square root of the inputs; norms are one and biases zero. The block's odd length keeps rows from being equal.
    """
    block = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, module, key, parameter in named_parameters(networks):
        if not parameter.is_meta:
            continue
        if name not in pool:
            weights = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.ndim < 2:
                weights.fill_(0.0 if key.endswith("bias") else 1.0)
            else:
                scale = parameter[0].numel() ** -0.5
                for chunk in weights.view(-1).split(len(block)):
                    torch.mul(block[: len(chunk)], scale, out=chunk)
            pool[name] = weights
        setattr(module, key, nn.Parameter(pool[name], requires_grad=False))
    for network in networks.values():
        network.to(device).eval()


def _then(function: Callable, mark: Mark, part: str) -> Callable:
    """`function`, with a mark where it has returned."""

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark(part)
        return result

    return marked


def _at_step_end(mark: Mark) -> Callable[..., dict]:
    """A `callback_on_step_end` that marks the step."""

    def marked(*_: Any) -> dict:
        mark("step")
        return {}

    return marked


def _compression(vae: nn.Module) -> int:
    widths = getattr(vae.config, "decoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(widths) - 1)
