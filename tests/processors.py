# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Stock processors of the backbones in backbones.py at tiny sizes, made without files: a tokenizer of bytes with the
special tokens of the family, its own image processor, and a chat template.

The templates are short forms of the published ones: the same control tokens in the same order. Those with a video
processor, which needs torchvision, exist as `LatteFlowProcessor`'s adapters only.
"""

import functools
from typing import Any

import transformers
from backbones import IMAGE_SIZE, tiny_backbone
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from latte_flow_hf.modeling.processing_latte_flow import LatteFlowProcessorMixin, adapter_of


def _template(user: str, assistant: str, end: str, image: str, start: str = "") -> str:
    """Turns that begin with `user` or `assistant` and end with `end`; the assistant's are marked for training."""
    words = "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}"
    words += "{{ part['text'] }}{% endif %}{% endfor %}" + end
    return (
        start
        + "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        + assistant
        + "{% generation %}"
        + words
        + "{% endgeneration %}{% else %}"
        + user
        + words
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + assistant
        + "{% endif %}"
    )


def _chatml(image: str, role: str = "{{ message['role'] }}") -> str:
    return _template(f"<|im_start|>{role}\n", "<|im_start|>assistant\n", "<|im_end|>\n", image)


QWEN = {
    "tokens": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "ids": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
    "image": ("Qwen2VLImageProcessorPil", {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 4096}}),
    "template": _chatml("<|vision_start|><|image_pad|><|vision_end|>"),
}
IDEFICS = {
    "tokens": ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
    + [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)],
    "named": {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|endoftext|>"},
    "ids": {"image_token_id": "<image>"},
    "settings": {"image_seq_len": 4},
    "template": _template(
        "{{ message['role'] | capitalize }}: ", "Assistant: ", "<end_of_utterance>\n", "<image>", "<|im_start|>"
    ),
}
# An image longer than 32 pixels is split, and all parts and the whole are 32x32.
SPLIT = {"size": {"longest_edge": 2 * IMAGE_SIZE}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
SQUARE = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
LLAVA = {
    "tokens": ["<image>"],
    "named": {"bos_token": "<s>", "eos_token": "</s>"},
    "ids": {"image_token_id": "<image>"},
    "image": (
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}},
    ),
    # The tiny vision model has a token for the class, as CLIP's, which is left out again.
    "settings": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "template": _template("{{ message['role'] | upper }}: ", "ASSISTANT: ", " ", "<image>\n"),
    # No token to pad with, and the beginning of the text is the tokenizer's part, not the template's.
    "adds_bos": True,
}
GEMMA = {
    "tokens": ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "named": {
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "pad_token": "<pad>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "ids": {
        "image_token_id": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    "image": ("Gemma3ImageProcessorPil", SQUARE),
    "settings": {"image_seq_length": 4},
    "template": _template(
        "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n", "<start_of_image>", "{{ bos_token }}"
    ),
}
PALIGEMMA = {
    "named": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "image_token": "<image>"},
    "ids": {"image_token_id": "<image>"},
    "image": ("SiglipImageProcessorPil", {**SQUARE, "image_seq_length": 16}),
}
INTERNVL = {
    "tokens": ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "named": {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "ids": {"image_token_id": "<IMG_CONTEXT>"},
    "image": ("GotOcr2ImageProcessorPil", {**SQUARE, "max_patches": 2}),
    "settings": {"image_seq_length": 4},
    "template": _chatml("<IMG_CONTEXT>\n"),
}

# By name as in `BACKBONES`: the stock class; its tokenizer's special tokens, all of them (`tokens`) and those with a
# name; their names in the configuration of the model (`ids`); the image processor; other settings; the template.
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"class": "Qwen2VLProcessor", **QWEN},
    "qwen2_5_vl": {"class": "Qwen2_5_VLProcessor", **QWEN},
    "qwen3_vl": {"class": "Qwen3VLProcessor", **QWEN},
    "smolvlm": {"class": "SmolVLMProcessor", **IDEFICS, "image": ("SmolVLMImageProcessorPil", SPLIT)},
    "idefics3": {"class": "Idefics3Processor", **IDEFICS, "image": ("Idefics3ImageProcessorPil", SPLIT)},
    "llava_llama": {"class": "LlavaProcessor", **LLAVA},
    "llava_qwen2": {"class": "LlavaProcessor", **LLAVA},
    "llava_onevision": {
        "class": "LlavaOnevisionProcessor",
        "tokens": ["<|im_start|>", "<|im_end|>", "<image>", "<video>"],
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "ids": {"image_token_id": "<image>", "video_token_id": "<video>"},
        "image": (
            "LlavaOnevisionImageProcessorPil",
            {**SQUARE, "image_grid_pinpoints": [[IMAGE_SIZE, IMAGE_SIZE]]},
        ),
        "settings": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        "template": _chatml("<image>\n"),
    },
    "internvl_qwen2": {"class": "InternVLProcessor", **INTERNVL},
    "internvl_qwen3": {"class": "InternVLProcessor", **INTERNVL},
    "mistral3": {
        "class": "PixtralProcessor",
        "tokens": ["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"],
        "named": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "ids": {"image_token_id": "[IMG]"},
        "image": ("PixtralImageProcessorPil", {"patch_size": 8, "size": {"longest_edge": IMAGE_SIZE}}),
        "settings": {"patch_size": 8, "spatial_merge_size": 2},
        "template": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'][0]['text'] }}</s>{% endgeneration %}{% else %}[INST]"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}[IMG]{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}[/INST]{% endif %}{% endfor %}",
    },
    "ovis2": {
        "class": "Ovis2Processor",
        "tokens": ["<|im_start|>", "<|im_end|>", "<image>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_END>"],
        "named": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "ids": {"image_token_id": "<IMG_ATOM>", "vision_start_token_id": "<IMG_START>"},
        "image": ("Ovis2ImageProcessorPil", SQUARE),
        "settings": {"image_seq_length": 4},
        "template": _chatml("<image>\n"),
    },
    "gemma3": {"class": "Gemma3Processor", **GEMMA},
    "paligemma": {"class": "PaliGemmaProcessor", **PALIGEMMA},
    "paligemma2": {"class": "PaliGemmaProcessor", **PALIGEMMA},
    "glm4v": {
        "class": "Glm4vProcessor",
        "tokens": [
            *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
            *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
            *("<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
        ],
        "named": {"eos_token": "<|user|>", "pad_token": "<|endoftext|>"},
        "ids": {
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "vision_start_token_id": "<|begin_of_image|>",
            "vision_end_token_id": "<|end_of_image|>",
        },
        "image": ("Glm4vImageProcessorPil", {"patch_size": 8, "size": {"shortest_edge": 512, "longest_edge": 8192}}),
        "template": _template(
            "<|{{ message['role'] }}|>\n",
            "<|assistant|>\n",
            "",
            "<|begin_of_image|><|image|><|end_of_image|>",
            "[gMASK]<sop>",
        ),
    },
    "janus": {
        "class": "JanusProcessor",
        "tokens": ["<image_placeholder>", "<begin_of_image>", "<end_of_image>"],
        "named": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
        "ids": {"image_token_id": "<image_placeholder>"},
        "image": ("JanusImageProcessorPil", SQUARE),
        "settings": {"num_image_tokens": 16},
        "template": _template(
            "<|{{ message['role'] | capitalize }}|>: ", "<|Assistant|>: ", "\n\n", "<image_placeholder>\n"
        ),
    },
}


def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and the special tokens of the family."""
    entry = PROCESSORS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = entry["named"]
    # As many first as make the ids of each class its own.
    classes = list(dict.fromkeys(other["class"] for other in PROCESSORS.values()))
    reserved = [f"<|reserved_{number}|>" for number in range(20 * classes.index(entry["class"]))]
    tokenizer.add_special_tokens(list(dict.fromkeys([*reserved, *named.values(), *entry.get("tokens", [])])))
    if entry.get("adds_bos"):
        bos = named["bos_token"]
        tokenizer.post_processor = transformers.tokenization_utils_tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    ordinary = {key: token for key, token in named.items() if key in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={key: token for key, token in named.items() if key not in ordinary},
        **ordinary,
    )


def tiny_processor(name: str, **arguments: Any) -> LatteFlowProcessorMixin:
    """The adapter of the family's stock processor; `arguments` are others of it, such as `background`."""
    entry = PROCESSORS[name]
    image_class, image_settings = entry["image"]
    return adapter_of(entry["class"])(
        getattr(transformers, image_class)(**image_settings),
        tiny_tokenizer(name),
        entry.get("template"),
        **{**entry.get("settings", {}), **arguments},
    )


@functools.cache
def processor_and_backbone(name: str) -> tuple[LatteFlowProcessorMixin, PreTrainedModel]:
    """A processor and a backbone of its vocabulary. They must not be changed."""
    processor = tiny_processor(name)
    tokenizer = processor.tokenizer
    tokens = {key: tokenizer.convert_tokens_to_ids(token) for key, token in PROCESSORS[name]["ids"].items()}
    tokens |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return processor, tiny_backbone(name, vocab_size=len(tokenizer), **tokens)
