# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Configurations of the paper's backbone and autoencoder as they are published: their sizes alone, without weights.

`latte-flow plan` reads them, so that the paper's setting can be planned without a connection to the hub.
"""

from typing import Any


BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2-VL-2B-Instruct": {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
    }
}

AUTOENCODERS: dict[str, dict[str, Any]] = {
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
        "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
        "encoder_qkv_multiscales": [[]] * 6,
        "decoder_qkv_multiscales": [[]] * 6,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
    }
}
