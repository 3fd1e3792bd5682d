# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Small sources on disk: a stock backbone in shards, an autoencoder, and a whole pipeline with a filled tower."""

import hashlib

import pytest

from latte_flow_hf import LatteFlowPipeline, LatteFlowScheduler


def tree(folder) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def files_of():
    return tree


@pytest.fixture(scope="session")
def save_backbone(processor):
    """Save a stock folder: the weights in shards, the tokenizer and the image processor."""

    def save(model, folder, **kwargs):
        model.save_pretrained(folder, max_shard_size="60KB", **kwargs)
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(processor.chat_template)
        return folder

    return save


@pytest.fixture(scope="session")
def _backbone_folder(backbone, save_backbone, tmp_path_factory):
    return save_backbone(backbone, tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def _vae_folder(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _pipeline_folder(model, processor, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = LatteFlowScheduler(expert_boundaries=model.config.expert_boundaries, shift=1.5)
    LatteFlowPipeline(model, processor, vae, scheduler).save_pretrained(folder)
    return folder


def _untouched(name):
    """The folder; afterwards it is checked that the test did not change it."""

    @pytest.fixture(name=name.removeprefix("_"))
    def folder(request):
        path = request.getfixturevalue(name)
        before = tree(path)
        yield path
        assert tree(path) == before

    return folder


backbone_folder = _untouched("_backbone_folder")
vae_folder = _untouched("_vae_folder")
pipeline_folder = _untouched("_pipeline_folder")
