# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Peak memory and time of conversions at the size of a 2B backbone, and of one 256x256 image from the result.

    python benchmarks/conversion_memory.py
    python benchmarks/conversion_memory.py --backbone qwen3_vl
    python benchmarks/conversion_memory.py --backbone smolvlm

The sources are written here, with random weights: a backbone of the shapes of Qwen2-VL-2B, Qwen3-VL-2B or
SmolVLM2-2.2B in bfloat16, under its published names, and a DC-AE f32c32. Takes about 24 GB of disk, all of it removed
at the end. Each stage is a process of its own, so that its peak is its own; this one imports nothing large, since a
process inherits its parent's peak.

Two peaks are reported. Allocated memory is what the machine must have. Resident memory also counts the pages of files
that are mapped for reading or were read, which the system drops when it needs the space.
Fails if a conversion allocates 2 GB or more, whatever the sizes of the model and its files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


# The published configurations, except for the token ids, which are the small tokenizer's.
QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "vocab_size": 151936,
}

QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
    },
}

SMOLVLM = {
    "architectures": ["SmolVLMForConditionalGeneration"],
    "model_type": "smolvlm",
    "scale_factor": 3,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 273768.0,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}

BACKBONES = {"qwen2_vl": QWEN2_VL, "qwen3_vl": QWEN3_VL, "smolvlm": SMOLVLM}

# DC-AE f32c32, as published with Sana.
AUTOENCODER = {
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}


# In bytes; libraries take half of it.
MAX_ALLOCATED = 2e9


def write_sources(folder: Path, name: str, shard_size: str) -> None:
    """Write a backbone, shard by shard, and the autoencoder."""
    import torch
    from diffusers import AutoencoderDC
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    backbone = folder / "backbone"
    config = {**BACKBONES[name], **write_processor(backbone, name)}
    (backbone / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(backbone))
    published = {
        name: tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    if name == "qwen2_vl":
        published = {
            key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
            for key, tensor in published.items()
        }
    torch.manual_seed(0)
    split = split_torch_state_dict_into_shards(published, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {
            key: torch.ones_like(published[key], device="cpu")
            if "norm" in key and key.endswith("weight")
            else torch.empty_like(published[key], device="cpu").normal_(std=0.02)
            for key in names
        }
        save_file(shard, backbone / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoencoderDC(**AUTOENCODER).save_pretrained(folder / "autoencoder")


def write_processor(folder: Path, name: str) -> dict:
    """Write a processor of the backbone's class with the small tokenizer; returns the ids of its special tokens."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    from latte_flow_hf import LatteFlowProcessor, tiny_checkpoint
    from latte_flow_hf.modeling.processing_latte_flow import adapter_of

    tokenizer = LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor").tokenizer
    ids = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    if name == "smolvlm":
        template = tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
        tokens = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
        tokens |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<|im_end|>"}
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens.values())})
        named = {key: getattr(tokenizer, key) for key in ("eos_token", "pad_token")}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=tokens, **named
        )
        ids["image_token_id"] = "<image>"
        sizes = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
        image_processor = SmolVLMImageProcessorPil(**sizes)
        processor = adapter_of("SmolVLMProcessor")(image_processor, tokenizer, template, image_seq_len=81)
    else:
        ids |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
        ids |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
        classes = {"qwen2_vl": ("Qwen2VLProcessor", 14), "qwen3_vl": ("Qwen3VLProcessor", 16)}
        class_name, patch_size = classes[name]
        processor = adapter_of(class_name)(Qwen2VLImageProcessorPil(patch_size=patch_size), tokenizer)
    processor.save_pretrained(folder)
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}


def measure(label: str, *command: str) -> float:
    """Run a command and print its time and its peaks of memory.

    Returns:
        `float`: the peak of allocated (anonymous) memory in bytes, sampled every 20 ms.

    Raises:
        `RuntimeError`: if the command fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command)
    status_file = Path(f"/proc/{process.pid}/status")
    allocated = 0
    while True:
        # Before `wait4`, which ends the life of the status file.
        lines = [line for line in status_file.read_text().splitlines() if line.startswith("RssAnon:")]
        allocated = max([allocated, *(int(line.split()[1]) * 1024 for line in lines)])
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    print(
        f"{label}: {time.perf_counter() - start:.0f} s, peak {allocated / 1e9:.2f} GB allocated, "
        f"{usage.ru_maxrss * 1024 / 1e9:.2f} GB resident",
        flush=True,
    )
    return allocated


def run(folder: Path, name: str, shard_size: str, steps: int) -> None:
    options = ("--backbone", name, "--shard-size", shard_size)
    measure("sources", sys.executable, __file__, "--sources", str(folder), *options)
    latte_flow = (sys.executable, "-m", "latte_flow_hf.cli")
    pipeline, single_file = str(folder / "pipeline"), str(folder / "pipeline.safetensors")
    sources = (str(folder / "backbone"), str(folder / "autoencoder"))
    for label, arguments in (
        ("convert init", ("init", *sources, "--output", pipeline)),
        ("convert to-single-file", ("to-single-file", pipeline, "--output", single_file)),
    ):
        allocated = measure(label, *latte_flow, "convert", *arguments)
        if allocated >= MAX_ALLOCATED:
            raise RuntimeError(
                f"{label} allocated {allocated / 1e9:.2f} GB; its bound is {MAX_ALLOCATED / 1e9:.2f} GB."
            )
    image = ("--output", str(folder / "out.png"), "--size", "256", "--steps", str(steps), "--guidance", "1")
    measure(
        f"one 256x256 image, {steps} steps, loading included",
        *(*latte_flow, "generate", "a red circle", "--model", pipeline, *image),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, default="qwen2_vl", help="whose shapes the backbone has")
    parser.add_argument("--work-dir", type=Path, help="where the temporary folder is made; the system's if left out")
    parser.add_argument("--shard-size", default="2GB", help="of the backbone's files")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps of the image")
    parser.add_argument("--sources", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sources:
        write_sources(arguments.sources, arguments.backbone, arguments.shard_size)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as temporary:
            run(Path(temporary), arguments.backbone, arguments.shard_size, arguments.steps)


if __name__ == "__main__":
    main()
