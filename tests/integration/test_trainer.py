"""The stock Trainer: the loss falls, the backbone is unchanged, and a resumed run ends with the same weights."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from latte_flow_hf.training.cache import hash_module
from latte_flow_hf.training.callbacks import EMACallback, IntervalWarmupCallback
from latte_flow_hf.training.collator import TextToImageCollator, encode_prompts


class TwoImages(Dataset):
    """Two fixed latents with one prompt each, which a model of any size must be able to memorize."""

    def __init__(self, size: int):
        self.latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"latents": self.latents[index % 2], "prompt": index % 2}


def train(model, processor, folder, max_steps, resume=None, callbacks=(), **settings):
    contexts = encode_prompts(model, processor, ["a red circle", "a blue square", ""])
    arguments = TrainingArguments(
        dataloader_pin_memory=False,
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
        **settings,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=TwoImages(64),
        eval_dataset=TwoImages(8),
        data_collator=TextToImageCollator(contexts, 0.1),
        callbacks=[EMACallback(0.9), IntervalWarmupCallback(6), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_loss_falls_and_the_backbone_is_unchanged(model, processor, tmp_path):
    model = copy.deepcopy(model)
    before, tower = hash_module(model.vlm), hash_module(model.tower)
    trainer = train(model, processor, tmp_path, 40)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert hash_module(model.vlm) == before
    assert hash_module(model.tower) != tower


def test_a_resumed_run_ends_with_the_same_averages(model, processor, tmp_path):
    complete, stopped, resumed = (copy.deepcopy(model) for _ in range(3))
    train(complete, processor, tmp_path / "complete", 8)
    train(stopped, processor, tmp_path / "parts", 4)
    train(resumed, processor, tmp_path / "parts", 8, resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert hash_module(complete.tower) == hash_module(resumed.tower)
    assert hash_module(stopped.tower) != hash_module(resumed.tower)


class RecordOverlaps(TrainerCallback):
    def __init__(self):
        self.overlaps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.overlaps.append(model.interval_overlap)


def test_intervals_narrow_by_the_step_also_after_a_resume(model, processor, tmp_path):
    model, recorded = copy.deepcopy(model), RecordOverlaps()
    train(model, processor, tmp_path, 4, callbacks=[recorded])
    assert recorded.overlaps == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6])
    assert model.interval_overlap == 0.0
    resumed, recorded = copy.deepcopy(model), RecordOverlaps()
    train(resumed, processor, tmp_path, 8, resume=str(tmp_path / "checkpoint-4"), callbacks=[recorded])
    assert recorded.overlaps == pytest.approx([2 / 6, 1 / 6, 0, 0])


def test_evaluation_gives_a_loss_and_the_best_checkpoint_is_loaded(model, processor, tmp_path):
    settings = {"label_names": ["latents"], "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = train(copy.deepcopy(model), processor, tmp_path, 8, **settings)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert sorted(losses) == [4, 8]
    assert trainer.state.best_global_step == min(losses, key=losses.get)
    assert trainer.evaluate()["eval_loss"] > 0


def test_images_reach_the_backbone_with_the_trainer_s_defaults(model, processor, picture, tmp_path):
    model = copy.deepcopy(model)
    model.vlm.requires_grad_(True)
    before = hash_module(model.vlm)
    inputs = processor.encode_conversations([processor.conversation("what is this?", picture)])
    # The patches of an image are no rows of a batch: one example, and the default collator adds an axis for it.
    example = {**{name: values[0] for name, values in inputs.items() if name != "pixel_values"}}
    example |= {"labels": example["input_ids"], "pixel_values": inputs["pixel_values"]}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    assert arguments.remove_unused_columns
    seen = []
    model.vlm.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(kwargs["mm_token_type_ids"].sum())), with_kwargs=True
    )
    Trainer(model, arguments, train_dataset=[example] * 2).train()
    assert seen == [16, 16] and hash_module(model.vlm) != before
