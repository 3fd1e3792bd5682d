# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Images of one prompt for the command line, and the same image again from the metadata in its file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..checkpoints import few_step_checkpoint
from ..pipelines.fingerprint import hash_adapter
from ..pipelines.image_metadata import (
    ImageMetadata,
    InputRecord,
    PipelineRecord,
    format_weights,
    record_call,
    record_input,
)
from ..pipelines.lora import parse_lora
from ..pipelines.pipeline_latte_flow_img2img import LatteFlowImg2ImgPipeline
from ..pipelines.pipeline_latte_flow_inpaint import LatteFlowInpaintPipeline


@dataclass(frozen=True)
class Request:
    """Images of one prompt; `None` is the default of the pipeline.

    Args:
        prompt (`str`): the prompt.
        seed (`int`): of the first image; each further one has the next.
        negative_prompt, num_inference_steps, steps_per_expert, guidance_scale, guidance_interval, height, width: as in
            the call.
        images (`tuple[str, ...]`): paths of the images that the model sees with the prompt.
        source, mask (`str`, *optional*): paths, for image-to-image and inpainting.
        strength (`float`, *optional*): with a source, the share of the steps to take.
    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    steps_per_expert: list[int] | None = None
    guidance_scale: float | list[float] | None = None
    guidance_interval: tuple[float, float] | None = None
    height: int | None = None
    width: int | None = None
    images: tuple[str, ...] = ()
    source: str | None = None
    mask: str | None = None
    strength: float | None = None

    def run(self, pipe: Any, first: int = 0, number: int = 1) -> list[Image.Image]:
        """Generate images `first` to `first + number` in one batch.

        Raises:
            `ValueError`: if the pipeline refuses an argument.
        """
        call: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "steps_per_expert": self.steps_per_expert,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.guidance_interval,
            "height": self.height,
            "width": self.width,
            "num_images_per_prompt": number,
            # On the CPU, so that the noise is the same for every device.
            "generator": [torch.Generator().manual_seed(self.seed + first + i) for i in range(number)],
        }
        images = list(self.images) or None
        if self.source is None:
            return pipe(image=images, **call).images
        call |= {"image": self.source, "context_image": images, "strength": self.strength}
        if self.mask is None:
            return LatteFlowImg2ImgPipeline.from_pipe(pipe)(**call).images
        return LatteFlowInpaintPipeline.from_pipe(pipe)(mask_image=self.mask, **call).images

    def record(self, pipe: Any, record: PipelineRecord, index: int = 0, batch_size: int = 1) -> ImageMetadata:
        """What makes image `index` again."""
        return record_call(
            pipe,
            record,
            self.prompt,
            self.seed + index,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            steps_per_expert=self.steps_per_expert,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            height=self.height,
            width=self.width,
            images=self.images,
            source=self.source,
            mask=self.mask,
            strength=self.strength,
            batch_size=batch_size,
        )


def repeat(original: ImageMetadata, **given: Any) -> Request:
    """The request that makes an image again, with the options that are given in place of its own.

    Args:
        original ([`ImageMetadata`]): of the image.
        given: fields of [`Request`]; `None` where the option was left out.

    Raises:
        `ValueError`: if an image that the original was made from is not given.
    """
    values = {name: value for name, value in given.items() if value not in (None, ())}
    for name, inputs, option in (
        ("images", original.images, "--image"),
        ("source", (original.source,), "--source"),
        ("mask", (original.mask,), "--mask"),
    ):
        needed = [record.name or "an image without a name" for record in inputs if record is not None]
        # Without the original's source there is no need for its mask.
        if needed and name not in values:
            raise ValueError(f"the image was made from {', '.join(needed)}; give it by {option} PATH.")
    scale = original.guidance_scale
    own = Request(
        prompt=original.prompt,
        seed=original.seed,
        negative_prompt=original.negative_prompt,
        num_inference_steps=original.num_inference_steps,
        steps_per_expert=None if original.steps_per_expert is None else list(original.steps_per_expert),
        guidance_scale=list(scale) if isinstance(scale, tuple) else scale,
        guidance_interval=original.guidance_interval,
        height=original.height,
        width=original.width,
        strength=original.strength,
    )
    if "num_inference_steps" in values:
        own = replace(own, steps_per_expert=None)
    return replace(own, **values)


def check_adapters_given(original: ImageMetadata, model: str | None, loras: Sequence[str] | None, fast: bool) -> bool:
    """Whether to load the embedded adapter for an image: if it is asked for, or was used.

    Raises:
        `ValueError`: if another adapter was used, and none is given.
    """
    before = original.pipeline
    embedded = (Path(few_step_checkpoint()).name,)
    if fast or (model is None and not loras and before.fused == embedded):
        return True
    if before.adapters and not loras:
        used = " and ".join(f"adapter {it.name!r} (weight {format_weights(it.weights)})" for it in before.adapters)
        raise ValueError(f"the image was made with {used}; give each by --lora PATH.")
    return False


def use_weights(pipe: Any, original: ImageMetadata, loras: Sequence[str]) -> None:
    """Activate the loaded adapters with the weights that the image was made with, unless a weight was given with the
    path."""
    own_weights = {adapter.sha256: list(adapter.weights) for adapter in original.pipeline.adapters}
    weights: dict[str, Any] = {}
    for name, lora in zip(pipe._adapters(), loras):
        given = parse_lora(lora)[1]
        weights[name] = own_weights.get(hash_adapter(pipe.model, name), 1.0) if given is None else given
    pipe.set_adapters([*weights], [*weights.values()])


def check_same(original: ImageMetadata, record: PipelineRecord, request: Request) -> None:
    """Check that what is not in the file of an image is what it was made with.

    Raises:
        `ValueError`: with all that differs.
    """
    before = original.pipeline
    problems = [
        f"{name} is {record.versions[name]} and was {before.versions.get(name)}"
        for name in record.versions
        # 2.13.1 corrects what 2.13.0 meant to do.
        if record.versions[name].split(".")[:2] != before.versions.get(name, "").split(".")[:2]
    ]
    if record.device != before.device:
        problems.append(f"the device is {record.device} and was {before.device}")
    if record.dtype != before.dtype:
        problems.append(f"the dtype is {record.dtype} and was {before.dtype}")
    elif different := sorted(name for name in before.hashes if record.hashes.get(name) != before.hashes[name]):
        problems.append(f"the {' and the '.join(different)} of {record.model!r} differ from those of {before.model!r}")
    hashes = {adapter.sha256 for adapter in record.adapters}
    problems += [f"adapter {adapter.name!r} is missing" for adapter in before.adapters if adapter.sha256 not in hashes]
    given: list[tuple[str, InputRecord | None]] = [*zip(request.images, original.images)]
    given += [(request.source or "", original.source), (request.mask or "", original.mask)]
    problems += [
        f"{path} is not the image that was {used.name or 'used'}"
        for path, used in given
        if used is not None and record_input(path).sha256 != used.sha256
    ]
    if len(request.images) != len(original.images):
        problems.append(f"{len(request.images)} images are shown and {len(original.images)} were")
    if problems:
        raise ValueError(
            f"the image would be another: {'; '.join(problems)}. Give the same by --model, --lora, --image, --source, "
            "--mask, --device and --dtype, or add --allow-changes for what this makes of its settings."
        )
