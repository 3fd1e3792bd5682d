# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Peak memory and time of conversions at the size of Qwen2-VL-2B, and of one 256x256 image from the result.

    python benchmarks/conversion_memory.py

The sources are written here, with random weights: a backbone of Qwen2-VL-2B's shapes in bfloat16, under its published
names, and a DC-AE f32c32. Takes about 24 GB of disk, all of it removed at the end. Each stage is a process of its own,
so that its peak is its own; this one imports nothing large, since a process inherits its parent's peak.

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


# The published configuration of Qwen2-VL-2B-Instruct, except for the token ids, which are the small tokenizer's.
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


# In bytes; libraries take half of it.
MAX_ALLOCATED = 2e9


def write_sources(folder: Path, shard_size: str) -> None:
    """Write the backbone, shard by shard, and the autoencoder."""
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


def run(folder: Path, shard_size: str, steps: int) -> None:
    measure("sources", sys.executable, __file__, "--sources", str(folder), "--shard-size", shard_size)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, help="where the temporary folder is made; the system's if left out")
    parser.add_argument("--shard-size", default="2GB", help="of the backbone's files")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps of the image")
    parser.add_argument("--sources", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sources:
        write_sources(arguments.sources, arguments.shard_size)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as temporary:
            run(Path(temporary), arguments.shard_size, arguments.steps)
