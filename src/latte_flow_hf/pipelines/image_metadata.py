# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What makes an image again, stored in its PNG file: the call, and hashes of the pipeline that it depends on.

`pipe(...)` returns plain images, since hashing the weights takes seconds for a large model. A program that writes
files records the pipeline once and each call:

    record = record_pipeline(pipe)
    images = pipe(prompt, generator=torch.Generator().manual_seed(seed)).images
    write_metadata(images[0], record_call(pipe, record, prompt, seed), "out.png")

Nothing in the file says where anything lies on a disk: of files and folders it has the last part of the name.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..files import atomic_write
from ..modeling.adapters import adapter_modules
from ..modeling.images import load_rgb_image
from ..modeling.sampling import DEFAULT_GUIDANCE_SCALE, default_strength
from .fingerprint import hash_adapter, hash_without_adapters, pipeline_fingerprint


# Text chunks of the file: JSON for programs, and the text that other programs for image generation read and write.
CHUNK = "latte_flow"
READABLE_CHUNK = "parameters"

# Other versions of these may round differently, or do something else.
PACKAGES = ("latte_flow_hf", "torch", "transformers", "diffusers")

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    # From files of strangers: what is unknown or of another type is refused.
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterRecord(_Record):
    """An adapter that was active.

    Args:
        name (`str`): what it is called.
        weights (`tuple[float, ...]`): the factor of its effect in each expert.
        sha256 (`str`): of its weights, see [`fingerprint.hash_adapter`].
    """

    name: str
    weights: tuple[float, ...]
    sha256: Sha256


class InputRecord(_Record):
    """An image that the call was given. The file has its hash, not its pixels.

    Args:
        name (`str`): the name of its file, or empty.
        sha256 (`str`): of its pixels in RGB.
    """

    name: str
    sha256: Sha256


class PipelineRecord(_Record):
    """What images depend on besides the call.

    Args:
        model (`str`): the hub id of the pipeline, or the name of its folder.
        hashes (`dict[str, str]`): of the components, adapters left out, see [`fingerprint.pipeline_fingerprint`].
        scheduler (`str`): the class of the scheduler.
        solver (`str`): what the scheduler calls its solver, or its class again.
        adapters (`tuple[AdapterRecord, ...]`): the active adapters.
        fused (`tuple[str, ...]`): adapters that are part of the weights, and of their hash.
        dtype (`str`): of the weights, such as `"float32"`.
        device (`str`): the kind of device, such as `"cpu"`.
        versions (`dict[str, str]`): of this package, torch, transformers and diffusers.
    """

    model: str
    hashes: dict[str, Sha256]
    scheduler: str
    solver: str
    adapters: tuple[AdapterRecord, ...] = ()
    fused: tuple[str, ...] = ()
    dtype: str
    device: str
    versions: dict[str, str]


class ImageMetadata(_Record):
    """What makes one image again.

    Args:
        format (`int`): of this record, 1.
        prompt, negative_prompt (`str`): as in the call.
        seed (`int`): of the generator on the CPU that draws the noise.
        num_inference_steps (`int`, *optional*), steps_per_expert (`tuple[int, ...]`, *optional*): one of them.
        guidance_scale (`float` or `tuple[float, ...]`): one value, or one for each expert.
        guidance_interval (`tuple[float, float]`, *optional*): the sigmas between which guidance was used.
        height, width (`int`): in pixels.
        images (`tuple[InputRecord, ...]`): those that the model saw with the prompt.
        source, mask (`InputRecord`, *optional*): of image-to-image and inpainting.
        strength (`float`, *optional*): with a source, the share of the steps that was taken.
        batch_size (`int`): the images of the call. Above 1, the image alone is the same up to rounding.
        pipeline ([`PipelineRecord`]): the pipeline.
    """

    format: Literal[1] = 1
    prompt: str
    negative_prompt: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    steps_per_expert: tuple[int, ...] | None = None
    guidance_scale: float | tuple[float, ...]
    guidance_interval: tuple[float, float] | None = None
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    images: tuple[InputRecord, ...] = ()
    source: InputRecord | None = None
    mask: InputRecord | None = None
    strength: float | None = None
    batch_size: Annotated[int, Field(ge=1)] = 1
    pipeline: PipelineRecord

    def text_chunks(self) -> dict[str, str]:
        """The text chunks of a PNG file by their keys: all of it as JSON, and the main settings for people. Programs
        that write images themselves may add them to `image.info`."""
        return {CHUNK: self.model_dump_json(exclude_none=True), READABLE_CHUNK: self.describe()}

    def describe_sampling(self) -> str:
        """`40 steps of euler, guidance 4, 64x64`."""
        guidance = f"guidance {self._guidance()}, {self.width}x{self.height}"
        return f"{self._steps()} steps of {self.pipeline.solver}, {guidance}"

    def describe(self) -> str:
        """The main settings as text, in the layout that other programs for image generation use."""
        pipeline = self.pipeline
        settings = {
            "Steps": self._steps(),
            "Sampler": pipeline.solver,
            "CFG scale": self._guidance(),
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": pipeline.hashes["model"][:10],
            "Model": pipeline.model,
        }
        if self.strength is not None:
            settings["Denoising strength"] = f"{self.strength:g}"
        adapters = [f"{adapter.name}:{format_weights(adapter.weights)}" for adapter in pipeline.adapters]
        if adapters or pipeline.fused:
            settings["Adapters"] = " ".join([*pipeline.fused, *adapters])
        settings["Version"] = f"latte_flow_hf {pipeline.versions['latte_flow_hf']}"
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])

    def _steps(self) -> str:
        return str(self.num_inference_steps) if self.steps_per_expert is None else _per_expert(self.steps_per_expert)

    def _guidance(self) -> str:
        return format_weights(
            self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)
        )


def _per_expert(values: Sequence[float]) -> str:
    return "+".join(f"{value:g}" for value in values)


def format_weights(weights: Sequence[float]) -> str:
    """`0.8` if the weight of an adapter is the same in all experts, else `0+0.5+1+1`."""
    return _per_expert(weights[:1] if len(set(weights)) == 1 else weights)


def record_pipeline(
    pipe: Any, adapter_names: Mapping[str, str] | None = None, fingerprint: Mapping[str, str] | None = None
) -> PipelineRecord:
    """Record what the images of a pipeline depend on. This hashes the weights: do it once for many images, and again
    after adapters were loaded or activated.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline, with an autoencoder and a processor.
        adapter_names (`dict[str, str]`, *optional*): what to call loaded adapters; by default as the pipeline does.
        fingerprint (`dict[str, str]`, *optional*): its `pipeline_fingerprint`, if that is known already.
    """
    model = pipe.model
    hashes = dict(fingerprint) if fingerprint is not None else {}
    wrapped = [module for _, module in adapter_modules(model)]
    if not hashes or wrapped:
        hashes = pipeline_fingerprint(pipe, hash_model=hash_without_adapters)
    names = adapter_names or {}
    is_disabled = any(module.disable_adapters for module in wrapped)
    active = {} if is_disabled else model.adapter_weights
    return PipelineRecord(
        model=_name_of(pipe),
        hashes=hashes,
        scheduler=type(pipe.scheduler).__name__,
        solver=str(pipe.scheduler.config.get("solver", type(pipe.scheduler).__name__)),
        adapters=tuple(
            AdapterRecord(
                name=names.get(name, name),
                weights=tuple(weights),
                sha256=hash_adapter(model, name),
            )
            for name, weights in active.items()
            if name not in pipe.fused_loras
        ),
        fused=tuple(sorted(names.get(name, name) for name in pipe.fused_loras)),
        dtype=str(model.dtype).removeprefix("torch."),
        device=pipe._execution_device.type,
        versions={name: version_of(name).partition("+")[0] for name in PACKAGES},
    )


def _name_of(pipe: Any) -> str:
    name = str(pipe.config.get("_name_or_path") or "unnamed")
    return Path(name).name if Path(name).exists() else name


def record_call(
    pipe: Any,
    record: PipelineRecord,
    prompt: str,
    seed: int,
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    steps_per_expert: Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_interval: Sequence[float] | None = None,
    height: int | None = None,
    width: int | None = None,
    images: Sequence[Any] = (),
    source: Any = None,
    mask: Any = None,
    strength: float | None = None,
    batch_size: int = 1,
) -> ImageMetadata:
    """Record a call of a pipeline, with the values of the pipeline in place of `None`.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        record ([`PipelineRecord`]): of this pipeline, see [`record_pipeline`].
        prompt (`str`): the prompt of the image.
        seed (`int`): of its generator, which must be on the CPU.
        negative_prompt, num_inference_steps, steps_per_expert, guidance_scale, guidance_interval, height, width: as in
            the call.
        images: what the model saw with the prompt, from any source that [`load_rgb_image`] reads.
        source, mask, strength: `image`, `mask_image` and `strength` of image-to-image and inpainting.
        batch_size (`int`, defaults to 1): the number of images of the call.

    Raises:
        `ValueError`: if a value is of the wrong type, or an image cannot be read.
    """
    sampling = pipe.model.sampling
    # Without the guidance of the call, of which the pipeline itself may warn.
    num_inference_steps, steps, _ = pipe._sampling_arguments(
        sampling, num_inference_steps, None if steps_per_expert is None else list(steps_per_expert), None, False
    )
    if guidance_scale is None:
        guidance_scale = sampling.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
    if source is not None and strength is None:
        strength = default_strength(sum(steps) if steps is not None else num_inference_steps, sampling)
    return ImageMetadata(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        num_inference_steps=num_inference_steps if steps is None else None,
        steps_per_expert=None if steps is None else tuple(steps),
        guidance_scale=tuple(guidance_scale) if isinstance(guidance_scale, Sequence) else guidance_scale,
        guidance_interval=None if guidance_interval is None else tuple(guidance_interval),  # type: ignore[arg-type]
        height=pipe.default_size if height is None else height,
        width=pipe.default_size if width is None else width,
        images=tuple(map(record_input, images)),
        source=None if source is None else record_input(source),
        mask=None if mask is None else record_input(mask),
        strength=strength,
        batch_size=batch_size,
        pipeline=record,
    )


def record_input(image: Any) -> InputRecord:
    """Record an image that a call is given, from any source that [`load_rgb_image`] reads."""
    pixels = load_rgb_image(image)
    digest = hashlib.sha256(f"{pixels.width}x{pixels.height}".encode() + pixels.tobytes())
    is_path = isinstance(image, (str, Path)) and Path(str(image)[:1024]).is_file()
    return InputRecord(name=Path(image).name if is_path else "", sha256=digest.hexdigest())


def write_metadata(image: Image.Image, metadata: ImageMetadata, target: str | Path | BinaryIO) -> None:
    """Write an image as a PNG file that says how to make it again.

    Args:
        image (`PIL.Image.Image`): the image; it is not changed.
        metadata ([`ImageMetadata`]): see [`record_call`].
        target (`str`, `Path` or binary file): a path that ends in `.png`, where the file appears whole or not at all;
            or an open file.

    Raises:
        `ValueError`: if the path is of another format, in which PNG's text chunks cannot be stored.
        `OSError`: if it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    for key, text in metadata.text_chunks().items():
        info.add_text(key, text)
    if not isinstance(target, (str, Path)):
        image.save(target, format="PNG", pnginfo=info)
        return
    if Path(target).suffix.lower() != ".png":
        raise ValueError(f"only PNG files hold metadata: target must end in .png, got {str(target)!r}.")
    with atomic_write(target) as partial:
        image.save(partial, format="PNG", pnginfo=info)


def read_metadata(image: str | Path | BinaryIO | Image.Image) -> ImageMetadata:
    """Read how an image was made.

    Args:
        image (`str`, `Path`, binary file or `PIL.Image.Image`): a PNG file, or an image that was opened from one.

    Raises:
        `ValueError`: if there is no metadata, or it was changed or is of a version that this one does not know.
        `OSError`: if it is no image.
    """
    if not isinstance(image, Image.Image):
        name = f"image {str(image)!r}" if isinstance(image, (str, Path)) else "the image"
        try:
            with Image.open(image) as opened:
                text = opened.info.get(CHUNK)
        except ValueError as error:
            # PIL refuses text that is too long.
            raise ValueError(f"{name} has metadata that cannot be read: {error}.") from error
    else:
        name, text = "the image", image.info.get(CHUNK)
    if not isinstance(text, str):
        raise ValueError(
            f"{name} has no metadata of latte_flow_hf. PNG files of `latte-flow generate` have it, unless another "
            "program has saved them again."
        )
    try:
        return ImageMetadata.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(
            f"{name} has metadata that this version (latte_flow_hf {version_of('latte_flow_hf')}) cannot read: "
            f"{where}: {first['msg']}."
        ) from error
