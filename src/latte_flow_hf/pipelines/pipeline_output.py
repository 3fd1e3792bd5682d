# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class LatteFlowPipelineOutput(BaseOutput):
    """
    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images in the order of the prompts; the images of a prompt follow each other. Arrays are
            (batch, height, width, 3) in [0, 1], tensors (batch, 3, height, width) in [0, 1], latents
            (batch, channels, height, width).
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
