# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Features of images, in which image quality is measured, from an extractor of the user's choice.

What is unusual here: nothing is ever downloaded. The tiny world's extractor is part of the package; the weights of all
others are files that the user has. Features carry the name of their extractor, since distances in the features of two
extractors, or of two versions of one, cannot be compared. A name has a hash of the weights and the `version` of
the extractor's code: raise it with each change of what is computed from the same weights and images.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..checkpoints import tiny_checkpoint
from ..files import check_files, hash_file
from ..modeling.context import unknown_words
from ..pipelines.fingerprint import hash_module
from ..tinyworld.shapes import IMAGE_SIZE
from .image_sets import ImageSet, open_images


INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
CHOICES = "tinyworld, the file inception-2015-12-05.pt, or the folder of a vision model of transformers such as DINOv2"


@dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Args:
        values (`np.ndarray`): (n, d), float64.
        extractor (`str`): the name of the extractor, with its version and a hash of its weights.
        name (`str`, defaults to `"images"`): what errors call the set.
        log_probabilities (`np.ndarray`, *optional*): (n, classes), float64, for the Inception Score.

    Raises:
        `ValueError`: if a value is NaN or infinite, or the shape is another one.
    """

    values: np.ndarray
    extractor: str
    name: str = "images"
    log_probabilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or 0 in self.values.shape:
            raise ValueError(f"features of {self.name} must have the shape (n, d), got {self.values.shape}.")
        for what, values in (("features", self.values), ("log_probabilities", self.log_probabilities)):
            if values is None:
                continue
            wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(wrong):
                raise ValueError(
                    f"{what} of {self.name} contain NaN or infinite values, first for image {wrong[0]}, from "
                    f"{self.extractor}; are its weights damaged?"
                )

    def __len__(self) -> int:
        return len(self.values)


class FeatureExtractor(Protocol):
    """What computes features.

    Args:
        name (`str`): differs between extractors that compute different features.
        num_features (`int`): d.
        has_classes (`bool`): whether there are probabilities of classes, for the Inception Score.
    """

    name: str
    num_features: int
    has_classes: bool

    def check_size(self, name: str, height: int, width: int) -> None:
        """
        Raises:
            `ValueError`: if the images called `name` are of a size that the extractor is not made for.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """
        Raises:
            `ValueError`: if images of these prompts are of a kind that the extractor is not made for.
        """

    def features(self, images: np.ndarray) -> torch.Tensor:
        """Images (n, height, width, 3) of uint8 -> features (n, d)."""

    def log_probabilities(self, images: np.ndarray) -> torch.Tensor:
        """Images (n, height, width, 3) of uint8 -> logarithms of the probabilities of classes (n, classes)."""


class TinyWorldExtractor:
    """The vision tower of the embedded checkpoint, averaged over the patches of an image: d = 128.

    The tower was trained to tell colours, shapes, digits and relations apart, and frozen before any image was
    generated. It only knows the tiny world, and its distances mean something only there: they compare models of the
    tiny world with each other, and not with numbers from papers. (Chosen: its last layer before the patches are
    merged, because fewer features need fewer images, after the norm that the merger starts with, because features
    around 1 suit the kernel distance.)

    Args:
        device (`str`, defaults to `"cpu"`): where it runs.
    """

    version = 1
    has_classes = False

    def __init__(self, device: str = "cpu"):
        from ..modeling.modeling_latte_flow import LatteFlowForConditionalGeneration
        from ..modeling.processing_latte_flow import LatteFlowProcessor

        checkpoint = Path(tiny_checkpoint())
        model = LatteFlowForConditionalGeneration.from_pretrained(checkpoint / "model", dtype=torch.float32)
        self.tower = model.vlm.model.visual.eval().to(device)
        self.image_processor = LatteFlowProcessor.from_pretrained(checkpoint / "processor").image_processor
        self.words = model.config.trained_words
        self.num_features = self.tower.config.embed_dim
        self.name = f"tinyworld-v{self.version}-{hash_module(self.tower)[:12]}"
        self.device = device

    def check_size(self, name: str, height: int, width: int) -> None:
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"{name} must be of {IMAGE_SIZE}x{IMAGE_SIZE} pixels for the extractor of the tiny world, got "
                f"{height}x{width}; for other images, choose another extractor."
            )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        unknown = unknown_words(list(prompts), self.words)
        if unknown:
            shown = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
            raise ValueError(
                "the extractor of the tiny world only knows its images, and prompts have words of another one "
                f"({shown}); choose another extractor."
            )

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> torch.Tensor:
        inputs = self.image_processor(images=_to_pil(images), return_tensors="pt").to(self.device)
        output = self.tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        patches = self.tower.merger.ln_q(output.last_hidden_state)
        return patches.view(len(images), -1, self.num_features).mean(dim=1)

    def log_probabilities(self, images: np.ndarray) -> torch.Tensor:
        raise ValueError("the extractor of the tiny world has no classes; the Inception Score needs Inception.")


class InceptionExtractor:
    """The Inception network of FID and of the Inception Score: d = 2048, 1008 classes.

    The weights are those of 2015-12-05, the same as in the evaluators of TTUR and ADM, in the TorchScript file of
    StyleGAN2-ADA, which resizes as they do and needs no other package. (Chosen instead of torch-fidelity's file, whose
    network needs torchvision; with torchvision, transformers prepares images in another way.) The probabilities leave
    the bias of the last layer out, as in the original Inception Score.

    Args:
        path (`str` or `Path`): the file `inception-2015-12-05.pt`.
        device (`str`, defaults to `"cpu"`): where it runs.

    Raises:
        `ValueError`: if it is another kind of file.
        `OSError`: if there is no such file.
    """

    version = 1
    has_classes = True

    def __init__(self, path: str | Path, device: str = "cpu"):
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"extractor {path} does not exist. {_where_to_get_inception()}")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
            names = {argument.name for argument in self.network.forward.schema.arguments}
        except RuntimeError as error:
            raise ValueError(f"extractor {path} is no TorchScript file. {_where_to_get_inception()}") from error
        if not {"return_features", "no_output_bias"} <= names:
            raise ValueError(f"extractor {path} holds another network. {_where_to_get_inception()}")
        self.name = f"inception-v{self.version}-{hash_file(path)[:12]}"
        self.device = device
        self.num_features = self.features(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]

    def check_size(self, name: str, height: int, width: int) -> None:
        """Every size is resized to 299x299."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Any image has features."""

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> torch.Tensor:
        return self.network(self._to_tensor(images), return_features=True)

    @torch.inference_mode()
    def log_probabilities(self, images: np.ndarray) -> torch.Tensor:
        probabilities = self.network(self._to_tensor(images), no_output_bias=True).cpu().double()
        # Below, a probability of float32 is 0, and its logarithm would not be finite.
        return probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()

    def _to_tensor(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(self.device)


class VisionModelExtractor:
    """A vision model of transformers, such as DINOv2, with its own image processor.

    The features are `pooler_output`, which is the class token for DINOv2. (As in "Exposing flaws of generative model
    evaluation metrics", Stein et al. 2023, where DINOv2 agrees best with people.)

    Args:
        folder (`str` or `Path`): a local folder of the model and its image processor.
        device (`str`, defaults to `"cpu"`): where it runs.

    Raises:
        `ValueError`: if it is no vision model, or its pooling layer is not in the checkpoint.
        `OSError`: if the folder is incomplete.
    """

    version = 1
    has_classes = False

    def __init__(self, folder: str | Path, device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        check_files(folder, "config.json", "preprocessor_config.json", "*.safetensors|*.bin")
        model, info = AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        if model.main_input_name != "pixel_values":
            raise ValueError(f"extractor {folder} must be a vision model, got {type(model).__name__}.")
        if info["missing_keys"]:
            raise ValueError(
                f"extractor {folder} has no weights for {', '.join(sorted(info['missing_keys']))}; without them the "
                "features would be random."
            )
        self.model = model.eval().to(device)
        self.image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        # The same weights see other images if they are cropped or resized in another way.
        processing = json.dumps(self.image_processor.to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256(f"{hash_module(model)} {processing}".encode()).hexdigest()
        self.name = f"{model.config.model_type}-v{self.version}-{digest[:12]}"
        self.device = device
        self.num_features = self.features(np.zeros((1, 32, 32, 3), np.uint8)).shape[1]

    def check_size(self, name: str, height: int, width: int) -> None:
        """Every size is resized by the image processor."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Any image has features."""

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> torch.Tensor:
        inputs = self.image_processor(images=_to_pil(images), return_tensors="pt").to(self.device)
        output = self.model(pixel_values=inputs["pixel_values"])
        if getattr(output, "pooler_output", None) is None:
            raise ValueError(f"extractor {type(self.model).__name__} has no `pooler_output`; choose another model.")
        return output.pooler_output.flatten(start_dim=1)

    def log_probabilities(self, images: np.ndarray) -> torch.Tensor:
        raise ValueError(f"extractor {self.name} has no classes; the Inception Score needs Inception.")


def load_extractor(source: str | Path = "tinyworld", device: str = "cpu") -> FeatureExtractor:
    """Load an extractor from local files.

    Args:
        source (`str` or `Path`, defaults to `"tinyworld"`): `"tinyworld"`; the file `inception-2015-12-05.pt`; or the
            folder of a vision model of transformers.
        device (`str`, defaults to `"cpu"`): where it runs.

    Raises:
        `ValueError`: if it is something else.
        `OSError`: if a folder is incomplete.
    """
    if str(source) == "tinyworld":
        return TinyWorldExtractor(device)
    if Path(source).is_dir():
        return VisionModelExtractor(source, device)
    if Path(source).is_file():
        return InceptionExtractor(source, device)
    if "inception" in str(source).lower():
        raise ValueError(f"extractor {str(source)!r}: there is no such file. {_where_to_get_inception()}")
    raise ValueError(f"extractor must be {CHOICES}, got {str(source)!r}; nothing is downloaded.")


def _where_to_get_inception() -> str:
    return f"Nothing is downloaded: get inception-2015-12-05.pt from {INCEPTION_URL}, and give its path as extractor."


def extract_features(
    extractor: FeatureExtractor,
    images: ImageSet | str | Path | np.ndarray | Sequence[Image.Image],
    batch_size: int = 64,
    with_classes: bool = False,
    name: str | None = None,
) -> Features:
    """Compute the features of a set of images.

    Args:
        extractor ([`FeatureExtractor`]): see [`load_extractor`].
        images: see [`open_images`].
        batch_size (`int`, defaults to 64): the number of images at once.
        with_classes (`bool`, defaults to `False`): whether to compute probabilities of classes too.
        name (`str`, *optional*): what errors call the images; defaults to their path.

    Raises:
        `ValueError`: if the images are of a size that the extractor is not made for, or features are not finite.
        `ValueError` or `OSError`: for the reasons of [`open_images`].
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    opened = open_images(images, name)
    extractor.check_size(opened.name, opened.height, opened.width)
    features, log_probabilities = [], []
    with tqdm(total=opened.num_images, desc=f"features: {opened.name}") as progress:
        for batch in opened.read(batch_size):
            features.append(extractor.features(batch).cpu().double().numpy())
            if with_classes:
                log_probabilities.append(extractor.log_probabilities(batch).cpu().double().numpy())
            progress.update(len(batch))
    return Features(
        np.concatenate(features),
        extractor.name,
        opened.name,
        np.concatenate(log_probabilities) if with_classes else None,
    )


def _to_pil(images: np.ndarray) -> list[Any]:
    return [Image.fromarray(image) for image in images]
