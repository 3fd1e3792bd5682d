# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The loss that trains a small `AutoencoderDC`; the network itself is diffusers', untouched."""

import torch
from diffusers import AutoencoderDC
from torch import nn


class AutoencoderWithLoss(nn.Module):
    """An autoencoder in the form the stock Trainer wants: pixels in, loss out.

    loss = mean (x' - x)^2 + 0.1 mean |x' - x| + weight * mean z^2, x' decoded from z + u * latent_noise * std(z) e,
    e standard normal, u uniform in [0, 1), one for a picture. Under noise the encoder must say what matters in a way
    that a sampler can find again, and the decoder forgives what a sampler gets slightly wrong; the last term keeps the
    latents from growing. Chosen: because DC-AE's own losses (perceptual, adversarial) need networks that are not there
    at this size; the noise is that of latent denoising tokenizers (arXiv 2507.15856).

    Args:
        autoencoder (`AutoencoderDC`): the network to train.
        latent_noise (`float`): largest standard deviation of the noise, in standard deviations of the latents.
        latent_penalty (`float`): weight of the latents' mean square.
    """

    def __init__(self, autoencoder: AutoencoderDC, latent_noise: float, latent_penalty: float):
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_noise = latent_noise
        self.latent_penalty = latent_penalty

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (batch, 3, height, width) in [-1, 1] -> `{"loss": scalar}`."""
        latents = self.autoencoder.encode(pixel_values).latent
        strength = self.latent_noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        noisy = latents + strength * latents.detach().std() * torch.randn_like(latents)
        decoded = self.autoencoder.decode(noisy).sample
        loss = nn.functional.mse_loss(decoded, pixel_values) + 0.1 * nn.functional.l1_loss(decoded, pixel_values)
        return {"loss": loss + self.latent_penalty * latents.square().mean()}
