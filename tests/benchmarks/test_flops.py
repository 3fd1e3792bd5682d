"""Operations counted on the meta device are those of a call that runs."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel

from benchmarks import flops
from benchmarks.scenarios import materialize
from benchmarks.suite import Suite, make_scenario
from benchmarks.workers import count_flops


TINY = Path(__file__).parents[2] / "benchmarks" / "suites" / "speed_tiny.yaml"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("latte-k2", {"num_steps": 4, "guidance_scale": 1}),
        ("latte-k2", {"num_steps": 5}),
        ("sana", {"num_steps": 3}),
        ("sana-sprint", {"num_steps": 2}),
    ],
)
def test_a_call_that_runs_has_the_same_operations(name, changes):
    content = {**Suite(**yaml.safe_load(TINY.read_text())).scenarios[name], **changes}
    scenario = make_scenario(name, content)
    networks = scenario.build_networks()
    materialize(networks, {}, "cpu", torch.float32)
    with torch.no_grad():
        run = count_flops(scenario.prepare(networks), scenario.num_steps)
    counted = flops.count_scenario(scenario)
    assert (counted.text, counted.loop, counted.decode) == (run["prefill"], sum(run["steps"]), run["decode"])
    assert counted.image == counted.text + counted.loop + counted.decode > 0


@pytest.mark.parametrize(
    ("count", "model_class", "num_tokens"),
    [
        # A half of each double layer is for the image, the other for the prompt.
        (
            flops.count_flux_schnell,
            FluxTransformer2DModel,
            {"single_transformer_blocks": 512, "transformer_blocks": 256},
        ),
        # The prompt is padded to 32 tokens.
        (
            flops.count_z_image_turbo,
            ZImageTransformer2DModel,
            {"layers": 288, "noise_refiner": 256, "context_refiner": 32},
        ),
    ],
)
def test_large_models_have_two_operations_for_each_weight_and_token(count, model_class, num_tokens):
    counted = count(256, num_steps=1)
    with torch.device("meta"):
        model = model_class()
    # Modulations are computed once, and not for each token.
    expected = sum(
        2 * num_tokens.get(name.split(".")[0], 0) * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "norm" not in name and "adaLN" not in name
    )
    # The rest is attention, and what surrounds the layers.
    assert 1 < counted.loop / expected < 1.06
    assert counted.text > 0 and counted.decode > 0


def test_sizes_that_do_not_fit_end_in_one_line(capsys):
    with pytest.raises(SystemExit, match="1"):
        flops.main(["--sizes", "250"])
    assert capsys.readouterr().err == "Error: sizes must be positive multiples of 32, got 250.\n"
