# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Another number of experts: weights are kept, residual gates are added and removed."""

import json
import shutil

import pytest
import torch
from helpers import same_bytes

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.conversion import regroup


def state(folder):
    return LatteFlowPipeline.from_pretrained(folder).model.state_dict()


def gates(tensors):
    return {int(name.split(".")[2]) for name in tensors if ".residual_gate." in name}


def test_to_fewer_and_more_experts(pipeline_folder, tmp_path, encode):
    old = state(pipeline_folder)
    assert gates(old) == {1, 3}
    for num_experts, expected in ((1, {1, 2, 3}), (4, set()), (2, {1, 3})):
        out = tmp_path / str(num_experts)
        regroup(pipeline_folder, num_experts).write(out)
        pipe = LatteFlowPipeline.from_pretrained(out)
        new = pipe.model.state_dict()
        assert gates(new) == expected
        assert all(torch.equal(new[name], old[name]) for name in new if name in old)
        assert all((new[name] == 0).all() for name in new if name not in old)
        assert pipe.model.config.num_experts == pipe.scheduler.num_experts == num_experts
        # The scheduler's other settings stay.
        assert pipe.scheduler.config.shift == 1.5
        pipe.set_progress_bar_config(disable=True)
        latents = pipe("a red circle", num_inference_steps=4, output_type="latent").images
        assert latents.isfinite().all()


def test_to_the_same_number_changes_no_velocity(pipeline_folder, model, tmp_path, encode):
    regroup(pipeline_folder, 2).write(tmp_path / "out")
    other = LatteFlowPipeline.from_pretrained(tmp_path / "out").model
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = model.encode_context(**encode("a"))
    assert same_bytes(other, model)
    with torch.no_grad():
        one, two = (m.predict_velocity(latents, 700.0, context) for m in (model, other))
    # Not bit for bit: the kernel of a product with one row depends on how the weights are aligned in memory.
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_an_added_gate_changes_no_attention(pipeline_folder, model, tmp_path, encode):
    """Layer 2 is the first of its expert with K = 2; with K = 1 it receives scores, through a gate of zeros."""
    regroup(pipeline_folder, 1).write(tmp_path / "out")
    other = LatteFlowPipeline.from_pretrained(tmp_path / "out").model
    context = model.encode_context(**encode("a"))
    layer, alone = other.tower.layers[2], model.tower.layers[2]
    hidden = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    embedded = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    layout = model.latent_layout(torch.zeros(1, 4, 8, 8), context)
    inputs = {
        "context_keys": context.keys[2],
        "context_values": context.values[2],
        "attention_mask": None,
        "position_embeddings": layout.position_embeddings[layer.layer_type],
        "position_ids": layout.position_ids,
    }
    previous_scores = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output, _ = layer(hidden, embedded, previous_scores, **inputs)
        expected, _ = alone(hidden, embedded, None, **inputs)
        assert layer.modulate(embedded).gate is not None and (expected - hidden).abs().max() > 0.1
        assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("num_experts", "shares", "expected"), [(2, [0.5, 0.0], [0.5, 0.0]), (4, [0.5, 0.0], 0.0), (4, 0.3, 0.3)]
)
@pytest.mark.parametrize("key", ["new_noise", "stochastic_sampling"])
def test_shares_of_new_noise_by_expert_stay_with_their_experts(
    pipeline_folder, tmp_path, num_experts, shares, expected, key
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pipeline_folder, source)
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: shares}))
    regroup(source, num_experts).write(out)
    assert LatteFlowPipeline.from_pretrained(out).scheduler.config.new_noise == expected


def test_unequal_experts(pipeline_folder, model, tmp_path):
    regroup(pipeline_folder, 3, layers_per_expert=[1, 1, 2]).write(tmp_path / "out")
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.config.layers_per_expert == [1, 1, 2]
    assert [layer.has_residual for layer in pipe.model.tower.layers] == [False, False, False, True]
    assert torch.equal(pipe.model.tower.layers[2].modulation.weight, model.tower.layers[2].modulation.weight)
    assert "3 timestep experts of 1, 1, 2 layers each" in (tmp_path / "out" / "README.md").read_text().replace(
        "\n", " "
    )
    regroup(tmp_path / "out", 2).write(tmp_path / "back")
    assert LatteFlowPipeline.from_pretrained(tmp_path / "back").model.config.layers_per_expert == [2, 2]


def test_other_boundaries(pipeline_folder, tmp_path):
    regroup(pipeline_folder, 2, [1.0, 0.7, 0.0]).write(tmp_path / "out")
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "out")
    assert pipe.model.config.expert_boundaries == pipe.scheduler.config.expert_boundaries == [1.0, 0.7, 0.0]
    assert "regrouped from 2 experts to 2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((3,), "num_experts must divide"), ((2, [1.0, 0.0]), "boundaries"), ((0,), "num_experts must be a positive")],
)
def test_invalid_groups(arguments, words, pipeline_folder):
    with pytest.raises(ValueError, match=words):
        regroup(pipeline_folder, *arguments)


def test_a_folder_of_another_model(pipeline_folder, backbone_folder, tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        regroup(backbone_folder, 2)
    shutil.copytree(pipeline_folder, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "model")
    shutil.copytree(backbone_folder, tmp_path / "mixed" / "model")
    with pytest.raises(ValueError, match="'qwen2_vl' model, not a 'latte_flow'"):
        regroup(tmp_path / "mixed", 2)
    settings = json.loads((pipeline_folder / "model" / "config.json").read_text())
    assert settings["num_experts"] == 2


def test_a_model_distilled_to_few_steps_is_refused(pipeline_folder, tmp_path):
    folder = tmp_path / "distilled"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["sampling"] = {"steps_per_expert": [1, 1], "guidance_scale": 1.0, "distilled_experts": [0, 1]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"was distilled to steps_per_expert=\[1, 1\]"):
        regroup(folder, 4)
    config["sampling"] = {"steps_per_expert": [4, 4], "guidance_scale": 2.0}
    path.write_text(json.dumps(config))
    regroup(folder, 4).write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["sampling"] == {"guidance_scale": 2.0}
