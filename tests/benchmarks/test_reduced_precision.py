# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The benchmark of precision on a random pipeline: the more bits, the smaller the error."""

import pytest

from benchmarks import precision


def test_errors_and_sizes(pipeline, model):
    rows = {name: (error, share) for name, error, share in precision.measure(pipeline)}
    e4m3, e5m2 = (f"layerwise casting of the tower, float8_{kind}" for kind in ("e4m3fn", "e5m2"))
    order = ["float16", "bfloat16", e4m3, e5m2]
    assert [rows[name][0] for name in order] == sorted(rows[name][0] for name in order)
    assert 0 < rows["float16"][0] < 0.01 and 0 < rows["int8 (torchao), tower and backbone"][0] < rows[e5m2][0]
    # Of a random model, a prompt changes little.
    assert rows["another prompt"][0] > rows["bfloat16"][0]
    assert rows["float16"][1] == rows["bfloat16"][1] == 0.5
    projections = [
        weight.numel()
        for name, weight in model.tower.layers.named_parameters()
        if name.split(".")[-2].endswith("_proj")
    ]
    total = sum(weight.numel() for weight in model.tower.parameters())
    assert rows[e4m3][1] == rows[e5m2][1] == pytest.approx(1 - 0.75 * sum(projections) / total)
