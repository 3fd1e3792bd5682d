# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' `ModelTesterMixin` and `GenerationTesterMixin` on a LaTtE-Flow model around a tiny Qwen2-VL."""

import unittest

import torch
from helpers import noise
from hf_suites import WholeTests
from hf_tests.transformers.models.qwen2_vl import test_modeling_qwen2_vl as qwen2_vl
from hf_tests.transformers.test_configuration_common import ConfigTester
from hf_tests.transformers.test_modeling_common import GenerationTesterMixin, ModelTesterMixin

import latte_flow_hf
from latte_flow_hf import LatteFlowConfig


INCOMPLETE = "from_pretrained refuses weights that are incomplete or of another model"
FROZEN = "the backbone is frozen"


class LatteFlowModelTester(qwen2_vl.Qwen2VLVisionText2TextModelTester):
    patch_size = 14

    def get_config(self):
        return LatteFlowConfig(
            vlm_config=super().get_config(), num_experts=2, latent_channels=4, timestep_frequency_dim=16
        )


class LatteFlowModelTest(WholeTests, ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (latte_flow_hf.LatteFlowForConditionalGeneration,)
    _is_composite = True
    # A training step has no gradients for what it does not use: the vision tower without an image, the last layers'
    # output of the backbone.
    test_all_params_have_gradient = False

    test_mismatching_num_image_tokens = qwen2_vl.Qwen2VLModelTest.test_mismatching_num_image_tokens
    # Positions of packed prompts with three axes, as the tests of Qwen2-VL give them.
    attention_mask_padding_matches_padding_free_with_position_ids = (
        qwen2_vl.Qwen2VLModelTest.attention_mask_padding_matches_padding_free_with_position_ids
    )

    by_design = {
        "test_can_init_all_missing_weights": INCOMPLETE,
        "test_correct_missing_keys": INCOMPLETE,
        "test_model_weights_reload_no_missing_tied_weights": INCOMPLETE,
        "test_keep_in_fp32_modules": "the list names what is not quantized; in float16 all of the tower is float16",
        "test_reverse_loading_mapping": "save_pretrained writes the module's own names, so that the Trainer resumes",
        "test_*_padding_matches_padding_free_with_position_ids": "the backbone is `model.vlm`; `model.model` is asked",
        "test_attn_implementation_composite_models": "the tower calls an attention function of its own",
        "test_retain_grad_hidden_states_attentions": FROZEN,
        "test_training_gradient_checkpointing*": FROZEN + " when `train()` is called, and unfrozen later",
    }

    def setUp(self):
        self.model_tester = LatteFlowModelTester(self)
        self.config_tester = ConfigTester(self, config_class=LatteFlowConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """For training, also the latents of the images: the backbone is frozen, and has nothing to learn from text."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        inputs.pop("noise", None)  # Of masked autoencoders, which the suite knows by the name of the argument.
        if return_labels:
            inputs["latents"] = noise(self.model_tester.batch_size, 4, 4, 4)
            inputs["generator"] = torch.Generator().manual_seed(0)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class LatteFlowForConditionalGeneration(latte_flow_hf.LatteFlowForConditionalGeneration):
    """With a backbone that is trained. The suite knows classes by their names."""

    def __init__(self, config):
        super().__init__(config)
        self.vlm.requires_grad_(True)


class UnfrozenLatteFlowModelTest(LatteFlowModelTest):
    """The same on text alone, which this backbone learns from."""

    all_model_classes = (LatteFlowForConditionalGeneration,)
    only = ("test_*train*", "test_*grad*")
    by_design = {}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return ModelTesterMixin._prepare_for_class(self, inputs_dict, model_class, return_labels=return_labels)
