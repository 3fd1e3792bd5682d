# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Draws the figures of the concept pages and of image-to-image: `python docs/figures/make_figures.py`.

What they show is computed with the package: layers and intervals of the experts, the steps of a schedule, points on
the path, by changing one token at a time, which token attends to which, and images of the embedded checkpoint.
"""

# ruff: noqa: RUF001 (Greek letters and symbols in the figures are intended)

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from latte_flow_hf import (
    LatteFlowConfig,
    LatteFlowForConditionalGeneration,
    LatteFlowImg2ImgPipeline,
    LatteFlowInpaintPipeline,
    LatteFlowScheduler,
    tiny_checkpoint,
)
from latte_flow_hf.modeling.flow_matching import interpolate
from latte_flow_hf.modeling.modeling_latte_flow import ZERO_INITIALIZED
from latte_flow_hf.tinyworld.shapes import Scene, SceneObject, draw_scene


FOLDER = Path(__file__).parent
EXPERT_COLOURS = ("#4a5aa8", "#2b93a3", "#dd9a2b", "#cf5537")
INK, SOFT, FAINT, PAPER = "#23262e", "#6b7280", "#d9dce3", "#ffffff"

matplotlib.use("Agg")
plt.rcParams.update(
    {
        "figure.facecolor": PAPER,
        "font.size": 9.5,
        "text.color": INK,
        "svg.fonttype": "path",
        "svg.hashsalt": "latte_flow_hf",
    }
)


def small_model(num_layers: int, num_experts: int) -> LatteFlowForConditionalGeneration:
    """A model of the given depth and a tiny width, with random weights everywhere."""
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    token_ids = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    backbone = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **token_ids))
    for parameter in backbone.model.language_model.layers.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model = LatteFlowForConditionalGeneration.from_vlm(backbone, num_experts=num_experts, latent_channels=3)
    for name, module in model.tower.named_modules():
        if name.endswith(ZERO_INITIALIZED):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model.eval()


def arrow(axes: Axes, start: tuple, end: tuple, colour: str = INK, width: float = 1.2, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, color=colour, lw=width,
            connectionstyle=style, zorder=5,
        )
    )  # fmt: skip


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, **kwargs) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none", mutation_aspect=1,
            **kwargs,
        )
    )  # fmt: skip


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(FOLDER / name, metadata={"Date": None})
    plt.close(figure)


def blank(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A figure with one coordinate system that covers it; one unit is a tenth of an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def draw_experts() -> None:
    """The layers of the backbone, their keys and values, and the layers of the tower, of which one expert runs."""
    config = LatteFlowConfig(vlm_config={"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 28}})
    model = small_model(config.text_config.num_hidden_layers, config.num_experts)
    boundaries, sigma = config.expert_boundaries, 0.6
    running = model.expert_of(1000 * sigma)

    figure, axes = blank(8.0, 4.3)
    left, pitch, gap, width = 11.5, 2.05, 2.6, 1.6

    def x_of(layer: int) -> float:
        return left + pitch * layer + gap * config.expert_of_layer(layer)

    num_layers = config.text_config.num_hidden_layers
    right = x_of(num_layers - 1) + width
    axes.text(left, 40.3, "backbone, frozen: one prefill per prompt", color=INK, weight="bold")
    axes.text(right, 20.4, "generation tower: one expert per step", color=INK, weight="bold", ha="right", va="center")
    for layer in range(num_layers):
        x = x_of(layer)
        box(axes, x, 33.5, width, 5, "#a3a9b5")
        box(axes, x, 27.3, width, 2.4, "#e4e6eb")
        arrow(axes, (x + width / 2, 33.3), (x + width / 2, 30.0), "#a3a9b5", 0.8)
    for layer in range(num_layers - 1):
        axes.plot([x_of(layer) + width, x_of(layer + 1)], [36, 36], color="#a3a9b5", lw=1.6, zorder=0)
    axes.text(5.2, 36, "prompt", ha="center", va="center")
    arrow(axes, (8.4, 36), (left - 0.4, 36))
    axes.text(5.2, 28.5, "KV cache", ha="center", va="center", color=SOFT)

    for expert, colour in enumerate(EXPERT_COLOURS):
        layers = model.expert_layers(expert)
        runs = expert == running
        start, end = x_of(layers[0]), x_of(layers[-1]) + width
        for layer in layers:
            x = x_of(layer)
            box(axes, x, 11.2, width, 5, colour, alpha=1.0 if runs else 0.28)
            if runs:
                axes.add_patch(Rectangle((x, 27.3), width, 2.4, fc=colour, alpha=0.45, ec="none"))
                arrow(axes, (x + width / 2, 27.1), (x + width / 2, 16.5), colour, 0.9)
                if layer != layers[-1]:
                    axes.plot([x + width, x_of(layer + 1)], [13.7, 13.7], color=colour, lw=1.8, zorder=0)
        middle = (start + end) / 2
        high, low = boundaries[expert], boundaries[expert + 1]
        emphasis = {"weight": "bold"} if runs else {}
        axes.text(middle, 8.9, f"expert {expert}", ha="center", va="center", color=colour, **emphasis)
        name = f"layers {layers[0]}–{layers[-1]}"
        axes.text(middle, 6.9, name, ha="center", va="center", color=SOFT, fontsize=8.5)
        owns = f"{high:g} ≥ σ > {low:g}" if low else f"{high:g} ≥ σ ≥ 0"
        axes.text(middle, 4.9, owns, ha="center", va="center", color=SOFT, fontsize=8.5)
        if runs:
            axes.text(start - 1.3, 1.6, f"noisy latents, σ = {sigma:g}", ha="center", va="center")
            axes.plot([start - 1.3, start - 1.3], [3.0, 13.7], color=colour, lw=1.8, solid_joinstyle="round")
            arrow(axes, (start - 1.3, 13.7), (start - 0.1, 13.7), colour, 1.8)
            axes.plot([end, end + 1.3], [13.7, 13.7], color=colour, lw=1.8, zorder=0)
            arrow(axes, (end + 1.3, 13.7), (end + 1.3, 2.9), colour, 1.8)
            axes.text(end + 1.3, 1.6, "velocity", ha="center", va="center")
    axes.text(right, 40.3, f"{num_layers} layers, K = {config.num_experts}", ha="right", color=SOFT)
    save(figure, "experts.svg")


def draw_time_axis() -> None:
    """The path from noise to data, the intervals of the experts, and 40 sampling steps."""
    scheduler = LatteFlowScheduler()
    steps = 40
    scheduler.set_timesteps(steps)
    boundaries = scheduler.config.expert_boundaries
    figure, axes = blank(8.0, 4.1)
    left, right = 13.5, 74.0

    def x_of(sigma: float) -> float:
        return left + (1 - sigma) * (right - left)

    scene = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), "left of")
    image = np.asarray(draw_scene(scene, [(18, 32, 12), (46, 32, 11)]).reduce(2))
    data = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    for sigma in boundaries:
        noisy = interpolate(data, noise, sigma)[0].permute(1, 2, 0)
        x = x_of(sigma)
        axes.imshow(
            ((noisy + 1) / 2).clamp(0, 1).numpy(), extent=(x - 4.2, x + 4.2, 29.4, 37.8), interpolation="none",
            aspect="auto", zorder=2,
        )  # fmt: skip
        axes.plot([x, x], [24.4, 28.6], color=FAINT, lw=1, zorder=0)
    axes.set(xlim=(0, 80), ylim=(0, 41))
    axes.text(x_of(1), 38.7, "noise", ha="center", weight="bold")
    axes.text(x_of(0), 38.7, "data", ha="center", weight="bold")
    axes.text(x_of(0.5), 38.7, "x = (1 − σ) · data + σ · noise", ha="center", color=SOFT)

    for expert, (high, low) in enumerate(pairwise(boundaries)):
        colour = EXPERT_COLOURS[expert]
        axes.add_patch(Rectangle((x_of(high), 20.6), x_of(low) - x_of(high), 3.8, fc=colour, ec=PAPER, lw=1.5))
        middle = (x_of(high) + x_of(low)) / 2
        axes.text(middle, 22.4, f"expert {expert}", ha="center", va="center", color=PAPER, weight="bold")
        own = scheduler.experts.count(expert)
        axes.text(middle, 14.1, f"{own} steps", ha="center", va="center", color=colour)
    axes.text(left - 6, 17.7, f"{steps} steps", ha="right", va="center")
    for sigma, expert in zip(scheduler.sigmas[:-1].tolist(), scheduler.experts):
        colour = EXPERT_COLOURS[expert]
        axes.plot([x_of(sigma)] * 2, [16.2, 19.3], color=colour, lw=2.0, solid_capstyle="round")

    rows = (
        (9.6, "sigma σ", lambda sigma: f"{sigma:g}", INK),
        (6.2, "timestep", lambda sigma: f"{scheduler.config.num_train_timesteps * sigma:g}", INK),
        (2.8, "paper's t", lambda sigma: f"{1 - sigma:g}", SOFT),
    )
    for y, name, value, colour in rows:
        axes.plot([left, right], [y + 1.7, y + 1.7], color=FAINT, lw=1)
        axes.text(left - 6, y, name, ha="right", va="center", color=colour)
        for sigma in boundaries:
            axes.text(x_of(sigma), y, value(sigma), ha="center", va="center", color=colour)
    save(figure, "time_axis.svg")


@torch.no_grad()
def attention_pattern(model: LatteFlowForConditionalGeneration, num_prompt: int, side: int) -> np.ndarray:
    """(T + N, T + N) of bool: whether the output of token i changes when token j does; prompt first, then latents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(10, 10 + num_prompt)[None]
    latents = torch.randn(1, 3, side, side, generator=generator)
    count = num_prompt + side**2
    seen = np.zeros((count, count), dtype=bool)

    def outputs(ids: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Outputs of each token, (T + N, ·), padded with zeros."""
        context = model.encode_context(ids)
        prompt = (
            context.values[-1][0].transpose(0, 1).flatten(1)
        )  # keys and values of the last layer depend on all layers before
        velocity = model.predict_velocity(latents, 900.0, context)[0].flatten(1).T
        missing = prompt.shape[1] - velocity.shape[1]
        return torch.cat([prompt, torch.nn.functional.pad(velocity, (0, missing))])

    before = outputs(ids, latents)
    for token in range(count):
        other_ids, other_latents = ids.clone(), latents.clone()
        if token < num_prompt:
            other_ids[0, token] = 40 + token
        else:
            index = token - num_prompt
            other_latents[0, :, index // side, index % side] += 1.0
        seen[:, token] = (outputs(other_ids, other_latents) != before).any(dim=1).numpy()
    return seen


@torch.no_grad()
def kept_scores(model: LatteFlowForConditionalGeneration, num_prompt: int, side: int) -> list[np.ndarray]:
    """The latent-to-latent scores (N, N) of each layer's first head, its residual included."""
    found: dict[int, np.ndarray] = {}

    def note(index: int) -> Callable:
        return lambda module, args, output: found.update({index: output[1][0, 0].numpy()})

    for index, layer in enumerate(model.tower.layers):
        layer.self_attn.register_forward_hook(note(index))
    context = model.encode_context(torch.arange(10, 10 + num_prompt)[None])
    latents = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    for high, low in pairwise(model.config.expert_boundaries):
        model.predict_velocity(latents, 500.0 * (high + low), context)
    return [found[index] for index in range(len(found))]


def draw_residual_attention() -> None:
    """The attention pattern, and how the latent-to-latent block is passed from layer to layer inside a group."""
    num_prompt, side = 5, 3
    num_latents = side**2
    model = small_model(num_layers=6, num_experts=2)
    seen = attention_pattern(model, num_prompt, side)
    scores = kept_scores(model, num_prompt, side)
    figure, axes = blank(8.0, 6.3)

    # The attention pattern
    cell, left, top = 1.75, 16.0, 57.0
    colours = {(False, False): "#8d94a3", (True, False): "#a9c7dd", (True, True): EXPERT_COLOURS[0]}
    for row, column in np.ndindex(seen.shape):
        kind = colours.get((row >= num_prompt, column >= num_prompt))
        colour = kind if seen[row, column] and kind else "#f1f2f5"
        axes.add_patch(
            Rectangle((left + cell * column, top - cell * (row + 1)), cell, cell, fc=colour, ec=PAPER, lw=0.8)
        )
    prompt_middle, latents_middle = cell * num_prompt / 2, cell * (num_prompt + num_latents / 2)
    axes.text(left + prompt_middle, top + 1.0, "prompt", ha="center", va="bottom")
    axes.text(left + latents_middle, top + 1.0, "latents", ha="center", va="bottom")
    axes.text(left + cell * len(seen) / 2, top + 3.4, "keys", ha="center", va="bottom", color=SOFT)
    axes.text(left - 1.0, top - prompt_middle, "prompt", ha="right", va="center")
    axes.text(left - 1.0, top - latents_middle, "latents", ha="right", va="center")
    axes.text(left - 10.0, top - cell * len(seen) / 2, "queries", rotation=90, va="center", color=SOFT)
    notes = (
        ("#8d94a3", "prompt to prompt: causal, in the frozen backbone"),
        ("#f1f2f5", "none: the prompt does not attend to the latents"),
        ("#a9c7dd", "latents to prompt: all of the KV cache"),
        (EXPERT_COLOURS[0], "latents to latents: bidirectional; this block is passed on"),
    )
    for index, (colour, note) in enumerate(notes):
        y = top - 3.0 - 5.2 * index
        box(axes, 43.5, y - 0.9, 1.8, 1.8, colour)
        first, _, rest = note.partition(": ")
        axes.text(46.4, y, first, va="center", weight="bold")
        axes.text(46.4, y - 2.1, rest, va="center", color=SOFT, fontsize=8.8)

    # What is passed on
    last = 4
    cell, top, pitch = 0.98, 22.5, 19.0
    context_width = 2.6
    for layer in range(last):
        expert = model.config.expert_of_layer(layer)
        colour = EXPERT_COLOURS[3 * expert]
        x, height = 3.0 + pitch * layer + (2.0 if expert else 0.0), cell * num_latents
        axes.add_patch(Rectangle((x, top - height), context_width, height, fc="#a9c7dd", ec="none"))
        block = x + context_width + 0.3
        shades = LinearSegmentedColormap.from_list(f"expert {expert}", ["#eef0f4", colour])
        extent = (block, block + height, top - height, top)
        axes.imshow(scores[layer], cmap=shades, extent=extent, interpolation="none", aspect="auto")
        axes.text(x, top + 1.2, f"layer {layer}", va="bottom", color=colour, weight="bold")
        axes.text(x + context_width / 2, top - height - 1.0, "prompt", ha="center", va="top", fontsize=7.8, color=SOFT)
        middle = block + height / 2
        axes.text(middle, top - height - 1.0, "latents", ha="center", va="top", fontsize=7.8, color=SOFT)
        gated = model.tower.layers[layer].has_residual
        if gated:
            start = (x - pitch + context_width + 0.3 + height / 2, top - height - 3.4)
            arrow(axes, start, (middle, top - height - 3.4), colour, 1.6, bend=0.35)
            axes.text((start[0] + middle) / 2, 4.0, "× gate(t), added", ha="center", va="center", color=colour)
        elif layer:
            border = x - 3.4
            axes.plot([border, border], [6.0, top + 3.4], color=SOFT, lw=1.2, ls=(0, (4, 3)))
            axes.text(border, top + 5.0, "group border: nothing is passed on", ha="center", va="center", color=SOFT)
    axes.set(xlim=(0, 80), ylim=(0, 63))
    save(figure, "residual_attention.svg")


def draw_image_to_image() -> None:
    """An image, and a masked part of it, changed from sigmas between the data and the noise."""
    img2img = LatteFlowImg2ImgPipeline.from_pretrained(tiny_checkpoint())
    inpaint = LatteFlowInpaintPipeline.from_pipe(img2img)
    one = draw_scene(Scene((SceneObject("red", "circle"),)), [(32, 32, 14)])
    two = Scene((SceneObject("red", "circle"), SceneObject("blue", "square")), "left of")
    two_image = draw_scene(two, [(17, 32, 10), (47, 32, 10)])
    rows: list[tuple] = [
        (img2img, "a blue square", one, None),
        (inpaint, "a blue square", one, (8, 8, 56, 56)),
        (inpaint, "a red circle left of a green cross", two_image, (32, 0, 64, 64)),
    ]
    strengths = (0.4, 0.6, 0.8, 0.9, 1.0)
    figure, grid = plt.subplots(
        len(rows), 1 + len(strengths), figsize=(8.0, 4.2), squeeze=False,
        gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.01, "right": 0.99, "top": 0.93, "bottom": 0.01},
    )  # fmt: skip
    for (pipe, prompt, source, box), line in zip(rows, grid):
        pipe.set_progress_bar_config(disable=True)
        masks = {}
        if box is not None:
            masks["mask_image"] = Image.new("L", source.size)
            masks["mask_image"].paste(255, box)
            left, top, right, bottom = box
            line[0].add_patch(
                Rectangle(
                    (left - 0.5, top - 0.5), right - left, bottom - top, fc="none", ec=PAPER, lw=1.2, ls=(0, (3, 2))
                )
            )
        line[0].imshow(source)
        for strength, axes in zip(strengths, line[1:]):
            generator = torch.Generator().manual_seed(0)
            axes.imshow(pipe(prompt, source, strength=strength, generator=generator, **masks).images[0])
    for title, axes in zip(("source", *(f"strength {strength:g}" for strength in strengths)), grid[0]):
        axes.set_title(title, fontsize=9, color=INK)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    figure.savefig(FOLDER / "image-to-image.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw_experts()
    draw_time_axis()
    draw_residual_attention()
    draw_image_to_image()
