# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""diffusers' `SchedulerCommonTest` on `LatteFlowScheduler`, with each solver."""

from hf_suites import WholeTests
from hf_tests.diffusers.schedulers import test_schedulers as suite

from latte_flow_hf import LatteFlowScheduler


class LatteFlowSchedulerTest(WholeTests, suite.SchedulerCommonTest):
    scheduler_classes = (LatteFlowScheduler,)
    forward_default_kwargs = (("num_inference_steps", 10),)
    solver = "euler"
    by_design = {"test_trained_betas": "flow matching has no betas"}

    def get_scheduler_config(self, **config):
        return {"num_train_timesteps": 1000, "shift": 1.0, "solver": self.solver, **config}

    def test_over_configs(self):
        for config in ({"shift": 3.0}, {"new_noise": 0.5}, {"expert_boundaries": [1.0, 0.3, 0.0]}):
            self.check_over_configs(time_step=None, **config)

    def test_over_forward(self):
        for num_inference_steps in (1, 10, 50):
            self.check_over_forward(time_step=None, num_inference_steps=num_inference_steps)


class LatteFlowHeunSchedulerTest(LatteFlowSchedulerTest):
    solver = "heun"
