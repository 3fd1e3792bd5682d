# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The processor of Pixtral and Mistral 3 where torchvision is missing.

transformers' own class works without it, but not its module: it imports, for a function that is not used here, the
file of the torchvision image processor.
"""

from typing import Any

from transformers import ProcessorMixin


class PixtralProcessor(ProcessorMixin):
    """Same as transformers' `PixtralProcessor`: arguments, tokens and inputs.

    Args:
        image_processor, tokenizer, chat_template: the parts.
        patch_size (`int`, defaults to 16): side of a patch, in pixels.
        spatial_merge_size (`int`, defaults to 1): side of the square of patches that one token holds.
        image_token, image_break_token, image_end_token (`str`): for a patch, and after each row and the last one.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template=None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token, self.image_token_id = image_token, tokenizer.convert_tokens_to_ids(image_token)
        self.image_break_token, self.image_end_token = image_break_token, image_end_token

    @property
    def image_token_ids(self) -> list[int]:
        tokens = [self.image_token, self.image_break_token, self.image_end_token]
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_sizes"]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        return super()._process_images(images, **{**kwargs, "patch_size": self.patch_size * self.spatial_merge_size})

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        side = self.patch_size * self.spatial_merge_size
        height, width = (int(size) // side for size in image_inputs["image_sizes"][image_idx])
        row = self.image_token * width
        return self.image_break_token.join([row] * height) + self.image_end_token
