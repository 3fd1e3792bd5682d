# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The model cards of checkpoints that this package writes."""

from huggingface_hub import ModelCard, ModelCardData

from .modeling.configuration_latte_flow import LatteFlowConfig
from .version import __version__


_LICENCE = """## Licence

`latte_flow_hf` adds no licence of its own. The backbone's weights keep the backbone's licence, and the autoencoder's
weights keep the autoencoder's: look up both before you publish this."""


def pipeline_card(config: LatteFlowConfig, origin: str) -> bytes:
    """The card of a pipeline's folder.

    Args:
        config ([`LatteFlowConfig`]): the model's configuration.
        origin (`str`): where the weights came from, in a sentence or two.
    """
    text = f"""# A LaTtE-Flow pipeline

{origin} Made by `latte_flow_hf` {__version__}, an open implementation of LaTtE-Flow (arXiv 2506.06952): a frozen
vision-language model ({config.vlm_config.model_type}) that answers, and a tower that generates images with K =
{config.num_experts} timestep experts of {config.describe_layers()} each.

## Use

```python
from latte_flow_hf import LatteFlowPipeline

pipe = LatteFlowPipeline.from_pretrained("path/to/this/folder")
image = pipe("a red circle").images[0]
answer = pipe.chat("what is in the picture?", images=image)
```

```sh
latte-flow generate "a red circle" --model path/to/this/folder
latte-flow chat "what is in the picture?" --image out.png --model path/to/this/folder
```

{_LICENCE}
"""
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=["latte-flow"])
    return _card(data, text)


def backbone_card(name: str, class_name: str) -> bytes:
    """The card of an extracted backbone; `name` is the pipeline's."""
    text = f"""# The backbone of a LaTtE-Flow pipeline

The frozen vision-language model of `{name}`, extracted bit for bit by `latte_flow_hf` {__version__}. This is a stock
transformers checkpoint: `latte_flow_hf` is not needed to use it.

## Use

```python
from transformers import AutoProcessor, {class_name}

model = {class_name}.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```

{_LICENCE}
"""
    return _card(ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text"), text)


def state_dict_card(name: str, config: LatteFlowConfig) -> bytes:
    """The card of a flat state dict; `name` is the pipeline's."""
    text = f"""# A LaTtE-Flow state dict

The weights of `{name}` (K = {config.num_experts}) under the names of a key table, written by `latte_flow_hf`
{__version__}.

## Use

```sh
latte-flow convert from-original FILE TEMPLATE --output FOLDER
```

TEMPLATE is a pipeline folder with the same backbone and autoencoder; make one with `latte-flow convert init`.

{_LICENCE}
"""
    return _card(ModelCardData(tags=["latte-flow"]), text)


def _card(data: ModelCardData, text: str) -> bytes:
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")).encode()
