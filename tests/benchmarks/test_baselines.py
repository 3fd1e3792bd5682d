"""The networks of the speed benchmark have their published sizes."""

import pytest

from benchmarks.scenarios import named_parameters
from benchmarks.suite import make_scenario


@pytest.mark.parametrize(
    ("kind", "part", "millions"),
    [
        # Qwen2-VL-2B: 28 layers of 46.8 M, each with a modulation of 9.4 M beside it, and embeddings of 233 M.
        ("latte_flow", "model", 28 * (46.8 + 56.3) + 233),
        # DiT-XL/2 has 675 M; diffusers gives each of the 28 layers an embedder of label and timestep (2.78 M).
        ("dit", "transformer", 675 + 27 * 2.78),
        ("sana", "transformer", 592),
        ("sana_sprint", "transformer", 592),
        # 26 layers of 77.9 M, and embeddings of 590 M.
        ("sana", "text_encoder", 26 * 77.9 + 590),
        # 24 layers of 51.4 M, embeddings of 210 M, heads and VQ autoencoder of about 110 M.
        ("janus", "model", 24 * 51.4 + 210 + 125),
    ],
)
def test_published_sizes(kind, part, millions):
    networks = make_scenario(kind, {"kind": kind}).build_networks()
    parameters = [parameter for *_, parameter in named_parameters({part: networks[part]})]
    assert all(parameter.is_meta for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) / 1e6 == pytest.approx(millions, rel=0.02)
