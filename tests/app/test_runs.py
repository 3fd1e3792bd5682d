# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images from settings, and their files."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latte_flow_hf import LatteFlowScheduler
from latte_flow_hf.app.limits import ImageSettings
from latte_flow_hf.app.model_queue import Job, StoppedError
from latte_flow_hf.app.runs import Progress, generate, initial_noise
from latte_flow_hf.pipelines.image_metadata import read_metadata, record_pipeline


SETTINGS = ImageSettings("a red circle", seed=7, steps=5)


@pytest.fixture
def noisy_pipe(pipe):
    """A pipeline whose scheduler draws from the generator too."""
    pipe.scheduler = LatteFlowScheduler(expert_boundaries=pipe.model.config.expert_boundaries, new_noise=0.5)
    return pipe


def run(pipe, settings, **arguments):
    job = Job(lambda job: None)
    result = generate(pipe, settings, "random", job, **arguments)
    updates = []
    while not job._updates.empty():
        updates.append(job._updates.get())
    return result, updates


def test_an_image_is_the_pipelines_own(noisy_pipe):
    """To the pixel, also where the scheduler draws noise."""
    result, updates = run(noisy_pipe, SETTINGS)
    generator = torch.Generator().manual_seed(7)
    expected = noisy_pipe("a red circle", num_inference_steps=5, generator=generator).images[0]
    assert np.array_equal(result.image, expected)
    assert [(update.step, update.num_steps) for update in updates] == [(step, 5) for step in range(1, 6)]
    assert result.experts == tuple(update.expert for update in updates) == (0, 0, 0, 1, 1)


def test_steps_and_guidance_of_each_expert(pipe):
    result, _ = run(pipe, replace(SETTINGS, steps=(2, 3), guidance=(2.0, 1.0)))
    expected = pipe(
        "a red circle",
        steps_per_expert=[2, 3],
        guidance_scale=[2.0, 1.0],
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(result.image, expected) and result.experts == (0, 0, 1, 1, 1)


def test_previews_change_nothing_and_are_the_estimates(noisy_pipe, monkeypatch):
    monkeypatch.setattr("latte_flow_hf.app.runs.PREVIEW_SECONDS", -1.0)
    with_previews, updates = run(noisy_pipe, SETTINGS)
    without, _ = run(noisy_pipe, SETTINGS, shows_previews=False)
    assert np.array_equal(with_previews.image, without.image)
    assert [update.preview is not None for update in updates] == [True, True, True, True, False]
    assert updates[0].preview.size == with_previews.image.size


def test_variations(pipe):
    plain, generator = initial_noise(pipe, SETTINGS)
    assert torch.equal(initial_noise(pipe, replace(SETTINGS, variation=0.0, variation_seed=5))[0], plain)
    large = replace(SETTINGS, width=512, height=512)
    base = initial_noise(pipe, large)[0]
    other = initial_noise(pipe, replace(large, seed=5))[0]
    for share in (0.3, 1.0):
        varied = initial_noise(pipe, replace(large, variation=share, variation_seed=5))[0]
        expected = np.cos(share * np.pi / 2) * base + np.sin(share * np.pi / 2) * other
        torch.testing.assert_close(varied, expected)
        assert abs(float(varied.std()) - 1) < 0.02
    # The noise of the solver does not repeat that of the start.
    assert not torch.equal(torch.randn(plain.shape, generator=generator), plain)


def test_a_stopped_job_ends_within_a_step(pipe):
    job, calls = Job(lambda job: None), []
    handle = pipe.model.tower.register_forward_hook(lambda *_: calls.append(1))

    def send(update: Progress) -> None:
        if update.step == 2:
            job.stop()

    job.send = send
    try:
        with pytest.raises(StoppedError):
            generate(pipe, replace(SETTINGS, steps=50), "random", job)
    finally:
        handle.remove()
    assert len(calls) == 2
    assert not pipe.model.tower._forward_hooks


def test_the_file_holds_what_makes_it_again(noisy_pipe):
    settings = replace(SETTINGS, guidance=(2.0, 1.0))
    result, _ = run(noisy_pipe, settings, record=record_pipeline(noisy_pipe))
    image = Image.open(io.BytesIO(result.png()))
    assert np.array_equal(image.convert("RGB"), result.image)
    found = read_metadata(image)
    again = noisy_pipe(
        found.prompt,
        num_inference_steps=found.num_inference_steps,
        guidance_scale=list(found.guidance_scale),
        generator=torch.Generator().manual_seed(found.seed),
    ).images[0]
    assert np.array_equal(again, result.image)


def test_the_file_of_a_variation_does_not_pass_for_the_other(noisy_pipe):
    settings = replace(SETTINGS, variation=0.25, variation_seed=11, guidance=(2.0, 1.0))
    result, _ = run(noisy_pipe, settings, record=record_pipeline(noisy_pipe))
    image = Image.open(io.BytesIO(result.png()))
    with pytest.raises(ValueError):
        read_metadata(image)
    text = json.loads(image.text["latte_flow_studio"])
    assert text.pop("model") == "random"
    again = ImageSettings(**{key: tuple(value) if isinstance(value, list) else value for key, value in text.items()})
    assert again == settings
    assert np.array_equal(run(noisy_pipe, again)[0].image, result.image)


def test_prompts_of_any_characters_fit_into_the_file(pipe):
    prompt = 'ein rötlicher „Kreis" <b>\n日本 \U0001f600'
    result, _ = run(pipe, replace(SETTINGS, prompt=prompt, steps=1), record=record_pipeline(pipe))
    assert read_metadata(io.BytesIO(result.png())).prompt == prompt
