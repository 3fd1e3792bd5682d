# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Callbacks for the stock Trainer."""

from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from transformers import TrainerCallback


EMA_FILE = "ema.pt"


class EMACallback(TrainerCallback):
    """Keeps diffusers' exponential moving average of what learns, and leaves it in the model when training ends.

    It is saved in every checkpoint of the Trainer and read back on resume.

    Args:
        decay (`float`): the share of the old average that a step keeps, once warmed up.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.ema: EMAModel = None  # made when training begins
        self.parameters: list[torch.nn.Parameter] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, decay=self.decay, use_ema_warmup=True, power=3 / 4)
        if state.global_step:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE
            self.ema.load_state_dict(torch.load(saved, weights_only=True))

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.step(self.parameters)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.ema.state_dict(), folder / (EMA_FILE + ".partial"))
        (folder / (EMA_FILE + ".partial")).rename(folder / EMA_FILE)

    def on_train_end(self, args, state, control, **kwargs):
        self.ema.copy_to(self.parameters)
