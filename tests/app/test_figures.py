# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Figures show the numbers that they are given."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from latte_flow_hf.app import figures
from latte_flow_hf.app.shelf import Adapter
from latte_flow_hf.app.trace import ExpertReport


BOUNDARIES = [1.0, 0.75, 0.0]
GATES = torch.tensor([[[0.5, -0.25]], [[0.1, 0.0]]])  # 2 steps, 1 layer, 2 heads


def report(expert: int, sigmas: list[float], gates=None, **changes) -> ExpertReport:
    fields = {
        "high": BOUNDARIES[expert],
        "low": BOUNDARIES[expert + 1],
        "layers": range(2 * expert, 2 * expert + 2),
        "seconds": 0.5,
        "is_guided": True,
        "estimate": torch.zeros(1),
        "moved": 1.0,
        "changed": 0.25,
        "gate_layers": [2 * expert + 1],
        **changes,
    }
    return ExpertReport(expert=expert, sigmas=sigmas, gates=gates, **fields)


REPORTS = [report(0, [1.0, 0.875], GATES), report(1, [0.75, 0.5], -GATES, moved=2.0, seconds=1.0)]


def rectangles(text: str) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in re.findall(r'([\w-]+)="([\d.]+)"', rectangle)}
        for rectangle in re.findall(r"<rect ([^>]*)>", text)
    ]


def test_the_running_expert_is_highlighted():
    text = figures.time_axis(BOUNDARIES, [1.0, 0.9], running=1, sigma=0.7, caption="<b>")
    segments = re.findall(r'<div class="lf-segment([^"]*)" style="flex:([\d.]+)', text)
    assert [(name.strip(), float(width)) for name, width in segments] == [("", 0.25), ("lf-running", 0.75)]
    assert re.findall(r'<i style="left:([\d.]+)%', text) == ["0.00", "10.00"]
    assert re.findall(r'<b style="left:([\d.]+)%', text) == ["30.00"]
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert "lf-running" not in figures.time_axis(BOUNDARIES)


def test_bars_are_relative_to_the_largest():
    widths = re.findall(r"width:([\d.]+)%", figures.movement(REPORTS))
    assert widths == ["50.00", "100.00", "100.00", "100.00"]
    assert ">2.000<" in figures.movement(REPORTS)


def test_the_curve_has_a_bar_for_each_change():
    bars = rectangles(figures.estimate_curve([1.0, 0.875, 0.75], [0.2, 0.4], [0, 0, 1], BOUNDARIES))
    assert [bar["x"] for bar in bars] == [12.5, 25.0]
    assert bars[1]["height"] == pytest.approx(2 * bars[0]["height"])


def test_gates_are_cells_on_the_time_axis():
    text = figures.gate_map(REPORTS, BOUNDARIES)
    cells = rectangles(text)
    assert len(cells) == 8
    # Sigma 1, 0.875, 0.75 and 0.5, each up to the next one, the last one up to 0; two heads.
    assert [(cell["x"], cell["width"]) for cell in cells[::2]] == [(0, 12.5), (12.5, 12.5), (25, 25), (50, 50)]
    assert {cell["y"] for cell in cells} == {0.0, 50.0}
    assert [cell["fill-opacity"] for cell in cells[:4]] == [1.0, 0.5, 0.2, 0.0]
    titles = re.findall(r"<title>(.*?)</title>", text)
    assert titles[0] == "Expert 0, layer 1, head 0, sigma 1.000: gate +0.5000"
    assert titles[5] == "Expert 1, layer 3, head 1, sigma 0.750: gate +0.2500"
    assert f'fill="{figures.NEGATIVE}"' in text and "from -0.500 to 0.500" in text
    assert "no gates" in figures.gate_map([report(0, [1.0])], BOUNDARIES)


def test_experts_with_fewer_layers_leave_rows_empty():
    two_layers = GATES.repeat(1, 2, 1)
    reports = [report(0, [1.0, 0.875], two_layers, gate_layers=[1, 2]), report(1, [0.75, 0.5], GATES, gate_layers=[4])]
    cells = rectangles(figures.gate_map(reports, BOUNDARIES))
    assert len(cells) == 8 + 4 and {cell["height"] for cell in cells} == {25.0}
    assert {cell["y"] for cell in cells if cell["x"] >= 25} == {0.0, 25.0}


def test_parts_of_the_time():
    text = figures.time_parts(0.25, REPORTS, 0.25)
    assert [float(value) for value in re.findall(r"flex:([\d.]+)", text)] == [0.125, 0.25, 0.5, 0.125]
    assert re.findall(r"<output>([\d,]+ ms)", text) == ["250 ms", "500 ms", "1,000 ms", "250 ms"]


def test_change_maps():
    before = Image.new("RGB", (2, 1), (10, 10, 10))
    after = Image.fromarray(np.array([[[10, 10, 10], [40, 100, 10]]], dtype=np.uint8))
    assert figures.pixel_difference(before, after).tolist() == [[0.0, 40.0]]
    half, full = (figures.change_map(before, after, largest, "#2f74d0") for largest in (80.0, 40.0))
    assert half.getpixel((0, 0)) == (0, 0, 0) and half.getpixel((1, 0)) == (0x2F, 0x74, 0xD0)
    assert full.getpixel((1, 0)) == (255, 255, 255)


def test_texts_of_visitors_are_text():
    for text in (figures.alert("<script>"), figures.note("<script>")):
        assert "<script>" not in text and "&lt;script&gt;" in text
    assert '"x" onload' not in figures.picture(Image.new("RGB", (1, 1)), '"x" onload')
    adapter = Adapter("<img>", "", "LORA", (1,), False, 1234, "0" * 64, "4 steps")
    cards = figures.adapter_cards([adapter], {"<img>": (0.0, 0.5)}, 2)
    assert "<img>" not in cards and "1,234" in cards and "<b>0.5</b>" in cards
    assert cards.count("lf-touched") == 1
