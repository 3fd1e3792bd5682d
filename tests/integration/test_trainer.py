"""The stock Trainer over the model: it learns, leaves the backbone alone, and resumes to the very same weights."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from latte_flow_hf.tinyworld.build import hash_parameters
from latte_flow_hf.training.callbacks import EMACallback, IntervalWarmupCallback
from latte_flow_hf.training.collator import TextToImageCollator, encode_prompts


class TwoPictures(Dataset):
    """Two fixed latents, one a prompt: what a model of any size must be able to learn by heart."""

    def __init__(self, size: int):
        self.latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"latents": self.latents[index % 2], "prompt": index % 2}


def train(model, processor, folder, max_steps, resume=None, more=()):
    contexts = encode_prompts(model, processor, ["a red circle", "a blue square", ""])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=TwoPictures(64),
        data_collator=TextToImageCollator(contexts, 0.1),
        callbacks=[EMACallback(0.9), IntervalWarmupCallback(6), *more],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_loss_falls_and_the_backbone_keeps_its_bytes(model, processor, tmp_path):
    model = copy.deepcopy(model)
    before, tower = hash_parameters(model.vlm), hash_parameters(model.tower)
    trainer = train(model, processor, tmp_path, 40)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert hash_parameters(model.vlm) == before
    assert hash_parameters(model.tower) != tower


def test_a_resumed_run_ends_in_the_same_bytes_ema_included(model, processor, tmp_path):
    whole, stopped, resumed = (copy.deepcopy(model) for _ in range(3))
    train(whole, processor, tmp_path / "whole", 8)
    train(stopped, processor, tmp_path / "parts", 4)
    train(resumed, processor, tmp_path / "parts", 8, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert hash_parameters(whole.tower) == hash_parameters(resumed.tower)
    assert hash_parameters(stopped.tower) != hash_parameters(resumed.tower)


class Overlaps(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.interval_overlap)


def test_intervals_narrow_by_the_step_also_after_a_resume(model, processor, tmp_path):
    model, overlaps = copy.deepcopy(model), Overlaps()
    train(model, processor, tmp_path, 4, more=[overlaps])
    assert overlaps.seen == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6])
    assert model.interval_overlap == 0.0
    resumed, overlaps = copy.deepcopy(model), Overlaps()
    train(resumed, processor, tmp_path, 8, resume=str(tmp_path / "checkpoint-4"), more=[overlaps])
    assert overlaps.seen == pytest.approx([2 / 6, 1 / 6, 0, 0])


@pytest.mark.parametrize("num_steps", [0, -1])
def test_a_warmup_has_steps(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        IntervalWarmupCallback(num_steps)
