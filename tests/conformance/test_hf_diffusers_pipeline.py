# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""diffusers' `PipelineTesterMixin` and `PipelineLatentTesterMixin` on our three pipelines."""

import copy
import unittest

import pytest
import torch
from diffusers import AutoencoderKL
from hf_suites import WholeTests
from hf_tests.diffusers.models.autoencoders.vae import get_autoencoder_kl_config
from hf_tests.diffusers.pipelines import pipeline_params
from hf_tests.diffusers.pipelines import test_pipelines_common as suite
from PIL import Image

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, LatteFlowPipeline


class LatteFlowPipelineTest(WholeTests, suite.PipelineLatentTesterMixin, suite.PipelineTesterMixin, unittest.TestCase):
    pipeline_class = LatteFlowPipeline
    # An encoded prompt is `context`, keys and values of each layer, in place of `prompt_embeds`.
    params = pipeline_params.TEXT_TO_IMAGE_PARAMS - {
        "prompt_embeds",
        "negative_prompt_embeds",
        "cross_attention_kwargs",
    }
    batch_params = pipeline_params.TEXT_TO_IMAGE_BATCH_PARAMS
    image_params = frozenset(["image"])
    image_latents_params = frozenset()
    callback_cfg_params = frozenset()
    test_group_offloading = True
    by_design = {
        "test_encode_prompt_works_in_isolation": "there is no text encoder: the model's backbone encodes prompts",
        "test_multi_vae": "asks for the configuration of an AutoencoderKL, see the class below",
        "test_save_load_optional_components": "without processor and vae, it takes `context` and gives latents",
    }

    @pytest.fixture(autouse=True)
    def _pipe(self, pipe, picture):
        self.pipe, self.picture = pipe, picture

    def get_dummy_components(self):
        return {name: copy.deepcopy(component) for name, component in self.pipe.components.items()}

    def get_dummy_inputs(self, device, seed=0):
        return {
            "prompt": "a red circle",
            "image": self.picture,
            "generator": torch.Generator(device).manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
            "output_type": "np",
        }


class AutoencoderKLPipelineTest(LatteFlowPipelineTest):
    only = ("test_multi_vae",)
    by_design = {}

    def get_dummy_components(self):
        vae = AutoencoderKL(**get_autoencoder_kl_config())
        return {**super().get_dummy_components(), "vae": vae.eval()}


class LatteFlowImg2ImgPipelineTest(LatteFlowPipelineTest):
    pipeline_class = LatteFlowImg2ImgPipeline
    params = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_PARAMS - {
        "prompt_embeds",
        "negative_prompt_embeds",
    }
    batch_params = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS

    def get_dummy_inputs(self, device, seed=0):
        return {**super().get_dummy_inputs(device, seed), "strength": 0.8, "num_inference_steps": 4}


class LatteFlowInpaintPipelineTest(LatteFlowImg2ImgPipelineTest):
    pipeline_class = LatteFlowInpaintPipeline
    params = LatteFlowImg2ImgPipelineTest.params | {"mask_image"}
    batch_params = pipeline_params.TEXT_GUIDED_IMAGE_INPAINTING_BATCH_PARAMS

    def get_dummy_inputs(self, device, seed=0):
        mask = Image.new("L", self.picture.size)
        mask.paste(255, (16, 16, 48, 48))
        return {**super().get_dummy_inputs(device, seed), "mask_image": mask}
