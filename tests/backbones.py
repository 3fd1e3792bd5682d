# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Vision-language models of transformers at tiny sizes, with random weights, and inputs for them without a processor.

One entry per family, since families differ in what their decoder layers and their prompts are made of. All of them
have 4 decoder layers of width 32, and take images of 32x32 pixels.
"""

from typing import Any

import torch
from helpers import fill
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel


VOCAB_SIZE = 64
# Ids of special tokens; `tiny_config` takes others, such as those of a tokenizer.
TOKENS = {
    "eos_token_id": 1,
    "pad_token_id": 0,
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
IMAGE_SIZE = 32

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}
QWEN2_VISION = {"depth": 1, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
QWEN2_5_VISION = {**QWEN2_VISION, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 32}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
GEMMA = {**TEXT, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 12}
LLAMA, QWEN2, QWEN3 = (
    {**TEXT, "model_type": "llama"},
    {**TEXT, "model_type": "qwen2"},
    {**TEXT, "model_type": "qwen3", "head_dim": 16},
)
INTERNVL_VISION = {**SIGLIP, "image_size": [IMAGE_SIZE] * 2, "patch_size": [8, 8], "norm_type": "layer_norm"}
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32}
LLAVA = {"vision_config": CLIP, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# By name: the model type, and the configuration without what all have (vocabulary, special tokens).
BACKBONES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN2_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN2_5_VISION, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2]}},
        "vision_config": {
            **QWEN2_VISION,
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "smolvlm": {"text_config": LLAMA, "vision_config": SIGLIP, "scale_factor": 2},
    "idefics3": {"text_config": LLAMA, "vision_config": SIGLIP, "scale_factor": 2},
    "llava_llama": {"model_type": "llava", "text_config": LLAMA, **LLAVA},
    "llava_qwen2": {"model_type": "llava", "text_config": QWEN2, **LLAVA},
    "llava_onevision": {
        "text_config": QWEN2,
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[IMAGE_SIZE, IMAGE_SIZE]],
    },
    "internvl_qwen2": {"model_type": "internvl", "text_config": QWEN2, "vision_config": INTERNVL_VISION},
    "internvl_qwen3": {"model_type": "internvl", "text_config": QWEN3, "vision_config": INTERNVL_VISION},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        "vision_feature_layer": -1,
        "spatial_merge_size": 2,
    },
    "ovis2": {
        "text_config": QWEN2,
        "vision_config": {**SIGLIP, "vocab_size": 16, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
    },
    "gemma3": {
        "text_config": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "mm_tokens_per_image": 4,
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 16},
        "vision_config": {**SIGLIP, "projection_dim": 32, "vision_use_head": False},
        "projection_dim": 32,
    },
    "paligemma2": {
        "model_type": "paligemma",
        # A small cap, so that it changes the scores of tests.
        "text_config": {**GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 5.0},
        "vision_config": {**SIGLIP, "projection_dim": 32, "vision_use_head": False},
        "projection_dim": 32,
    },
    "glm4v": {
        "text_config": {
            **TEXT,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {**MROPE, "partial_rotary_factor": 0.5},
        },
        "vision_config": {
            **QWEN2_VISION,
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "image_size": IMAGE_SIZE,
        },
    },
    "janus": {
        "text_config": LLAMA,
        "vision_config": {**SIGLIP, "projection_dim": 32, "mlp_ratio": 1.0, "depth": 1, "num_image_tokens": 16},
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "image_token_embed_dim": 32,
            "projection_dim": 32,
            "num_patches": 16,
        },
    },
}
# Not in the list of what is supported end to end: two mixtures of experts, attention beside the feed-forward, queries
# that are scaled by their position, and one projection for queries, keys and values.
MORE_BACKBONES: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {
        "text_config": {
            **BACKBONES["qwen3_vl"]["text_config"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
        "vision_config": BACKBONES["qwen3_vl"]["vision_config"],
    },
    "glm4v_moe": {
        "text_config": {
            **BACKBONES["glm4v"]["text_config"],
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "vision_config": BACKBONES["glm4v"]["vision_config"],
    },
    "aya_vision": {
        "text_config": {**GEMMA, "model_type": "cohere2", "layer_types": ["sliding_attention", "full_attention"] * 2},
        "vision_config": {**SIGLIP, "vision_use_head": False},
        "vision_feature_layer": -1,
        "downsample_factor": 2,
        "adapter_layer_norm_eps": 1e-6,
    },
    "ministral3": {
        **BACKBONES["mistral3"],
        "model_type": "mistral3",
        "text_config": {
            **BACKBONES["mistral3"]["text_config"],
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                # Shorter than the prompts of tests: queries are scaled after it.
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.5,
            },
        },
    },
    "llava_phi3": {"model_type": "llava", "text_config": {**TEXT, "model_type": "phi3"}, **LLAVA},
}
# Of the image: how many tokens it takes in the prompt, and in which form the pixels come.
NUM_IMAGE_TOKENS = {
    **dict.fromkeys([*BACKBONES, *MORE_BACKBONES], 4),
    **dict.fromkeys(["llava_llama", "llava_qwen2", "llava_phi3", "paligemma", "paligemma2", "janus"], 16),
    "llava_onevision": 36,
}
PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "qwen3_vl_moe", "glm4v_moe")


def tiny_config(name: str, vocab_size: int = VOCAB_SIZE, **tokens: int) -> PreTrainedConfig:
    """The configuration of a backbone, for a tokenizer of this size with these special tokens (see `TOKENS`)."""
    entry = dict({**BACKBONES, **MORE_BACKBONES}[name])
    tokens = {**TOKENS, **tokens}
    model_type = entry.pop("model_type", name)
    for part in ("eos_token_id", "pad_token_id"):
        entry["text_config"] = {**entry["text_config"], part: tokens[part], "vocab_size": vocab_size}
    if model_type == "ovis2":
        entry["visual_indicator_token_ids"] = [tokens["vision_start_token_id"]] * 5
        entry["hidden_size"], entry["vocab_size"] = 32, vocab_size
    if model_type in ("glm4v", "glm4v_moe"):
        tokens["image_start_token_id"] = tokens.pop("vision_start_token_id")
        tokens["image_end_token_id"] = tokens.pop("vision_end_token_id")
    return AutoConfig.for_model(model_type, **entry, **tokens, tie_word_embeddings=True)


def tiny_backbone(name: str, vocab_size: int = VOCAB_SIZE, **tokens: int) -> PreTrainedModel:
    """The stock class with random weights, frozen, in evaluation mode."""
    model = AutoModelForImageTextToText.from_config(tiny_config(name, vocab_size, **tokens))
    fill(model, seed=1, std=0.25)
    return model.requires_grad_(False).eval()


def image_inputs(name: str, num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the backbone's processor would return for this many images, one in each prompt."""
    generator = torch.Generator().manual_seed(seed)
    side = IMAGE_SIZE // 8

    def pixels(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    if name in PATCHES:
        return {
            "pixel_values": pixels(num_images * side**2, 3 * 2 * 8 * 8),
            "image_grid_thw": torch.tensor([[1, side, side]] * num_images),
        }
    sizes = {"image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * num_images)}
    if name in ("smolvlm", "idefics3"):
        return {"pixel_values": pixels(num_images, 1, 3, IMAGE_SIZE, IMAGE_SIZE)}
    if name == "llava_onevision":  # the whole image, and its one tile
        return {"pixel_values": pixels(num_images, 2, 3, IMAGE_SIZE, IMAGE_SIZE), **sizes}
    if name in ("mistral3", "ministral3"):
        return {"pixel_values": pixels(num_images, 3, IMAGE_SIZE, IMAGE_SIZE), **sizes}
    return {"pixel_values": pixels(num_images, 3, IMAGE_SIZE, IMAGE_SIZE)}


def prompt_inputs(
    name: str, lengths: tuple[int, ...] = (7,), with_image: bool = False, seed: int = 0, image_token_id: int = 60
) -> dict[str, torch.Tensor]:
    """Prompts of random text, each after an image if asked for, padded on the left to the longest.

    Args:
        name (`str`): the backbone.
        lengths (`tuple[int, ...]`): the number of tokens of text in each prompt.
        with_image (`bool`, defaults to `False`): whether each prompt starts with an image, after one token of text.
        seed (`int`, defaults to 0): of tokens and pixels.
        image_token_id (`int`, defaults to that of `TOKENS`): the token that stands for a part of an image.
    """
    generator = torch.Generator().manual_seed(seed)
    num_image_tokens = NUM_IMAGE_TOKENS[name] if with_image else 0
    total = max(lengths) + num_image_tokens
    shape = (len(lengths), total)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask, is_image = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        start = total - length - num_image_tokens
        input_ids[row, start:] = torch.randint(2, 60, (total - start,), generator=generator)
        attention_mask[row, start:] = 1
        is_image[row, start + 1 : start + 1 + num_image_tokens] = 1
    input_ids[is_image == 1] = image_token_id
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if name in PATCHES:
        inputs["mm_token_type_ids"] = is_image
    if name == "gemma3":
        inputs["token_type_ids"] = is_image
    if name in ("paligemma", "paligemma2"):  # 0 in the prefix, which is the whole prompt
        inputs["token_type_ids"] = torch.zeros_like(is_image)
    return inputs | (image_inputs(name, len(lengths), seed) if with_image else {})
