# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Figures of the page as HTML and SVG, from numbers alone. Lengths are in percent, so that they fit a phone; colours
of text are those of the page, so that they fit a dark one. Every number that is drawn is also readable as text."""

import base64
import html
import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

from .limits import Limits
from .trace import ExpertReport


# Chosen: told apart with the common kinds of colour blindness (after Okabe and Ito), and seen on white and on black.
COLOURS = ("#2f74d0", "#d97a1e", "#1f9a78", "#b84f93", "#7467d8", "#c4504a", "#3d96b8", "#8c8a2e")
POSITIVE, NEGATIVE = "#d97a1e", "#2f74d0"


def expert_colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image, text: str) -> str:
    return f'<img src="{data_url(image)}" alt="{html.escape(text, quote=True)}">'


def alert(message: str) -> str:
    return f'<div class="lf-alert" role="alert">{html.escape(message)}</div>'


def note(message: str) -> str:
    return f'<div class="lf-note" role="status">{html.escape(message)}</div>'


def time_axis(
    boundaries: Sequence[float],
    sigmas: Sequence[float] = (),
    running: int | None = None,
    sigma: float | None = None,
    caption: str = "",
) -> str:
    """The experts from noise to image, with the one that runs highlighted.

    Args:
        boundaries (`list[float]`): the experts' K + 1 boundaries, falling from 1 to 0.
        sigmas (`list[float]`): of the evaluations so far, as dots.
        running (`int`, *optional*): the expert that runs.
        sigma (`float`, *optional*): where it runs.
        caption (`str`): a line below.
    """
    segments = "".join(
        f'<div class="lf-segment{" lf-running" if expert == running else ""}" '
        f'style="flex:{high - low:.6f};--c:{expert_colour(expert)}" '
        f'title="Expert {expert}: sigma {high:g} to {low:g}"><span class="lf-word">Expert </span>{expert}</div>'
        for expert, (high, low) in enumerate(pairwise(boundaries))
    )
    dots = "".join(f'<i style="left:{100 * (1 - s):.2f}%"></i>' for s in sigmas)
    marker = "" if sigma is None else f'<b style="left:{100 * (1 - sigma):.2f}%"></b>'
    label = f"Time axis from noise to image. {caption}"
    return (
        f'<div class="lf-axis{" lf-live" if running is not None else ""}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">'
        f'<div class="lf-ends"><span>noise</span><span>image</span></div>'
        f'<div class="lf-segments">{segments}</div><div class="lf-dots">{dots}{marker}</div></div>'
        f'<div class="lf-caption" role="status">{html.escape(caption)}</div>'
    )


def change_map(before: Image.Image, after: Image.Image, largest: float, colour: str) -> Image.Image:
    """Where two images differ: black at 0, `colour` at half of `largest`, white at `largest`.

    The difference is the mean over the channels of the absolute difference, from 0 to 255.
    """
    difference = pixel_difference(before, after) / max(largest, 1e-9)
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float64)
    low = np.clip(2 * difference, 0, 1)[..., None]
    high = np.clip(2 * difference - 1, 0, 1)[..., None]
    return Image.fromarray(np.round(rgb * low * (1 - high) + 255 * high).astype(np.uint8))


def pixel_difference(before: Image.Image, after: Image.Image) -> np.ndarray:
    """(height, width), from 0 to 255."""
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (before, after))
    return np.abs(first - second).mean(axis=-1)


def estimates(
    reports: Sequence[ExpertReport], noise: Image.Image, pictures: Sequence[Image.Image], result: Image.Image
) -> str:
    """The estimated clean image after each interval, and what each expert changed.

    Args:
        reports (`list[ExpertReport]`): of the experts that ran.
        noise (`PIL.Image.Image`): the initial noise, decoded.
        pictures (`list[PIL.Image.Image]`): the first estimate of the first expert, then one for each report.
        result (`PIL.Image.Image`): the image.
    """
    differences = [pixel_difference(before, after) for before, after in pairwise(pictures)]
    largest = max(float(difference.max()) for difference in differences)
    tiles = [
        f'<figure class="lf-tile">{picture(noise, "The initial noise, decoded")}'
        "<figcaption><strong>Start</strong><span>pure noise</span></figcaption></figure>"
    ]
    for report, before, after, difference in zip(reports, pictures, pictures[1:], differences):
        colour = expert_colour(report.expert)
        changed = change_map(before, after, largest, colour)
        steps = len(report.sigmas)
        tiles.append(
            f'<figure class="lf-tile" style="--c:{colour}">'
            f"{picture(after, f'Estimate of the clean image after expert {report.expert}')}"
            f"{picture(changed, f'Where expert {report.expert} changed the estimate')}"
            f"<figcaption><strong>Expert {report.expert}</strong>"
            f"<span>{steps} step{'s' if steps > 1 else ''}, &sigma; {report.high:g} to {report.low:g}</span>"
            f"<span>changed by {difference.mean():.1f} of 255</span></figcaption></figure>"
        )
    tiles.append(
        f'<figure class="lf-tile">{picture(result, "The finished image")}'
        "<figcaption><strong>Image</strong><span>decoded after the last step</span></figcaption></figure>"
    )
    return f'<div class="lf-tiles">{"".join(tiles)}</div>'


def movement(reports: Sequence[ExpertReport]) -> str:
    """Bars: how far each expert moved the latents, and how far it changed the estimate (root mean squares)."""
    rows = []
    for name, text in (("moved", "moved the noisy image"), ("changed", "changed its estimate")):
        values = [getattr(report, name) for report in reports]
        largest = max(values) or 1.0
        rows.append(f'<div class="lf-bars"><div class="lf-bars-title">{text}</div>')
        rows += [
            f'<div class="lf-bar"><span>Expert {report.expert}</span>'
            f'<div class="lf-track"><div style="width:{100 * value / largest:.2f}%;'
            f'background:{expert_colour(report.expert)}"></div></div><output>{value:.3f}</output></div>'
            for report, value in zip(reports, values)
        ]
        rows.append("</div>")
    return f'<div class="lf-columns">{"".join(rows)}</div>'


def estimate_curve(
    sigmas: Sequence[float], changes: Sequence[float], experts: Sequence[int], boundaries: Sequence[float]
) -> str:
    """How far each evaluation changed the estimate, over the time axis.

    Args:
        sigmas, experts: of the evaluations.
        changes (`list[float]`): one fewer: root mean square of the change from an estimate to the next one.
        boundaries (`list[float]`): of the experts.
    """
    if not changes:
        return ""
    largest = max(changes) or 1.0
    bars = "".join(
        f'<rect x="{100 * (1 - sigma):.3f}" width="{max(100 * (before - sigma) - 0.3, 0.3):.3f}" '
        f'y="{30 - 29 * change / largest:.3f}" height="{29 * change / largest:.3f}" fill="{expert_colour(expert)}">'
        f"<title>Expert {expert}, sigma {sigma:.3f}: {change:.4f}</title></rect>"
        for before, sigma, change, expert in zip(sigmas, sigmas[1:], changes, experts[1:])
    )
    return (
        '<div class="lf-bars-title">change of the estimate at each step '
        f'<span class="lf-quiet">(highest: {largest:.3f})</span></div>'
        f'<svg class="lf-curve" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" '
        f'aria-label="Change of the estimate at each step, highest {largest:.3f}">{bars}</svg>'
        + time_axis(boundaries, sigmas)
    )


def gate_map(reports: Sequence[ExpertReport], boundaries: Sequence[float]) -> str:
    """The gates of the residual attention over time, a row for each head of each layer that has a gate.

    A row shows the first such layer of whichever expert runs, and so on; experts with fewer layers leave rows empty.
    """
    gated = [(report, report.gates) for report in reports if report.gates is not None]
    if not gated:
        return note("This model has no residual attention between the layers of an expert, so there are no gates.")
    num_layers = max(gates.shape[1] for _, gates in gated)
    num_heads = gated[0][1].shape[2]
    largest = max(float(gates.abs().max()) for _, gates in gated) or 1.0
    sigmas = [sigma for report in reports for sigma in report.sigmas]
    ends = dict(zip(sigmas, [*sigmas[1:], 0.0]))
    num_rows = num_layers * num_heads
    row = 100 / num_rows
    cells = []
    for report, gates in gated:
        for sigma, values in zip(report.sigmas, gates.tolist()):
            for position, of_layer in enumerate(values):
                for head, value in enumerate(of_layer):
                    cells.append(
                        f'<rect x="{100 * (1 - sigma):.3f}" width="{100 * (sigma - ends[sigma]):.3f}" '
                        f'y="{(position * num_heads + head) * row:.3f}" height="{row:.3f}" '
                        f'fill="{POSITIVE if value > 0 else NEGATIVE}" fill-opacity="{abs(value) / largest:.3f}">'
                        f"<title>Expert {report.expert}, layer {report.gate_layers[position]}, head {head}, "
                        f"sigma {sigma:.3f}: gate {value:+.4f}</title></rect>"
                    )
    labels = "".join(
        f"<span>{'layer ' + str(position + 2) + ', ' if num_layers > 1 else ''}head {head}</span>"
        for position in range(num_layers)
        for head in range(num_heads)
    )
    height = max(120, min(22 * num_rows, 900))
    return (
        f'<div class="lf-gates" style="--h:{height}px"><div class="lf-gate-labels">{labels}</div>'
        f'<div><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="Gates of the residual '
        f'attention of {num_rows} heads over time, from {-largest:.3f} to {largest:.3f}">{"".join(cells)}</svg></div>'
        f"<div></div><div>{time_axis(boundaries)}</div></div>"
        f'<div class="lf-legend"><span>{-largest:.2f}</span><i></i><span>0</span><i></i><span>+{largest:.2f}</span>'
        "<span>share of the attention map of the layer before that is added</span></div>"
    )


def time_parts(encode: float, reports: Sequence[ExpertReport], decode: float) -> str:
    """Where the time went: reading the prompt, each expert, and the autoencoder. In seconds."""
    parts = [("Read the prompt", encode, "#8a8f98")]
    parts += [(f"Expert {report.expert}", report.seconds, expert_colour(report.expert)) for report in reports]
    parts.append(("Draw the image", decode, "#5b6068"))
    total = sum(seconds for _, seconds, _ in parts) or 1.0
    bar = "".join(
        f'<div style="flex:{seconds / total:.5f};background:{colour}" title="{name}: {seconds:.3f} s"></div>'
        for name, seconds, colour in parts
    )
    rows = "".join(
        f'<li><i style="background:{colour}"></i>{name}<output>{1000 * seconds:,.0f} ms</output></li>'
        for name, seconds, colour in parts
    )
    return f'<div class="lf-times">{bar}</div><ul class="lf-time-list">{rows}</ul>'


def report_table(reports: Sequence[ExpertReport]) -> str:
    """All numbers of the experts."""
    rows = "".join(
        f"<tr><td>{report.expert}</td><td>{report.high:g} to {report.low:g}</td>"
        f"<td>{report.layers[0]} to {report.layers[-1]}</td><td>{len(report.sigmas)}</td>"
        f"<td>{'yes' if report.is_guided else 'no'}</td><td>{report.seconds:.3f}</td><td>{report.moved:.4f}</td>"
        f"<td>{report.changed:.4f}</td>"
        f"<td>{'' if report.gates is None else f'{float(report.gates.mean()):+.4f}'}</td></tr>"
        for report in reports
    )
    heads = ("expert", "sigma", "layers", "steps", "guided", "seconds", "moved", "changed", "mean gate")
    return (
        '<details class="lf-details"><summary>All numbers</summary><div class="lf-scroll" tabindex="0" role="region" '
        'aria-label="Table of all numbers"><table class="lf-table"><thead><tr>'
        f"{''.join(f'<th scope=col>{head}</th>' for head in heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
        "<p>moved: root mean square of the change of the latents over the interval. changed: the same of the "
        "estimated clean latents, from the estimate that the expert before left.</p></details>"
    )


def adapter_cards(adapters: Sequence, chosen: dict[str, tuple[float, ...]], num_experts: int) -> str:
    """The adapters on the shelf, which experts they touch, and with which weights they are used."""
    if not adapters:
        return note("There are no adapters yet. Upload one below, or start the studio with --adapters FOLDER.")
    cards = []
    for adapter in adapters:
        weights = chosen.get(adapter.name)
        cells = []
        for expert in range(num_experts):
            touched = expert in adapter.experts
            weight = "" if weights is None or not touched else f"{weights[expert]:g}"
            state = "touched" if touched else "not touched"
            cells.append(
                f'<div class="lf-cell{" lf-touched" if touched else ""}{" lf-used" if weight else ""}" '
                f'style="--c:{expert_colour(expert)}" title="Expert {expert}: {state}">'
                f"<span>{expert}</span><b>{weight or ('·' if touched else '')}</b></div>"
            )
        about = f"{adapter.method.lower()}, {adapter.num_parameters:,} numbers"
        about += ", also what all experts share" if adapter.shares else ""
        about += f"; {adapter.sampling}" if adapter.sampling else ""
        state = "in use" if weights is not None else ("uploaded by you" if adapter.owner else "")
        cards.append(
            f'<div class="lf-card{" lf-on" if weights is not None else ""}"><div><strong>{html.escape(adapter.name)}'
            f'</strong> <span class="lf-tag">{state}</span><br>'
            f'<span class="lf-quiet">{html.escape(about)}</span></div>'
            f'<div class="lf-cells" role="img" aria-label="Touches experts '
            f'{", ".join(map(str, adapter.experts)) or "none"}">{"".join(cells)}</div></div>'
        )
    return f'<div class="lf-cards">{"".join(cards)}</div>'


def limits_line(limits: Limits) -> str:
    return (
        f"Limits here: {limits.images} images and {limits.steps} steps per request, {limits.size} pixels a side, "
        f"{limits.prompt_length:,} characters, uploads of {limits.upload_bytes / 1e6:g} MB."
    )
