# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The bodies of requests, with OpenAI's names, and some of our own.

Fields of OpenAI that have no meaning here are accepted if they ask for nothing that is not done: `quality="high"`, but
not `background="transparent"`. Unknown fields are refused, as OpenAI does. Limits that depend on the server are
checked in [`server`].
"""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field


# Exact in JSON, whose numbers are often read as doubles.
MAX_SEED = 2**53 - 1000


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="The model, or `model:adapter`; the model if left out.")
    # Without a meaning here.
    user: str | None = None
    safety_identifier: str | None = None


class ImageBody(Body):
    """What generations and edits have in common."""

    prompt: str = Field(min_length=1)
    n: int | None = Field(1, ge=1, description="The number of images; image i has the seed `seed` + i.")
    size: str | None = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="`WIDTHxHEIGHT`.")
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="The quality of webp and jpeg, 0 to 100.")
    stream: bool | None = False
    partial_images: int | None = Field(None, ge=0, le=3, description="How often a streamed image is shown before.")
    # Ours.
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="A random one if left out; the response has it.")
    steps: int | None = Field(None, ge=1)
    negative_prompt: str | None = None
    # Without a meaning here.
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None


class ImageGenerationBody(ImageBody):
    guidance: Annotated[float, Field(ge=0, le=50)] | list[Annotated[float, Field(ge=0, le=50)]] | None = Field(
        None, description="The guidance scale, or one for each expert; up to 1, there is none."
    )
    # Without a meaning here.
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None


class ImageEditForm(ImageBody):
    # All fields of a form are texts.
    model_config = ConfigDict(strict=False)

    image: UploadFile = Field(description="The image to start from.")
    mask: UploadFile | None = Field(None, description="A PNG as large as the image; what is transparent is generated.")
    strength: float | None = Field(
        None, gt=0, le=1, description="The share of the steps to take; 1 keeps nothing of what is generated anew."
    )
    guidance: float | None = Field(None, ge=0, le=50, description="The guidance scale; up to 1, there is none.")
    # Without a meaning here.
    input_fidelity: Literal["high", "low"] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None
    # What clients send back of an answer.
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="0, the default here, takes the most probable token."
    )
    top_p: float | None = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: str | Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Accepted as long as they ask for nothing.
    n: Literal[1] | None = 1
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    tools: list[Any] | None = Field(None, max_length=0)
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
