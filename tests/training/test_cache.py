"""Training from a cache equals training without one; a cache of something else is refused."""

import pickle

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from latte_flow_hf import LatteFlowPipeline
from latte_flow_hf.pipelines.fingerprint import hash_module
from latte_flow_hf.training import ImagePromptEncoder, cache
from latte_flow_hf.training.cache import CachedContexts, CachedImageDataset
from latte_flow_hf.training.data import CaptionedImageDataset, ImageRows, UnreadableImages
from latte_flow_hf.training.recipe import DataSettings


def test_training_from_the_cache_equals_training_without_it(recipe, run, read_log, tmp_path, caplog):
    plain = hash_module(run(recipe(), tmp_path / "plain").model.tower)
    cached = recipe(data={"cache": str(tmp_path / "cache")}, training={"dataloader_num_workers": 0})
    first = run(cached, tmp_path / "first")
    assert hash_module(first.model.tower) == plain
    assert "05.png cannot be read" in caplog.text
    losses, cached_losses = (
        [(entry["expert_0_loss"], entry["expert_1_loss"]) for entry in read_log(folder) if "expert_0_loss" in entry]
        for folder in (tmp_path / "plain", tmp_path / "first")
    )
    assert losses == cached_losses
    total = [entry["loss"] for entry in read_log(tmp_path / "plain") if "loss" in entry]
    assert total == pytest.approx([sum(pair) for pair in losses], rel=1e-4)

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


@pytest.mark.parametrize("with_contexts", [True, False])
def test_a_finished_cache_that_lost_a_shard_is_completed(with_contexts, recipe, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_SIZE", 4)
    data = {"cache": str(tmp_path / "cache"), "cache_contexts": with_contexts}
    first = run(recipe(data=data), tmp_path / "first")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    lost = [tmp_path / "cache" / "latents-000000004.safetensors", *(tmp_path / "cache").glob("contexts-000000004*")]
    assert len(lost) == 1 + with_contexts
    for path in lost:
        path.unlink()
    second = run(recipe(data=data), tmp_path / "second")
    assert hash_module(first.model.tower) == hash_module(second.model.tower)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
@pytest.mark.parametrize("kind", ["latents", "contexts"])
def test_a_damaged_shard_is_named_and_computed_again_once_it_is_removed(kind, damage, recipe, run, tmp_path):
    data = {"cache": str(tmp_path / "cache")}
    content = recipe(data=data, training={"max_steps": 1})
    first = run(content, tmp_path / "first")
    shard = tmp_path / "cache" / f"{kind}-000000000.safetensors"
    whole = shard.read_bytes()
    flipped = whole[:-9] + bytes([whole[-9] ^ 8]) + whole[-8:]
    shard.write_bytes({"truncated": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    with pytest.raises(OSError, match=rf"cache shard .*{shard.name} is damaged; remove it"):
        run(content, tmp_path / "second")
    shard.unlink()
    assert hash_module(run(content, tmp_path / "second").model.tower) == hash_module(first.model.tower)
    assert shard.read_bytes() == whole


def test_a_full_disk_names_the_shard_and_leaves_nothing_of_it(recipe, run, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    content = recipe(data={"cache": str(tmp_path / "cache")}, training={"max_steps": 1})
    monkeypatch.setattr(cache, "save_file", full_disk)
    with pytest.raises(OSError, match=r"latents-000000000\.safetensors cannot be written .*No space left") as error:
        run(content, tmp_path / "first")
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fingerprint.json"]
    monkeypatch.undo()
    run(content, tmp_path / "first")


def test_all_captions_of_an_image_are_cached(pipe, tmp_path):
    rows = [
        {"image": Image.new("RGB", (32, 32), (i, 0, 0)), "prompt": ["a red circle", "a cross", None]} for i in range(9)
    ]
    rows.append({"image": rows[0]["image"], "prompt": None})
    settings = DataSettings(source={"path": "any"}, size=32)
    unreadable = UnreadableImages(1)
    image_rows = ImageRows(rows, settings, "")
    cache.build_cache(tmp_path / "cache", pipe, image_rows, ImagePromptEncoder(pipe), unreadable)
    assert list(unreadable.reasons.values()) == ["has no caption: None is None"]
    cached = CachedImageDataset(tmp_path / "cache", 0)
    plain = CaptionedImageDataset(image_rows, 0, UnreadableImages(1))
    contexts = CachedContexts(tmp_path / "cache")
    drawn = set()
    for epoch in range(3):
        cached.set_epoch(epoch), plain.set_epoch(epoch)
        examples = list(zip(cached, plain))
        assert len(examples) == 10 and all(one["prompt"] == other["prompt"] for one, other in examples)
        drawn |= {one["prompt"] for one, _ in examples}
    assert drawn == {"a red circle", "a cross"} and len(contexts(["", *drawn])) == 3


def test_the_hash_of_a_module_depends_on_weights_and_configuration(make_vae):
    vae, same, other_weights, other_config = (make_vae() for _ in range(4))
    with torch.no_grad():
        next(other_weights.parameters()).add_(1e-3)
    other_config.register_to_config(scaling_factor=0.5)
    # The path that a module was loaded from does not change its output.
    same.register_to_config(_name_or_path="folder")
    hashes = [hash_module(module) for module in (vae, same, other_weights, other_config)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
