"""Features come from local files, carry their extractor's name, and are refused where they would mean nothing."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model

from latte_flow_hf.evaluation.features import Features, extract_features, load_extractor
from latte_flow_hf.tinyworld.datasets import TinyWorldImages


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


class SmallInception(torch.nn.Module):
    """Called as the Inception network of StyleGAN2-ADA is, with one convolution and 6 classes."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 10, 4, stride=4)
        self.output = torch.nn.Linear(10, 6)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = self.convolution(img.float() / 255).mean(dim=(2, 3))
        if return_features:
            return features
        logits = features @ self.output.weight.t() if no_output_bias else self.output(features)
        return logits.softmax(dim=1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network, and its file."""
    torch.manual_seed(0)
    network = SmallInception()
    path = tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt"
    torch.jit.script(network).save(path)
    return network, path


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The model, its image processor, and their folder."""
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    ).eval()
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


@pytest.fixture(scope="module")
def tinyworld():
    return load_extractor()


def test_the_tiny_worlds_features_are_of_one_image_each(tinyworld):
    features = extract_features(tinyworld, IMAGES, batch_size=2, name="drawn")
    assert features.values.shape == (5, tinyworld.num_features) == (5, 128)
    assert features.values.dtype == np.float64 and features.extractor == tinyworld.name
    alone = extract_features(tinyworld, IMAGES[3:4])
    np.testing.assert_allclose(alone.values[0], features.values[3], atol=1e-4)


def test_the_tiny_worlds_features_tell_its_images_apart(tinyworld):
    """Scenes with the same prompt are closer to each other than to scenes with other prompts."""
    items = [TinyWorldImages(3, digit_share=0.0, single_share=1.0)[index] for index in range(160)]
    features = extract_features(tinyworld, [item["image"] for item in items])
    prompts = [item["prompt"].lower().strip(".").removeprefix("a ") for item in items]
    distances = np.linalg.norm(features.values[:, None] - features.values, axis=-1)
    same = np.equal.outer(prompts, prompts) & ~np.eye(160, dtype=bool)
    other = ~np.equal.outer(prompts, prompts)
    assert same.any() and distances[same].mean() < 0.7 * distances[other].mean()


def test_images_of_another_world_are_refused(tinyworld):
    with pytest.raises(
        ValueError, match=r"photos must be of 64x64 pixels for the extractor of the tiny world, got 256"
    ):
        extract_features(tinyworld, np.zeros((2, 256, 256, 3), np.uint8), name="photos")
    tinyworld.check_prompts(["A red circle left of a blue square.", "a handwritten seven"])
    with pytest.raises(ValueError, match=r"words of another one \(photo, my, dog\); choose another"):
        tinyworld.check_prompts(["a red circle", "a photo of my dog"])
    with pytest.raises(ValueError, match="Inception Score needs Inception"):
        extract_features(tinyworld, IMAGES, with_classes=True)


def test_inception_gives_features_and_probabilities(inception):
    network, path = inception
    extractor = load_extractor(path)
    assert extractor.num_features == 10 and extractor.name.startswith("inception-")
    features = extract_features(extractor, IMAGES, batch_size=2, with_classes=True)
    tensors = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features.values).float(), network(tensors, return_features=True))
        logits = network(tensors, return_features=True) @ network.output.weight.t()
    assert features.log_probabilities is not None
    np.testing.assert_allclose(features.log_probabilities, logits.log_softmax(dim=1), atol=1e-5)


def test_other_files_are_not_taken_for_inception(inception, tmp_path):
    network, _ = inception
    with pytest.raises(
        ValueError, match=r"no such file. Nothing is downloaded: get inception-2015-12-05.pt from https"
    ):
        load_extractor("inception")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth is no TorchScript file. Nothing is downloaded"):
        load_extractor(tmp_path / "weights.pth")
    torch.jit.script(network.convolution).save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds another network"):
        load_extractor(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"extractor must be tinyworld, the file .*, got 'dinov2'; nothing is"):
        load_extractor("dinov2")


def test_a_vision_model_gives_its_pooled_output(dinov2):
    model, processor, folder = dinov2
    extractor = load_extractor(folder)
    assert extractor.num_features == 24 and extractor.name.startswith("dinov2-")
    features = extract_features(extractor, IMAGES, batch_size=2)
    inputs = processor(images=[Image.fromarray(image) for image in IMAGES], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).pooler_output
    torch.testing.assert_close(torch.from_numpy(features.values).float(), expected, atol=1e-5, rtol=1e-4)


def test_incomplete_and_other_models_are_refused(dinov2, tmp_path):
    model, processor, _ = dinov2
    with pytest.raises(OSError, match=r"has no config.json"):
        load_extractor(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layernorm.")}
    model.save_pretrained(tmp_path / "without-pooling", state_dict=state)
    with pytest.raises(OSError, match=r"has no preprocessor_config.json"):
        load_extractor(tmp_path / "without-pooling")
    processor.save_pretrained(tmp_path / "without-pooling")
    with pytest.raises(ValueError, match=r"no weights for layernorm.bias, layernorm.weight"):
        load_extractor(tmp_path / "without-pooling")
    text_config = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    CLIPTextModel(text_config).save_pretrained(tmp_path / "text")
    processor.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="must be a vision model, got CLIPTextModel"):
        load_extractor(tmp_path / "text")


def test_features_must_be_finite(dinov2):
    _, _, folder = dinov2
    extractor = load_extractor(folder)
    with torch.no_grad():
        extractor.model.layernorm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="features of images contain NaN or infinite values, first for image 0, from"):
        extract_features(extractor, IMAGES)
    with pytest.raises(ValueError, match=r"shape \(n, d\), got \(3,\)"):
        Features(np.zeros(3), "any")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        extract_features(extractor, IMAGES, batch_size=0)


def test_names_tell_versions_and_the_preparation_of_images_apart(dinov2, inception, tmp_path, monkeypatch):
    for source in ("tinyworld", inception[1], dinov2[2]):
        extractor = load_extractor(source)
        assert load_extractor(source).name == extractor.name
        monkeypatch.setattr(type(extractor), "version", type(extractor).version + 1)
        assert load_extractor(source).name != extractor.name
    # The same weights, and another crop.
    model, processor, folder = dinov2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_extractor(tmp_path).name == load_extractor(folder).name
    BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    assert load_extractor(tmp_path).name != load_extractor(folder).name
