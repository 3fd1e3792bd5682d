"""What makes an image again, written to its file and read back."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image, PngImagePlugin

from latte_flow_hf.pipelines.fingerprint import hash_adapter, hash_module, hash_without_adapters
from latte_flow_hf.pipelines.image_metadata import read_metadata, record_call, record_pipeline, write_metadata


@pytest.fixture
def recorded(pipe):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    record = record_pipeline(pipe)
    call = {"guidance_scale": [1.0, 2.5], "steps_per_expert": [2, 1], "guidance_interval": (0.1, 0.9)}
    return image, record_call(pipe, record, "ein Stück + 図", 3, negative_prompt="grey", images=[image], **call)


def test_what_is_written_is_read(recorded, tmp_path):
    image, made = recorded
    file = io.BytesIO()
    write_metadata(image, made, file)
    write_metadata(image, made, tmp_path / "new" / "image.png")
    assert (tmp_path / "new" / "image.png").read_bytes() == file.getvalue()
    opened = Image.open(tmp_path / "new" / "image.png")
    assert np.array_equal(np.asarray(opened), np.asarray(image)) and "latte_flow" not in image.info
    assert made == read_metadata(opened) == read_metadata(str(tmp_path / "new" / "image.png"))
    readable = "ein Stück + 図\nNegative prompt: grey\nSteps: 2+1, Sampler: euler, CFG scale: 1+2.5, Seed: 3, Size: "
    assert opened.info["parameters"].startswith(readable)
    # As programs do that write images themselves.
    image.info.update(made.text_chunks())
    assert read_metadata(image) == made


def test_only_png_holds_it(recorded, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png, got .*image\.jpg"):
        write_metadata(*recorded, tmp_path / "image.jpg")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format"),
        ({"seed": -1}, "seed"),
        ({"seed": "many"}, "seed"),
        ({"later": 1}, "later"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_what_was_changed_or_is_of_another_version_is_refused(change, words, recorded, tmp_path):
    image, made = recorded
    info = PngImagePlugin.PngInfo()
    info.add_text("latte_flow", json.dumps({**json.loads(made.model_dump_json()), **change}))
    image.save(tmp_path / "image.png", pnginfo=info)
    with pytest.raises(ValueError, match=f"cannot read: {words}: "):
        read_metadata(tmp_path / "image.png")


def test_images_without_it_and_other_files_are_refused(picture, text_file, tmp_path):
    picture.save(tmp_path / "plain.png")
    for image in (picture, tmp_path / "plain.png"):
        with pytest.raises(ValueError, match="has no metadata of latte_flow_hf"):
            read_metadata(image)
    info = PngImagePlugin.PngInfo()
    info.add_text("latte_flow", "a" * 2_000_000, zip=True)
    picture.save(tmp_path / "huge.png", pnginfo=info)
    with pytest.raises(ValueError, match="has metadata that cannot be read"):
        read_metadata(tmp_path / "huge.png")
    with pytest.raises(OSError, match="cannot identify"):
        read_metadata(text_file)


def test_defaults_are_resolved(pipe, picture):
    made = record_call(pipe, record_pipeline(pipe), "a", 0, source=picture)
    assert made.num_inference_steps == 40 and made.steps_per_expert is None and made.guidance_scale == 4.0
    assert (made.height, made.width) == (pipe.default_size,) * 2 and made.strength == 0.8
    assert made.pipeline.dtype == "float32" and made.pipeline.adapters == ()
    with pytest.raises(ValueError, match="cannot be read"):
        record_call(pipe, made.pipeline, "a", 0, images=["none.png"])


def test_hashes_do_not_depend_on_loaded_adapters(own_pipe):
    model = own_pipe.model
    before = hash_module(model)
    assert hash_without_adapters(model) == before
    plain = record_pipeline(own_pipe)
    targets = r"tower\.layers\.\d+\.mlp\.up_proj"
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=targets, modules_to_save=["latent_embedding"])
    model.add_adapter(copy.deepcopy(config), "first")
    assert hash_module(model) != before and hash_without_adapters(model) == before
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets), "second")
    own_pipe.set_adapters(["second"], [[0.5, 1.0]])
    record = record_pipeline(own_pipe, {"second": "style"})
    assert record.hashes == plain.hashes
    (adapter,) = record.adapters
    assert adapter.name == "style" and adapter.weights == (0.5, 1.0)
    assert adapter.sha256 == hash_adapter(model, "second") != hash_adapter(model, "first")
    own_pipe.disable_lora()
    assert record_pipeline(own_pipe).adapters == ()
    own_pipe.enable_lora()
    with torch.no_grad():
        next(layer for name, layer in model.named_parameters() if "lora_A.second" in name).add_(1)
    assert hash_adapter(model, "second") != adapter.sha256
    own_pipe.fuse_lora()
    assert record_pipeline(own_pipe).hashes["model"] != plain.hashes["model"]
