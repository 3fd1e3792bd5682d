# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""peft's common tests (`PeftCommonTester`) for each supported method: on an expert, and on the backbone."""

import copy
import inspect

import hf_suites  # noqa: F401
import peft
import pytest
import torch
from helpers import fill, noise
from hf_tests.peft.testing_common import PeftCommonTester
from hf_tests.peft.testing_utils import set_init_weights_false

from latte_flow_hf import LatteFlowForConditionalGeneration


METHODS = {
    "LoRA": (peft.LoraConfig, {}),
    "DoRA": (peft.LoraConfig, {"r": 4, "use_dora": True}),
    "LoHa": (peft.LoHaConfig, {"r": 4}),
    "LoKr": (peft.LoKrConfig, {"r": 4}),
    "SHiRA": (peft.ShiraConfig, {"r": 2}),
    "AdaLoRA": (peft.AdaLoraConfig, {"total_step": 1}),
    "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 8}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "HRA": (peft.HRAConfig, {"r": 4}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 10}),
    "MiSS": (peft.MissConfig, {"r": 4}),
}


def common_tests(*others: str) -> list[str]:
    """The common tests that are complete with a model and a configuration, without those that contain a word of
    `others` in their names."""
    tests = []
    for name, function in inspect.getmembers(PeftCommonTester, inspect.isfunction):
        required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        if name.startswith("_test_") and required == ["self", "model_id", "config_cls", "config_kwargs"]:
            tests += [] if any(other in name for other in others) else [name]
    return tests


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    """A random model whose language head is not tied: the suite writes all tensors with safetensors."""
    config = copy.deepcopy(model.config)
    config.vlm_config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    untied = LatteFlowForConditionalGeneration(config)
    fill(untied, seed=1, std=0.1)
    folder = tmp_path_factory.mktemp("untied")
    untied.save_pretrained(folder)
    return str(folder)


class Velocity(torch.nn.Module):
    """All experts in a chain, for one prompt."""

    @classmethod
    def from_pretrained(cls, model_id, **kwargs):
        velocity = cls()
        velocity.model = LatteFlowForConditionalGeneration.from_pretrained(model_id, **kwargs)
        return velocity

    def forward(self, latents):
        context = self.model.encode_context(torch.tensor([[1, 2, 3]]))
        for timestep in (900.0, 100.0):
            latents = self.model.predict_velocity(latents, timestep, context)
        return latents


class CommonTests(PeftCommonTester):
    by_design = {
        "*adapter_name_substring-AdaLoRA*": "peft: AdaLoRA trains one adapter alone",
        "*mixed_adapter_batches-DoRA*": "peft: no mixed batches with DoRA",
        "*weighted_combination_of_adapters-DoRA*": "peft: the magnitudes of DoRA are not combined",
        "*mixed_adapter_batches_and_beam_search-*": "reads config.eos_token_id, which Qwen2-VL does not have",
    }

    def run(self, test, method, checkpoint):
        config_cls, config = METHODS[method]
        targets = [f"{self.layers}.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "o_proj")]
        config = set_init_weights_false(config_cls, {**config, "target_modules": targets})
        getattr(self, test)(checkpoint, config_cls, config)


class TestTower(CommonTests):
    transformers_class = Velocity
    layers = "model.tower.layers"

    def prepare_inputs_for_testing(self):
        return {"latents": noise(1, 4, 8, 8)}

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "test", common_tests("generate", "prepare_for_training", "conversion", "mixed", "disable", "embeds")
    )
    def test_common(self, test, method, checkpoint):
        """Those of models without text."""
        self.run(test, method, checkpoint)


class TestBackbone(CommonTests):
    transformers_class = LatteFlowForConditionalGeneration
    layers = "vlm.model.language_model.layers"

    def prepare_inputs_for_testing(self):
        mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
        return {"input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]), "attention_mask": mask}

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("test", common_tests())
    def test_common(self, test, method, checkpoint):
        self.run(test, method, checkpoint)
