# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Load, LoRA, generate and chat as nodes of ComfyUI.

ComfyUI keeps the output of a node as long as its inputs are the same, and gives it to all nodes that are connected to
it. The value between the nodes is therefore never changed: it says which pipeline and which adapters, and the adapters
are activated for each run.
"""

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from latte_flow_hf import LatteFlowImg2ImgPipeline, LatteFlowInpaintPipeline, LatteFlowPipeline, tiny_checkpoint


# The end of the range of ComfyUI's own seeds.
MAX_SEED = 2**64 - 1
# Of one pipeline, the adapters belong to one run at a time.
_lock = threading.Lock()


@dataclass(frozen=True)
class LatteFlowModel:
    """A pipeline, and the adapters to use: their paths, and a weight or one for each expert."""

    pipe: LatteFlowPipeline
    loras: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def activate(self) -> None:
        """Make these adapters the active ones; they are loaded when they are first used.

        Raises:
            `ValueError` or `OSError`: if one cannot be loaded or used.
        """
        weights: dict[str, Any] = {}
        loaded = self.pipe.__dict__.setdefault("_comfyui_adapters", {})
        for path, values in self.loras:
            if path not in loaded:
                name = f"comfyui_{len(loaded)}"
                self.pipe.load_lora_weights(path, adapter_name=name)
                loaded[path] = name
            weights[loaded[path]] = list(values) if len(values) > 1 else values[0]
        if loaded:
            self.pipe.set_adapters([*weights], [*weights.values()])


class LatteFlowLoad:
    """Loads a pipeline."""

    CATEGORY = "LaTtE-Flow"
    RETURN_TYPES = ("LATTE_FLOW",)
    RETURN_NAMES = ("latte_flow",)
    FUNCTION = "load"
    DESCRIPTION = "Loads a LaTtE-Flow pipeline from a folder or the hub, or the embedded checkpoint."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "checkpoint": (
                    "STRING",
                    {"default": "tinyworld", "tooltip": "Folder or hub id; tinyworld is the embedded checkpoint."},
                ),
                "dtype": (["float32", "bfloat16", "float16"], {"default": "float32"}),
                "device": (
                    "STRING",
                    {"default": "auto", "tooltip": "cpu, cuda, cuda:1, mps; auto is the accelerator if there is one."},
                ),
            }
        }

    def load(self, checkpoint: str, dtype: str, device: str) -> tuple[LatteFlowModel]:
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else accelerator.type
        source = tiny_checkpoint() if checkpoint == "tinyworld" else checkpoint
        pipe = LatteFlowPipeline.from_pretrained(source, dtype=getattr(torch, dtype)).to(device)
        pipe.set_progress_bar_config(disable=True)
        return (LatteFlowModel(pipe),)


class LatteFlowLoRA:
    """Adds an adapter."""

    CATEGORY = "LaTtE-Flow"
    RETURN_TYPES = ("LATTE_FLOW",)
    RETURN_NAMES = ("latte_flow",)
    FUNCTION = "add"
    DESCRIPTION = "Adds a PEFT adapter, with one weight or one for each expert."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latte_flow": ("LATTE_FLOW",),
                "path": ("STRING", {"default": "", "tooltip": "PEFT folder, file or hub id."}),
                "weights": (
                    "STRING",
                    {
                        "default": "1.0",
                        "tooltip": "Factor of the adapter's effect, or one for each expert with commas between them: "
                        "0, 0, 0.5, 1 leaves the first two of four experts as they are.",
                    },
                ),
            }
        }

    def add(self, latte_flow: LatteFlowModel, path: str, weights: str) -> tuple[LatteFlowModel]:
        num_experts = latte_flow.pipe.model.config.num_experts
        try:
            values = tuple(float(value) for value in weights.split(","))
        except ValueError:
            values = ()
        if len(values) not in (1, num_experts):
            raise ValueError(
                f"weights must be one number, or one for each of {num_experts} experts with commas between them, got "
                f"{weights!r}."
            )
        if any(path == other for other, _ in latte_flow.loras):
            raise ValueError(f"the adapter {path!r} is added twice; add up the weights instead.")
        if not path:
            raise ValueError("path is empty; give a PEFT folder, file or hub id.")
        model = replace(latte_flow, loras=(*latte_flow.loras, (path, values)))
        with _lock:
            # What is wrong with it shows at this node, not at the next.
            model.activate()
        return (model,)


class LatteFlowGenerate:
    """Generates images."""

    CATEGORY = "LaTtE-Flow"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"
    DESCRIPTION = "Generates images of a prompt, from noise or from an image, or within a mask."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 0, "min": 0, "max": 16384, "tooltip": "In pixels; 0 is the model's own."}
        return {
            "required": {
                "latte_flow": ("LATTE_FLOW",),
                "prompt": ("STRING", {"multiline": True, "default": "a red circle"}),
                "negative_prompt": ("STRING", {"multiline": True, "default": ""}),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": MAX_SEED,
                        "control_after_generate": True,
                        "tooltip": "Image i of the batch has seed + i, same as `latte-flow generate`.",
                    },
                ),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0 is the model's own, mostly 40."}),
                "guidance": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1, "tooltip": "0 is the model's own."},
                ),
                "width": ("INT", size),
                "height": ("INT", size),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            },
            "optional": {
                "context_image": ("IMAGE", {"tooltip": "Images that the model sees before the prompt."}),
                "source": ("IMAGE", {"tooltip": "Image to start from, instead of noise."}),
                "mask": ("MASK", {"tooltip": "With a source: only white is generated."}),
                "strength": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.05,
                        "tooltip": "With a source: share of the steps to take; 0 is the model's own, mostly 0.8.",
                    },
                ),
            },
        }

    def generate(
        self,
        latte_flow: LatteFlowModel,
        prompt: str,
        negative_prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        batch_size: int,
        context_image: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        strength: float = 0.0,
    ) -> tuple[torch.Tensor]:
        if mask is not None and source is None:
            raise ValueError("mask goes with source; connect one.")
        pipe = latte_flow.pipe
        call: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt or None,
            "num_inference_steps": steps or None,
            "guidance_scale": guidance or None,
            "width": width or None,
            "height": height or None,
            # On the CPU, so that the noise is the same for every device.
            "generator": [torch.Generator().manual_seed((seed + i) % (MAX_SEED + 1)) for i in range(batch_size)],
            "num_images_per_prompt": batch_size,
            "output_type": "pt",
            "callback_on_step_end": _report,
        }
        context = None if context_image is None else _to_images(context_image)
        with _lock:
            latte_flow.activate()
            if source is None:
                images = pipe(image=context, **call).images
            else:
                if len(source) > 1:
                    raise ValueError(f"source must be one image, got a batch of {len(source)}; select one of them.")
                call |= {"image": _to_images(source)[0], "context_image": context, "strength": strength or None}
                if mask is None:
                    images = LatteFlowImg2ImgPipeline.from_pipe(pipe)(**call).images
                else:
                    images = LatteFlowInpaintPipeline.from_pipe(pipe)(
                        mask_image=mask.cpu().clamp(0, 1)[0], **call
                    ).images
        # (batch, channels, height, width) -> (batch, height, width, channels)
        return (images.permute(0, 2, 3, 1).float().cpu().contiguous(),)


class LatteFlowChat:
    """Answers questions."""

    CATEGORY = "LaTtE-Flow"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("answer",)
    FUNCTION = "chat"
    DESCRIPTION = "Answers a question, about images if there are any."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "latte_flow": ("LATTE_FLOW",),
                "question": ("STRING", {"multiline": True, "default": "what is in the picture?"}),
                "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 8192}),
            },
            "optional": {"images": ("IMAGE",)},
        }

    def chat(
        self, latte_flow: LatteFlowModel, question: str, max_new_tokens: int, images: torch.Tensor | None = None
    ) -> tuple[str]:
        with _lock:
            latte_flow.activate()
            shown = None if images is None else _to_images(images)
            return (latte_flow.pipe.chat(question, images=shown, max_new_tokens=max_new_tokens),)


def _to_images(images: torch.Tensor) -> list[torch.Tensor]:
    """ComfyUI's images (batch, height, width, channels), floats from 0 to 1, one by one. Other nodes leave values a
    little outside; ComfyUI clips them when it saves images, and so it is done here."""
    return list(images.detach().float().cpu().clamp(0, 1))


def _report(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    """Move ComfyUI's progress bar, and stop if its user has cancelled."""
    try:
        import comfy.model_management
        import comfy.utils
    except ImportError:  # The nodes also run without ComfyUI.
        return tensors
    comfy.model_management.throw_exception_if_processing_interrupted()
    comfy.utils.ProgressBar(pipe.num_timesteps).update_absolute(step + 1)
    return tensors


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (LatteFlowLoad, LatteFlowLoRA, LatteFlowGenerate, LatteFlowChat)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LatteFlowLoad": "Load LaTtE-Flow",
    "LatteFlowLoRA": "LaTtE-Flow LoRA per expert",
    "LatteFlowGenerate": "LaTtE-Flow Generate",
    "LatteFlowChat": "LaTtE-Flow Chat",
}
