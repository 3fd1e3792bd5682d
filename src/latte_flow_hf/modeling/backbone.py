# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What the generation tower takes over from the backbone: the parts of its decoder layers, of the same classes.

What is unusual here: nothing of a family is written again. A layer of the tower contains an attention and a
feed-forward module of the backbone's classes, so that norms of queries and keys, biases, head sizes, rotary embeddings
and scales are the backbone's own code. What this file decides is which norm stands where, and which layers cannot be
mirrored; whether the result is right is not decided but computed, by [`DecoderStates`].
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .signatures import takes_argument


# The name of the tower's attention among transformers' attention implementations, see attention.py.
TOWER_ATTENTION = "latte_flow_tower"

# The norms of a decoder layer, by their names in the tower's layer. The first set of names that a layer has is used.
LAYER_NORMS = (
    # Gemma 2 and 3: a norm before and one after each part, as in the tower.
    {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
    # GLM-4, the same under other names.
    {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_self_attn_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "mlp_post_norm": "post_mlp_layernorm",
    },
    # Llama, Mistral, Qwen, Gemma 1.
    {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    # Cohere: attention and feed-forward stand side by side, behind one norm.
    {"attention_norm": "input_layernorm"},
)

# Kinds of layers, as `layer_types` of transformers' configurations has them, whose keys a latent can attend to.
LAYER_TYPES = ("full_attention", "sliding_attention")

# Why a layer with such a part cannot be mirrored.
_REASONS = {
    "cross_attn": "it attends to the image by cross-attention, which leaves no keys and values of the prompt",
    "linear_attn": "its linear attention keeps a state in place of the prompt's keys and values",
    "conv": "its convolution keeps a state in place of the prompt's keys and values",
    "per_layer_input_gate": "it reads an embedding of the token in every layer, which latents do not have",
    "layer_scalar": "it scales the sum of all layers before it",
}

# Largest difference between a mirrored layer and the backbone's, relative to the standard deviation of the output.
# (Chosen: float32 gives about 1e-6, and a norm, a bias or a rotation left out more than 1e-1.)
TOLERANCE = 1e-3


def read_vlm_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a backbone in a folder or on the hub.

    Raises:
        `OSError`: if there is none.
        `ValueError`: if it is not one of transformers, or not that of a vision-language model with a decoder.
    """
    content, _ = PreTrainedConfig.get_config_dict(source)
    if content.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"backbone must be a model that is part of transformers {transformers.__version__}, got the model type "
            f"{content.get('model_type')!r} ({source}); code of a checkpoint (trust_remote_code) is not supported."
        )
    config = AutoConfig.from_pretrained(source)
    check_vlm_config(config)
    return config


def check_vlm_config(vlm_config: PreTrainedConfig) -> None:
    """Refuse what is not a vision-language model of transformers with a decoder.

    Raises:
        `ValueError`: with what is missing.
    """
    model_type = vlm_config.model_type
    advice = "use the configuration of a vision-language model of transformers, such as Qwen2-VL, instead."
    if type(vlm_config).__module__.partition(".")[0] != "transformers":
        raise ValueError(
            f"vlm_config must be of a model that is part of transformers, got {type(vlm_config).__name__} (model type "
            f"{model_type!r}), which is code from elsewhere; {advice}"
        )
    if getattr(vlm_config, "is_encoder_decoder", False):
        raise ValueError(
            f"vlm_config must be of a model with a decoder alone, got the encoder-decoder {model_type!r}: its decoder "
            f"has no keys and values of the prompt; {advice}"
        )
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        is_text = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        found = "a text-only model" if is_text else "which transformers does not list as one (image-text-to-text)"
        raise ValueError(f"vlm_config must be of a vision-language model, got {model_type!r}, {found}; {advice}")
    sizes = ("hidden_size", "num_hidden_layers")
    text_config = vlm_config.get_text_config(decoder=True)
    missing = [name for name in sizes if not isinstance(getattr(text_config, name, None), int)]
    if missing:
        raise ValueError(f"vlm_config {model_type!r} has no decoder of layers (missing: {missing}); {advice}")


def check_vlm(vlm: Any) -> None:
    """Refuse a model that is not a whole vision-language model, as `AutoModelForImageTextToText` loads it.

    Raises:
        `ValueError`: with the class that it should have.
    """
    if not isinstance(vlm, PreTrainedModel):
        raise ValueError(
            f"vlm must be a loaded vision-language model, got {type(vlm).__name__}; load it with "
            "AutoModelForImageTextToText.from_pretrained."
        )
    check_vlm_config(vlm.config)
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[vlm.config.model_type]
    expected = (names,) if isinstance(names, str) else tuple(names)
    if not {base.__name__ for base in type(vlm).__mro__} & set(expected):
        raise ValueError(
            f"vlm must be a {' or '.join(expected)}, got {type(vlm).__name__}; load it with "
            "AutoModelForImageTextToText.from_pretrained."
        )


def find_decoder(vlm: PreTrainedModel) -> Any:
    """The decoder of a backbone, with `layers` and `rotary_emb`.

    Raises:
        `ValueError`: if it has none of this kind.
    """
    decoder: Any = vlm.get_decoder()
    missing = [name for name in ("layers", "rotary_emb") if not hasattr(decoder, name)]
    if missing or not len(decoder.layers):
        raise ValueError(
            f"the backbone {type(vlm).__name__} cannot be used: its decoder ({type(decoder).__name__}) has no "
            f"{' and no '.join(missing) or 'layers'}; use one with a list of decoder layers and rotary positions."
        )
    return decoder


def layer_type(config: PreTrainedConfig, index: int) -> str:
    """The kind of decoder layer number `index`, `"full_attention"` if the configuration does not tell them apart."""
    layer_types = getattr(config, "layer_types", None)
    return layer_types[index] if layer_types else LAYER_TYPES[0]


def sliding_window(config: PreTrainedConfig, kind: str) -> int | None:
    """How many tokens a layer of this kind sees, itself included; `None` if all."""
    if getattr(config, "layer_types", None) and kind != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def rope_settings(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The settings of rotary embeddings in a decoder's configuration: one for all layers, or one for each kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    by_kind = [value for value in settings.values() if isinstance(value, dict)]
    return by_kind or [settings]


def max_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions with the same rotary frequencies, `None` if they never change.

    Dynamic NTK scaling and LongRoPE change the frequencies of all tokens by the longest prompt of a batch. Keys that
    are in a context would then not fit those of the latents.
    """
    limits = []
    for settings in rope_settings(config):
        if settings.get("rope_type") == "dynamic":
            # Not all: at the full length, transformers keeps the frequencies of a longer text before.
            limits.append(config.max_position_embeddings - 1)
        elif settings.get("rope_type") == "longrope":
            limits.append(settings["original_max_position_embeddings"])
    return min(limits, default=None)


def check_positions(positions: torch.Tensor, limit: int | None) -> None:
    """
    Args:
        positions (`torch.Tensor`): of tokens, the first one being 0.
        limit (`int`, *optional*): as returned by [`max_positions`].

    Raises:
        `ValueError`: if a position is beyond the limit.
    """
    if limit is not None and int(positions.max()) >= limit:
        raise ValueError(
            f"prompt and image need {int(positions.max()) + 1} positions, but the rotary frequencies of the backbone "
            f"(rope_type 'dynamic' or 'longrope') change beyond {limit}; use a shorter prompt, or fewer or smaller "
            "images in it."
        )


def with_fixed_frequencies(rotary_emb: Any) -> nn.Module:
    """A rotary embedding with the same frequencies that does not look for a reason to change them in every call."""
    fixed = copy.copy(rotary_emb)
    kinds = rotary_emb.rope_type
    fixed.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    return fixed


def copied_modules(layer: nn.Module, kind: str = LAYER_TYPES[0]) -> dict[str, str]:
    """The parts of a decoder layer that the tower copies: their names there, by their names in the tower's layer.

    Raises:
        `ValueError`: if the layer cannot be mirrored, with the reason.
    """
    parts = {name for name, child in layer.named_children() if any(True for _ in child.parameters())}
    parts |= {name for name, _ in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))}
    norms = next((norms for norms in LAYER_NORMS if set(norms.values()) <= parts), {})
    expected = {"self_attn", "mlp", *norms.values()}
    missing, unexpected = sorted(expected - parts), sorted(parts - expected)
    problems = [reason for name, reason in _REASONS.items() if name in parts]
    if kind not in LAYER_TYPES:
        problems.append(f"its attention is of the kind {kind!r}, not one of {list(LAYER_TYPES)}")
    if getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False):
        problems.append("it shares the keys and values of an earlier layer")
    if not problems and (missing or unexpected or not norms):
        problems.append(f"its parts are {sorted(parts)}, of which no arrangement is known")
    if problems:
        raise ValueError(
            f"the backbone's decoder layer {type(layer).__name__} cannot be mirrored: {'; '.join(problems)}. Use a "
            "backbone whose layers all have self-attention and feed-forward with norms before them, such as Qwen2-VL, "
            "Gemma 3 or GLM-4V, instead."
        )
    return {"self_attn": "self_attn", "mlp": "mlp", **norms}


def tower_text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the decoder's configuration with which its attention modules run the tower's attention."""
    config = copy.deepcopy(config)
    config._attn_implementation = TOWER_ATTENTION
    return config


def new_layer(source: nn.Module, config: PreTrainedConfig, index: int) -> Any:
    """A new decoder layer of the class of `source`, with weights of its own."""
    return type(source)(config, index)  # type: ignore[call-arg]


def rotary_cos_sin(
    rotary_emb: nn.Module, like: torch.Tensor, positions: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin at `positions` for the layers of one kind, in the dtype and on the device of `like`."""
    arguments = {"layer_type": kind} if takes_argument(type(rotary_emb).forward, "layer_type") else {}
    return rotary_emb(like, positions, **arguments)


def kinds_of_layers(decoder: Any) -> list[tuple]:
    """What tells the decoder's layers apart, for each of them."""
    return [
        (layer_type(decoder.config, index), type(layer), *(type(child) for child in layer.children()))
        for index, layer in enumerate(decoder.layers)
    ]


def shrink_text_config(config: PreTrainedConfig, num_layers: int) -> None:
    """Make a decoder's configuration small in place: fewer layers, heads and features of the same kinds.

    The head size stays, since sections of rotary embeddings depend on it, and so does everything that is not a size.
    A sliding window becomes shorter than the prompt of [`DecoderStates`], and so does the length from which on queries
    are scaled by their position (Ministral 3).
    """
    is_grouped = getattr(config, "num_key_value_heads", config.num_attention_heads) != config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if is_grouped else 2,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "vocab_size": 8,
        "pad_token_id": 0,
        "sliding_window": DecoderStates.num_context // 2,
    }
    for name, size in sizes.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
    for settings in rope_settings(config):
        if "llama_4_scaling_beta" in settings:
            settings["original_max_position_embeddings"] = DecoderStates.num_context // 2
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:num_layers])


@dataclass
class DecoderStates:
    """What each layer of a small decoder with random weights makes of the last of a few tokens.

    Args:
        decoder (`PreTrainedModel`): the decoder.
        inputs, outputs (`list[torch.Tensor]`): by layer, (1, 1, D), of the last token.
        keys, values (`list[torch.Tensor]`): by layer, (1, G, `num_context`, d), of the tokens before it.
    """

    num_context = 8

    decoder: Any
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, decoder_class: type[PreTrainedModel], config: PreTrainedConfig) -> "DecoderStates":
        """Run a new decoder of this class on random embeddings: with its own mask, positions and cache."""
        decoder = with_weights(decoder_class._from_config(config, attn_implementation="eager").float().eval())
        generator = torch.Generator().manual_seed(0)
        for parameter in decoder.parameters():
            # Matrices keep the size of what they are multiplied with, times two: attention must not be uniform.
            std = 0.2 if parameter.ndim < 2 else 2 * parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs.append((args[0] if args else kwargs["hidden_states"])[:, -1:].clone())
            outputs.append((output[0] if isinstance(output, tuple) else output)[:, -1:].clone())

        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in decoder.layers]
        cache = DynamicCache()
        embeds = torch.randn(1, cls.num_context + 1, config.hidden_size, generator=generator)
        decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        for handle in handles:
            handle.remove()
        keys = [layer.keys[:, :, : cls.num_context] for layer in cache.layers]  # type: ignore[union-attr]
        values = [layer.values[:, :, : cls.num_context] for layer in cache.layers]  # type: ignore[union-attr]
        return cls(decoder, inputs, outputs, keys, values)


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Small models made inside the block are on the CPU and in float32, and leave torch's random numbers alone."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def with_weights(module: Any) -> Any:
    """The same module, its parameters that are on the meta device replaced by ones on the CPU: inside of accelerate's
    `init_empty_weights`, every new parameter is moved there."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                part._parameters[name] = nn.Parameter(torch.ones_like(parameter, device="cpu"))
    return module


def rotates_pairs(rotary_emb: nn.Module, kind: str) -> bool:
    """Whether one frequency is that of two neighbouring features (GLM-4V), not of one in each half (Llama, Qwen)."""
    cos, sin = rotary_cos_sin(rotary_emb, torch.zeros(1), torch.ones(1, 1, dtype=torch.long), kind)
    halves = [states.unflatten(-1, (2, -1)) for states in (cos, sin)]
    if all(torch.equal(half[..., 0, :], half[..., 1, :]) for half in halves):
        return False
    pairs = [states.unflatten(-1, (-1, 2)) for states in (cos, sin)]
    if all(torch.equal(pair[..., 0], pair[..., 1]) for pair in pairs):
        return True
    raise ValueError("its rotary embedding turns neither halves nor pairs of the features of a head")
