"""The nodes for ComfyUI: imported as it imports them, checked against the contract of its nodes, and run."""

import importlib.util
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from latte_flow_cli import app
from latte_flow_hf.checkpoints import few_step_checkpoint


FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
# What values of widgets can be, by the types of ComfyUI.
WIDGETS = {"STRING": str, "INT": int, "FLOAT": float}


@pytest.fixture(scope="module")
def pack():
    """As `load_custom_node` of ComfyUI does it: the name of the module is its path."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for other in [other for other in sys.modules if other.startswith(name)]:
        del sys.modules[other]


@pytest.fixture(scope="module")
def run(pack):
    """Runs a node as ComfyUI does: a new object, inputs by name, defaults of widgets that nobody touched."""

    def run(name, **inputs):
        node = pack.NODE_CLASS_MAPPINGS[name]
        types = node.INPUT_TYPES()
        defaults = {
            key: entry[1]["default"] for key, entry in types["required"].items() if "default" in (*entry, {})[1]
        }
        assert inputs.keys() <= types["required"].keys() | types.get("optional", {}).keys()
        result = getattr(node(), node.FUNCTION)(**{**defaults, **inputs})
        assert isinstance(result, tuple) and len(result) == len(node.RETURN_TYPES)
        return result[0]

    return run


@pytest.fixture(scope="module")
def loaded(run):
    return run("LatteFlowLoad", device="cpu")


def test_the_contract_of_nodes(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    outputs = {type_ for node in pack.NODE_CLASS_MAPPINGS.values() for type_ in node.RETURN_TYPES}
    for node in pack.NODE_CLASS_MAPPINGS.values():
        assert isinstance(node.CATEGORY, str) and isinstance(node.DESCRIPTION, str)
        assert all(isinstance(type_, str) for type_ in node.RETURN_TYPES)
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
        types = node.INPUT_TYPES()
        assert set(types) <= {"required", "optional", "hidden"}
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        entries = {**types["required"], **types.get("optional", {})}
        assert set(entries) == set(parameters) - {"self"}
        for name, (kind, *options) in entries.items():
            assert (parameters[name].default is inspect.Parameter.empty) == (name in types["required"])
            option = options[0] if options else {}
            if isinstance(kind, list):
                assert option["default"] in kind
            elif kind in WIDGETS:
                default = option["default"]
                assert type(default) is WIDGETS[kind]
                if kind != "STRING":
                    assert option["min"] <= default <= option["max"]
            else:
                assert kind in outputs | {"MASK"}


def test_generate_chat_and_the_pixels_of_the_command(run, loaded, tmp_path):
    images = run("LatteFlowGenerate", latte_flow=loaded, prompt="a blue cross", seed=4, steps=8, batch_size=2)
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    (alone,) = run("LatteFlowGenerate", latte_flow=loaded, prompt="a blue cross", seed=5, steps=8)
    assert torch.allclose(images[1], alone, atol=1e-4)
    arguments = ["generate", "a blue cross", "--seed", "5", "--steps", "8", "--device", "cpu"]
    assert CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out.png")]).exit_code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), (alone * 255).round().byte().numpy())
    shown = images[:1] * 1.01 - 0.001
    assert run("LatteFlowChat", latte_flow=loaded, question="what is in the picture?", images=shown) == "a blue cross"


def test_adapters_belong_to_a_branch_and_not_to_the_pipeline(run, loaded):
    def image(model):
        return run("LatteFlowGenerate", latte_flow=model, steps=4, guidance=1.0)

    plain = image(loaded)
    path = few_step_checkpoint()
    full = run("LatteFlowLoRA", latte_flow=loaded, path=path)
    last = run("LatteFlowLoRA", latte_flow=loaded, path=path, weights="0, 0, 0, 0.5")
    images = [image(model) for model in (full, last, loaded, full)]
    assert torch.equal(images[0], images[3]) and torch.equal(images[2], plain)
    assert not torch.equal(images[0], plain) and not torch.equal(images[1], images[0])
    for weights in ("1, 2", "much", ""):
        with pytest.raises(ValueError, match="weights must be one number, or one for each of 4 experts"):
            run("LatteFlowLoRA", latte_flow=loaded, path=path, weights=weights)
    with pytest.raises(ValueError, match="added twice"):
        run("LatteFlowLoRA", latte_flow=full, path=path)
    with pytest.raises(ValueError, match="path is empty"):
        run("LatteFlowLoRA", latte_flow=loaded)
    with pytest.raises(OSError, match="nowhere"):
        run("LatteFlowLoRA", latte_flow=loaded, path="nowhere")
    assert torch.equal(image(loaded), plain)


def test_images_from_images_and_within_masks(run, loaded):
    (source,) = run("LatteFlowGenerate", latte_flow=loaded, prompt="a red circle", steps=8)
    inputs = {"latte_flow": loaded, "prompt": "a red square", "steps": 4, "source": source[None]}
    changed = run("LatteFlowGenerate", **inputs, strength=0.5)
    assert changed.shape == (1, 64, 64, 3)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    masked = run("LatteFlowGenerate", **inputs, mask=mask)
    distance = (masked[0] - source).abs()
    assert distance[:, 40:].mean() < distance[:, :24].mean() and distance[:, 48:].max() < 0.1
    with pytest.raises(ValueError, match="connect one"):
        run("LatteFlowGenerate", latte_flow=loaded, mask=mask)
    with pytest.raises(ValueError, match="source must be one image, got a batch of 2"):
        run("LatteFlowGenerate", **{**inputs, "source": source[None].repeat(2, 1, 1, 1)})
    seen = run("LatteFlowGenerate", latte_flow=loaded, steps=4, context_image=source[None])
    assert not torch.equal(seen, run("LatteFlowGenerate", latte_flow=loaded, steps=4))
