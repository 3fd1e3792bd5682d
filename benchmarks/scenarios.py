# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What a benchmark suite measures: LaTtE-Flow at its real size, the embedded checkpoint, and the bare matrix products.

A scenario builds its networks on the meta device and gives a function that makes one call as a user would make it
(`pipe(...)`, `model.generate(...)`). That function calls `mark("prefill")`, `mark("step")` and `mark("decode")` when
that part of the call has ended. Models by other people are in `baselines.py`.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC
from torch import nn
from transformers import Qwen2VLConfig

from latte_flow_hf import (
    LatteFlowConfig,
    LatteFlowForConditionalGeneration,
    LatteFlowPipeline,
    LatteFlowProcessor,
    LatteFlowScheduler,
    tiny_checkpoint,
)
from latte_flow_hf.checkpoints import few_step_checkpoint
from latte_flow_hf.training.published import BACKBONES


Mark = Callable[[str], None]
# (number of steps, mark) -> images, or whatever the scenario computes in place of them.
Generate = Callable[[int, Mark], torch.Tensor]

PROMPT = "a red circle left of a blue square"

# The prompt has no image, so the vision tower is reduced to one small layer.
QWEN2_VL_2B = BACKBONES["Qwen/Qwen2-VL-2B-Instruct"]["text_config"]
# dc-ae-f32c32-sana-1.0, as in the conversion script of diffusers.
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


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One model with one set of options. A suite selects the subclass by its `kind` and gives the fields.

    Args:
        sizes (`dict`): configuration values that replace the published ones, by part of the network, for runs at a
            reduced size.
        num_steps (`int`): steps of one image.
        guidance_scale (`float`): every scenario computes both branches of guidance in one batch.
        image_size (`int`): height and width in pixels.
        batch_size (`int`): images generated in one call.

    Raises:
        `ValueError`: if a count is not positive, or `sizes` names an unknown part.
    """

    kind: ClassVar[str] = ""
    published_sizes: ClassVar[dict[str, dict]] = {}
    note: ClassVar[str] = ""

    sizes: dict = field(default_factory=dict)
    compile: bool = field(default=False, init=False)
    num_steps: int = 40
    guidance_scale: float = 4.0
    image_size: int = 256
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("num_steps", "image_size", "batch_size", "num_experts"):
            value = getattr(self, name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        unknown = set(self.sizes) - set(self.published_sizes)
        if unknown:
            raise ValueError(f"sizes of {self.kind!r} can name {sorted(self.published_sizes)}, got {sorted(unknown)}.")

    def size_of(self, part: str) -> dict:
        """The published configuration of one part, with the values of `sizes`."""
        return {**self.published_sizes[part], **self.sizes.get(part, {})}

    @property
    def family(self) -> str:
        """Scenarios of one family share their weights and therefore a process."""
        return f"{self.kind} {json.dumps(self.sizes, sort_keys=True)}"

    def build_networks(self) -> dict[str, nn.Module]:
        """Every module with weights, on the meta device."""
        raise NotImplementedError

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        """The modules that one step of the loop runs."""
        raise NotImplementedError

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        """Return the call to time. `compiled` is only passed to scenarios with `compile=True`."""
        raise NotImplementedError


def small_processor() -> Any:
    """The processor of the embedded checkpoint, for models of all sizes."""
    return LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor")


@dataclass(frozen=True, kw_only=True)
class LatteFlow(Scenario):
    """LaTtE-Flow at the size of the paper: Qwen2-VL-2B and DC-AE f32c32, random weights.

    Args:
        num_experts (`int`): K.
        residual_attention (`str` or `None`): same as in [`LatteFlowConfig`].
        compile (`bool`): whether to call `pipe.compile()`.
    """

    kind = "latte_flow"
    published_sizes = {"backbone": QWEN2_VL_2B, "vae": DC_AE_F32C32}
    note = "without the vision tower, the language head and the encoder of the autoencoder; small tokenizer"

    num_experts: int = 4
    residual_attention: str | None = "scores"
    compile: bool = False

    @property
    def family(self) -> str:
        # All groupings of the same layers, and their matrix products.
        return f"latte_flow {json.dumps(self.sizes, sort_keys=True)}"

    def build_networks(self) -> dict[str, nn.Module]:
        text, vae = self.size_of("backbone"), self.size_of("vae")
        processor = small_processor()
        vision = {"depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": text["hidden_size"]}
        vision["patch_size"] = processor.image_processor.patch_size
        config = LatteFlowConfig(
            vlm_config=Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=processor.image_token_id),
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

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        processor = small_processor()
        scheduler = LatteFlowScheduler(expert_boundaries=networks["model"].config.expert_boundaries)
        pipe = LatteFlowPipeline(processor=processor, scheduler=scheduler, **networks)
        if compiled:
            pipe.compile()
        pipe.set_progress_bar_config(disable=True)

        def generate(num_steps: int, mark: Mark) -> torch.Tensor:
            # Looked up in each call: `parts.py` times the method of the class.
            encode_prompt = functools.partial(LatteFlowPipeline.encode_prompt, pipe)
            pipe.encode_prompt = mark_after(encode_prompt, mark, "prefill")  # type: ignore[method-assign]
            images = pipe(
                PROMPT,
                height=self.image_size,
                width=self.image_size,
                num_inference_steps=num_steps,
                guidance_scale=self.guidance_scale,
                num_images_per_prompt=self.batch_size,
                output_type="pt",
                callback_on_step_end=mark_step_end(mark),
            ).images
            mark("decode")
            return images

        return generate


@dataclass(frozen=True, kw_only=True)
class Matmul(LatteFlow):
    """The matrix products of the active layers of [`LatteFlow`] alone: same shapes and weights, nothing in between."""

    kind = "matmul"
    note = "only the matrix products of the latents' projections and feed-forwards"

    def step_modules(self, networks: dict[str, nn.Module]) -> list[nn.Module]:
        return self._linear_layers(networks["model"], 0)

    def prepare(self, networks: dict[str, nn.Module], compiled: bool = False) -> Generate:
        model = networks["model"]
        # flatten: the latent embedding has a convolution's weight.
        weights = [
            [layer.weight.flatten(1) for layer in self._linear_layers(model, expert)]
            for expert in range(self.num_experts)
        ]
        num_branches = 2 if self.guidance_scale > 1 else 1
        num_tokens = num_branches * self.batch_size * (self.image_size // compression_ratio(networks["vae"])) ** 2
        like = weights[0][0]
        in_features = {weight.shape[1] for group in weights for weight in group}
        inputs = {size: torch.randn(num_tokens, size).to(like) for size in sorted(in_features)}

        def generate(num_steps: int, mark: Mark) -> torch.Tensor:
            for step in range(num_steps):
                for weight in weights[step * self.num_experts // num_steps]:
                    output = nn.functional.linear(inputs[weight.shape[1]], weight)
                mark("step")
            return output

        return generate

    def _linear_layers(self, model: nn.Module, expert: int) -> list[nn.Module]:
        linear_layers: list[nn.Module] = [model.tower.latent_embedding.proj]
        for index in model.expert_layers(expert):
            layer = model.tower.layers[index]
            linear_layers += [getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"]
            linear_layers += [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)]
        return [*linear_layers, model.tower.head.proj]


@dataclass(frozen=True, kw_only=True)
class EmbeddedCheckpoint(LatteFlow):
    """The checkpoint that the package contains, with its trained weights.

    Args:
        few_steps (`str`, *optional*): `"adapter"` for its few-step adapter, run by PEFT, `"fused"` for the same as
            part of the weights, as with `latte-flow generate --fast`; `num_steps` must be that of the adapter.

    Raises:
        `ValueError`: if `few_steps` is another value.
    """

    kind = "embedded"
    published_sizes = {}
    note = "the embedded checkpoint, trained weights"

    few_steps: str | None = None
    num_experts: int = field(default=4, init=False)
    residual_attention: str | None = field(default="scores", init=False)
    image_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few_steps not in (None, "adapter", "fused"):
            raise ValueError(f"few_steps must be 'adapter', 'fused' or left out, got {self.few_steps!r}.")

    @property
    def family(self) -> str:
        return self.kind

    def build_networks(self) -> dict[str, nn.Module]:
        pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
        if self.few_steps is not None:
            pipe.load_lora_weights(few_step_checkpoint())
        if self.few_steps == "fused":
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return {"model": pipe.model, "vae": pipe.vae}


def named_parameters(networks: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (unique name, module, name in the module, parameter) for all networks."""
    for part, network in networks.items():
        for path, module in network.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{part}.{path}.{name} {tuple(parameter.shape)}", module, name, parameter


def materialize(
    networks: dict[str, nn.Module], shared_weights: dict[str, torch.Tensor], device: str, dtype: torch.dtype
) -> None:
    """Give networks on the meta device weights from `shared_weights`; missing ones are drawn and added there.

    One block of normal numbers is repeated in all of them, since drawing billions would take minutes. It is scaled by
    one over the square root of the number of inputs; norms are one and biases zero. The block has an odd length, so
    that no two rows are equal.
    """
    block = torch.randn(4_194_301, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, module, key, parameter in named_parameters(networks):
        if not parameter.is_meta:
            continue
        if name not in shared_weights:
            weights = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.ndim < 2:
                weights.fill_(0.0 if key.endswith("bias") else 1.0)
            else:
                scale = parameter[0].numel() ** -0.5
                for chunk in weights.view(-1).split(len(block)):
                    torch.mul(block[: len(chunk)], scale, out=chunk)
            shared_weights[name] = weights
        setattr(module, key, nn.Parameter(shared_weights[name], requires_grad=False))
    for network in networks.values():
        network.to(device).eval()


def mark_after(function: Callable, mark: Mark, part: str) -> Callable:
    """Wrap `function` so that `part` is marked when it has returned."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark(part)
        return result

    return wrapped


def mark_step_end(mark: Mark) -> Callable[..., dict]:
    """Return a `callback_on_step_end` that marks the step."""

    def callback_on_step_end(*_: Any) -> dict:
        mark("step")
        return {}

    return callback_on_step_end


def compression_ratio(vae: nn.Module) -> int:
    """Pixels per latent pixel, along one side."""
    channels = getattr(vae.config, "decoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(channels) - 1)
