# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""PEFT is an extra: without it, all but adapters works."""

import subprocess
import sys


SCRIPT = """
import sys
sys.modules["peft"] = None  # Not found by `find_spec`, and not importable.
from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from transformers.utils import is_peft_available
assert not is_peft_available()
folder = sys.argv[1]
pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
pipe.save_pretrained(folder)
assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == [] and pipe.num_fused_loras == 0
pipe.unload_lora_weights()
for act in (
    lambda: pipe.load_lora_weights("style"),
    pipe.fuse_lora,
    pipe.unfuse_lora,
    lambda: pipe.model.load_adapter("style"),
    lambda: pipe.model.add_adapter(None),
):
    try:
        act()
    except ValueError as error:
        assert "needs PEFT, which is not installed: pip install peft" in str(error), error
    else:
        raise AssertionError(act)
print("done")
"""


def test_without_peft_all_but_adapters_works(tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "pipeline")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["done"], result.stderr
