# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""What an operator decides: the name of the model, who may use the server, and how much a request may ask for."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ServerSettings:
    """
    Args:
        model_name (`str`, defaults to `"latte-flow"`): the name by which requests ask for the model.
        api_keys (`tuple[str, ...]`): keys of which a request must have one; none are needed if it is empty.
        max_size (`int`, *optional*): the largest height or width of an image in pixels; defaults to twice that of the
            model's default.
        max_steps (`int`, defaults to 200): the largest number of steps.
        max_images_per_request (`int`, defaults to 10): the largest `n`. (Chosen: as OpenAI.)
        max_prompt_length (`int`, defaults to 4000): characters of a prompt, and of the texts of a conversation.
        max_new_tokens (`int`, defaults to 1024): the longest answer.
        max_messages (`int`, defaults to 64): messages in a conversation.
        max_input_images (`int`, defaults to 8): images in a conversation.
        max_input_pixels (`int`, defaults to 16 * 2**20): pixels of such an image, which is looked up before it is
            decoded.
        max_body_size (`int`, defaults to 32 * 2**20): bytes of a request.
        gives_urls (`bool`, defaults to `True`): whether images may be asked for as URLs, which only the process that
            generated them can answer.
        url_hosts (`tuple[str, ...]`): hosts from which images may be fetched. With none, images come as `data:` URLs
            only.
    """

    model_name: str = "latte-flow"
    api_keys: tuple[str, ...] = ()
    max_size: int | None = None
    max_steps: int = 200
    max_images_per_request: int = 10
    max_prompt_length: int = 4000
    max_new_tokens: int = 1024
    max_messages: int = 64
    max_input_images: int = 8
    max_input_pixels: int = 16 * 2**20
    max_body_size: int = 32 * 2**20
    gives_urls: bool = True
    url_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.model_name or ":" in self.model_name:
            raise ValueError(f"model_name must not be empty or contain a colon, got {self.model_name!r}.")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise ValueError("api_keys must be printable ASCII without spaces around it, and not empty.")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")
