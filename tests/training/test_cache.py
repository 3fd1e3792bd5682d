"""Training from a cache equals training without one; a cache of something else is refused."""

import pickle

import pytest
import torch

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.training import cache
from latte_flow_hf.training.cache import CachedContexts, CachedImageDataset, hash_module


def test_training_from_the_cache_equals_training_without_it(recipe, run, read_log, tmp_path, caplog):
    plain = hash_module(run(recipe(), tmp_path / "plain").model.tower)
    cached = recipe(data={"cache": str(tmp_path / "cache")}, training={"dataloader_num_workers": 0})
    first = run(cached, tmp_path / "first")
    assert hash_module(first.model.tower) == plain
    assert "05.png cannot be read" in caplog.text
    losses = [entry for entry in read_log(tmp_path / "plain") if "expert_0_loss" in entry]
    assert losses == [entry for entry in read_log(tmp_path / "first") if "expert_0_loss" in entry]
    total = [entry["loss"] for entry in read_log(tmp_path / "plain") if "loss" in entry]
    assert total == pytest.approx([entry["expert_0_loss"] + entry["expert_1_loss"] for entry in losses], rel=1e-4)

    # A second run computes nothing again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert hash_module(run(cached, tmp_path / "second").model.tower) == plain
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    # The workers of a data loader get copies, which open the files themselves.
    images, contexts = CachedImageDataset(tmp_path / "cache", 0), CachedContexts(tmp_path / "cache")
    expected, prompts = images[3], ["", "a red circle number 1"]
    expected_keys = contexts(prompts).keys
    copied_images, copied_contexts = pickle.loads(pickle.dumps((images, contexts)))
    assert torch.equal(copied_images[3]["latents"], expected["latents"])
    assert torch.equal(copied_contexts(prompts).keys[0], expected_keys[0])


def test_a_cache_of_something_else_is_refused(recipe, run, make_vae, model, processor, tmp_path):
    cached = recipe(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 1})
    first = run(cached, tmp_path / "first")
    other = tmp_path / "other"
    vae = make_vae()
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    LatteFlowPipeline(model, processor, vae, first.scheduler).save_pretrained(other)
    with pytest.raises(ValueError, match=r"cache .* was made with a different autoencoder; remove it"):
        run({**cached, "model": {"pipeline": str(other)}}, tmp_path / "second")
    with pytest.raises(ValueError, match="was made with a different size"):
        run({**cached, "data": {**cached["data"], "size": 64}}, tmp_path / "third")
    # The cache does not depend on the experts: it can be used with the trained tower.
    run({**cached, "model": {"pipeline": str(tmp_path / "first" / "out")}}, tmp_path / "fourth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=r"cache folder .*full is not empty and not a cache"):
        run(recipe(data={"cache": str(tmp_path / "full")}), tmp_path / "fifth")


def test_an_interrupted_cache_is_completed(recipe, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    cached = recipe(data={"cache": str(tmp_path / "cache")})
    plain = run(recipe(), tmp_path / "plain")
    run({**cached, "training": {**cached["training"], "max_steps": 1}}, tmp_path / "first")
    # What a killed process leaves: no index, a missing shard, and a part of it under a temporary name.
    (tmp_path / "cache" / "index.json").unlink()
    missing = tmp_path / "cache" / "latents-000000004.safetensors"
    (tmp_path / "cache" / ".latents-000000004.safetensors.x").mkdir()
    missing.rename(tmp_path / "cache" / ".latents-000000004.safetensors.x" / missing.name)
    finished = tmp_path / "cache" / "latents-000000000.safetensors"
    before = finished.stat().st_mtime_ns
    assert hash_module(run(cached, tmp_path / "second").model.tower) == hash_module(plain.model.tower)
    assert finished.stat().st_mtime_ns == before and missing.exists()


def test_the_hash_of_a_module_depends_on_weights_and_configuration(make_vae):
    vae, same, other_weights, other_config = (make_vae() for _ in range(4))
    with torch.no_grad():
        next(other_weights.parameters()).add_(1e-3)
    other_config.register_to_config(scaling_factor=0.5)
    # The path that a module was loaded from does not change its output.
    same.register_to_config(_name_or_path="folder")
    hashes = [hash_module(module) for module in (vae, same, other_weights, other_config)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
