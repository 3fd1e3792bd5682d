# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A streamed pipeline against `from_vlm` and `save_pretrained`, and the stock class."""

import json
import re
import shutil

import pytest
import torch
from backbones import BACKBONES, tiny_backbone
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte_flow_hf import LatteFlowConfig, LatteFlowForConditionalGeneration, LatteFlowPipeline, LatteFlowScheduler
from latte_flow_hf.conversion import initialize
from latte_flow_hf.conversion.folders import model_on_meta
from latte_flow_hf.conversion.initialize import _model_tensors, new_tensors
from latte_flow_hf.conversion.streaming import module_tensors, read_weights, stored_names


SMALL = {"timestep_frequency_dim": 16}


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def is_random(name) -> bool:
    return name.endswith(".weight") and ("latent_embedding" in name or "timestep_embedding" in name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("original_names", [True, False])
def test_equals_from_vlm_saved(original_names, tied, backbone, processor, vae, vae_folder, save_backbone, tmp_path):
    config = Qwen2VLConfig.from_dict({**backbone.config.to_dict(), "tie_word_embeddings": tied})
    vlm = Qwen2VLForConditionalGeneration(config).eval()
    vlm.generation_config = backbone.generation_config
    source = save_backbone(vlm, tmp_path / "source", save_original_format=original_names)
    assert len(list(source.glob("*.safetensors"))) > 2
    initialize(source, vae_folder, 2, **SMALL).write(tmp_path / "streamed", "50KB")

    model = LatteFlowForConditionalGeneration.from_vlm(
        Qwen2VLForConditionalGeneration.from_pretrained(source), num_experts=2, latent_channels=4, **SMALL
    )
    model.config.vlm_config._name_or_path = ""
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(tmp_path / "saved")

    ours, theirs = stored(tmp_path / "streamed" / "model"), stored(tmp_path / "saved" / "model")
    assert ours.keys() == theirs.keys() and ("vlm.lm_head.weight" in ours) is not tied
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert is_random(name) or torch.equal(ours[name], tensor), name
    files = ["model/config.json", "model/generation_config.json", "scheduler/scheduler_config.json"]
    files += ["model_index.json", "processor/processor_config.json", "processor/tokenizer.json"]
    for file in [*files, "processor/chat_template.jinja"]:
        ours, theirs = ((tmp_path / kind / file).read_text() for kind in ("streamed", "saved"))
        assert ours == theirs if file.endswith("jinja") else json.loads(ours) == json.loads(theirs), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source", "streamed"]


@pytest.mark.parametrize("name", BACKBONES)
def test_tensors_of_every_backbone(name, tmp_path):
    """As `from_vlm` makes them: those of the tower are copies of the backbone's under their stored names, or new."""
    vlm = tiny_backbone(name)
    vlm.save_pretrained(tmp_path)
    sizes = {"num_experts": 2, "tower_layers": [1, 2, 3], "layers_per_expert": [1, 2], "latent_channels": 4, **SMALL}
    expected = LatteFlowForConditionalGeneration.from_vlm(vlm, **sizes).state_dict()
    model = model_on_meta(LatteFlowConfig(vlm_config=vlm.config, **sizes))
    backbone = module_tensors(read_weights(tmp_path, "model"), model.vlm, tmp_path)
    found = _model_tensors(model, backbone, torch.float32, 0)
    assert found.keys() == stored_names(model).keys()
    for key, tensor in found.items():
        assert is_random(key) or torch.equal(tensor.read(), expected[key]), key


def test_the_seed_changes_what_is_random_and_nothing_else(backbone_folder, vae_folder, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        initialize(backbone_folder, vae_folder, 2, seed=seed, timestep_embed_dim=512).write(tmp_path / name)
    a, b, c = (stored(tmp_path / name / "model") for name in "abc")
    random = [name for name in a if is_random(name)]
    assert len(random) == 3
    for name in a:
        assert torch.equal(a[name], b[name])
        assert torch.equal(a[name], c[name]) is (name not in random)


@pytest.mark.parametrize("residual_attention", ["scores", "probabilities", None])
def test_new_tensors_are_initialised_as_in_the_whole_model(residual_attention, make_model):
    """Constants exactly, random weights in their statistics; copies of the backbone are tested above."""
    sizes = {"timestep_frequency_dim": 64, "timestep_embed_dim": 512, "latent_patch_size": 2, "latent_kernel_size": 6}
    model = make_model(filled=False, residual_attention=residual_attention, **sizes)
    modules = "|".join(model.tower.layers[0].copied_modules)
    copied = re.compile(rf"tower\.layers\.\d+\.(?!self_attn\.residual_gate)({modules})\.")
    expected = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("tower.") and not copied.match(name)
    }
    new = new_tensors(model_on_meta(model.config), expected, torch.float32)
    assert new.keys() == expected.keys()
    kinds = {"zero": 0, "one": 0, "random": 0}
    for name, tensor in expected.items():
        value = new[name].read()
        assert (new[name].shape, new[name].dtype) == (tensor.shape, tensor.dtype)
        if (tensor == tensor.flatten()[0]).all():
            assert torch.equal(value, tensor), name
            kinds["zero" if tensor.flatten()[0] == 0 else "one"] += 1
        else:
            assert value.std().item() == pytest.approx(tensor.std().item(), rel=0.05), name
            assert value.mean().abs() < 0.1 * value.std() and not torch.equal(value, tensor), name
            assert value.abs().max().item() == pytest.approx(tensor.abs().max().item(), rel=0.2), name
            kinds["random"] += 1
    # 4 layers with a modulation, 2 with a gate, the modulation and projection of the head, and 3 biases.
    num_gates = 0 if residual_attention is None else 2
    assert kinds == {"zero": 2 * (4 + num_gates + 2) + 3, "one": 4 * 2 + 1, "random": 3}
    # Xavier's bound for the latents, transformers' 0.02 for the timesteps.
    bound = (6 / (4 * 36 + 32)) ** 0.5
    assert 0.98 * bound < new["tower.latent_embedding.proj.weight"].read().abs().max() <= bound
    assert new["tower.timestep_embedding.mlp.linear_1.weight"].read().std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_equals_the_stock_class_bit_for_bit(
    dtype, backbone, backbone_folder, vae_folder, save_backbone, tmp_path, encode, picture
):
    import copy

    source = save_backbone(copy.deepcopy(backbone).to(dtype), tmp_path / "source")
    initialize(source, vae_folder, 4, **SMALL).write(tmp_path / "out")
    stock = Qwen2VLForConditionalGeneration.from_pretrained(source).eval()
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "out")
    assert stock.dtype == pipe.model.dtype == dtype
    for inputs in (encode("what is this?", image=picture), encode("a", "what is left of the circle?")):
        with torch.no_grad():
            assert torch.equal(stock(**inputs).logits, pipe.model(**inputs).logits)
        a, b = (m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (stock, pipe.model))
        assert torch.equal(a, b)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_any_autoencoder_of_diffusers(backbone_folder, tmp_path):
    AutoencoderKL(block_out_channels=(32, 32), latent_channels=6, norm_num_groups=8).save_pretrained(tmp_path / "vae")
    initialize(backbone_folder, tmp_path / "vae", 2, **SMALL).write(tmp_path / "out")
    pipe = LatteFlowPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.model.config.latent_channels == 6
    assert pipe("a", height=16, width=16, num_inference_steps=1).images[0].size == (16, 16)


def change_weights(folder, change):
    """Rewrite the shards of a folder, and its index to match."""
    tensors = change(stored(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_one(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return tensors


def with_another(tensors):
    return {**tensors, "model.layers.9.mlp.up_proj.weight": torch.zeros(2)}


def with_a_wrong_shape(tensors):
    return {**tensors, "model.norm.weight": torch.zeros(31)}


def with_a_head_of_its_own(tensors):
    return {**tensors, "lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}


def stored_twice(tensors):
    return {**tensors, "model.language_model.norm.weight": tensors["model.norm.weight"].clone()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_one, "1 missing: model.language_model.layers.1.mlp.up_proj.weight"),
        (with_another, "1 unexpected: model.language_model.layers.9.mlp.up_proj.weight"),
        (with_a_wrong_shape, r"model.language_model.norm.weight \(31,\) instead of \(32,\)"),
        (with_a_head_of_its_own, "lm_head.weight and .*embed_tokens.weight differ"),
        (stored_twice, "model.language_model.norm.weight is stored twice"),
    ],
)
def test_a_backbone_that_does_not_fit_its_configuration(change, words, backbone_folder, vae_folder, tmp_path):
    shutil.copytree(backbone_folder, tmp_path / "source")
    change_weights(tmp_path / "source", change)
    with pytest.raises(ValueError, match=words):
        initialize(tmp_path / "source", vae_folder, 2)


def test_a_tied_head_may_be_stored(backbone_folder, vae_folder, tmp_path):
    shutil.copytree(backbone_folder, tmp_path / "source")
    change_weights(tmp_path / "source", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    initialize(tmp_path / "source", vae_folder, 2).write(tmp_path / "out")
    assert "vlm.lm_head.weight" not in stored(tmp_path / "out" / "model")


def truncate_a_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def lose_a_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return shard.name


def damage_the_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json"


def lose_everything(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return "model.safetensors"


def lose_the_configuration(folder):
    (folder / "config.json").unlink()
    return "config.json"


@pytest.mark.parametrize(
    "damage", [truncate_a_shard, lose_a_shard, damage_the_index, lose_everything, lose_the_configuration]
)
def test_an_incomplete_source(damage, backbone_folder, vae_folder, tmp_path):
    shutil.copytree(backbone_folder, tmp_path / "source")
    name = damage(tmp_path / "source")
    with pytest.raises(OSError, match=name):
        initialize(tmp_path / "source", vae_folder, 2)


def test_a_number_of_experts_that_does_not_divide(backbone_folder, vae_folder):
    with pytest.raises(ValueError, match=r"num_experts must divide the backbone's 4 layers, got 3"):
        initialize(backbone_folder, vae_folder, 3)


def test_an_autoencoder_without_some_of_its_weights(backbone_folder, vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"1 missing: {lost}"):
        initialize(backbone_folder, tmp_path / "vae", 2)


def test_converted_folders_do_not_name_local_paths(backbone_folder, vae_folder, tmp_path):
    initialize(backbone_folder, vae_folder, 2).write(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert backbone_folder.name in card.text
    assert not any(str(tmp_path.parent) in path.read_text() for path in (tmp_path / "out").rglob("*.[jm]*"))
