# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Peak memory and time of `latte-flow convert init` at the size of Qwen2-VL-2B, and of one 256x256 picture from it.

    python benchmarks/conversion_memory.py

The sources are written here, with random weights: a backbone of Qwen2-VL-2B's shapes in bfloat16, under the names that
it is published with, and a DC-AE f32c32. Takes about 15 GB of disk, all of it removed at the end. Each stage is a
process of its own, so that its peak is its own; this one imports nothing large, since a process inherits its parent's
peak.
Fails if the conversion takes 1.3 times the largest shard plus 1 GB or more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


# The published configuration of Qwen2-VL-2B-Instruct, but for the token ids, which are the small tokenizer's.
BACKBONE = {
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


def write_sources(folder: Path, shard_size: str) -> None:
    """The backbone, shard by shard, and the autoencoder."""
    import torch
    from diffusers import AutoencoderDC
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from latte_flow_hf import LatteFlowProcessor, tiny_checkpoint

    tokenizer = LatteFlowProcessor.from_pretrained(Path(tiny_checkpoint()) / "processor").tokenizer
    ids = {
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    config = {**BACKBONE, **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}}
    backbone = folder / "backbone"
    LatteFlowProcessor(Qwen2VLImageProcessorPil(), tokenizer).save_pretrained(backbone)
    (backbone / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(backbone))
    shapes = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    published = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.to(torch.bfloat16)
        for name, tensor in shapes.items()
    }
    torch.manual_seed(0)
    split = split_torch_state_dict_into_shards(published, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {
            name: torch.ones_like(published[name], device="cpu")
            if "norm" in name and name.endswith("weight")
            else torch.empty_like(published[name], device="cpu").normal_(std=0.02)
            for name in names
        }
        save_file(shard, backbone / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoencoderDC(**AUTOENCODER).save_pretrained(folder / "autoencoder")


def measured(*command: str) -> tuple[float, float]:
    """Run a command to its end: seconds, and its peak of resident memory in bytes.

    Raises:
        `RuntimeError`: if it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run(folder: Path, shard_size: str, steps: int) -> None:
    measured(sys.executable, __file__, "--sources", str(folder), "--shard-size", shard_size)
    latte_flow = (str(Path(sys.executable).with_name("latte-flow")),)
    largest = max(path.stat().st_size for path in (folder / "backbone").glob("*.safetensors"))
    bound = 1.3 * largest + 1e9
    sources = (str(folder / "backbone"), str(folder / "autoencoder"))
    seconds, peak = measured(*latte_flow, "convert", "init", *sources, "--output", str(folder / "pipeline"))
    print(f"init: {seconds:.0f} s, peak {peak / 1e9:.2f} GB", flush=True)
    print(f"largest shard {largest / 1e9:.2f} GB, hence at most {bound / 1e9:.2f} GB", flush=True)
    if peak >= bound:
        raise RuntimeError(f"the conversion took {peak / 1e9:.2f} GB, its bound is {bound / 1e9:.2f} GB.")
    picture = ("--output", str(folder / "out.png"), "--size", "256", "--steps", str(steps))
    seconds, peak = measured(
        *latte_flow, "generate", "a red circle", "--model", str(folder / "pipeline"), *picture, "--guidance", "1"
    )
    print(f"one 256x256 picture, {steps} steps, loading included: {seconds:.0f} s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="where the temporary folder goes; the system's if left out")
    parser.add_argument("--shard-size", default="2GB", help="of the backbone's files")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps of the picture")
    parser.add_argument("--sources", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sources:
        write_sources(arguments.sources, arguments.shard_size)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as temporary:
            run(Path(temporary), arguments.shard_size, arguments.steps)
