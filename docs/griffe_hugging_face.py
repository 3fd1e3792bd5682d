# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Converts docstrings in the Hugging Face format to Google's format, which mkdocstrings can parse.

Three things differ: types are written as "(`int`, defaults to 4)", which repeats the signature; "height, width:"
describes two arguments; and classes are linked as "[`LatteFlowConfig`]".
"""

import re
from typing import Any

import griffe


MODULES = {
    "LatteFlowConfig": "latte_flow_hf.modeling.configuration_latte_flow",
    "LatteFlowContext": "latte_flow_hf.modeling.context",
    "LatteFlowForConditionalGeneration": "latte_flow_hf.modeling.modeling_latte_flow",
    "LatteFlowLayout": "latte_flow_hf.modeling.modeling_latte_flow",
    "LatteFlowModulation": "latte_flow_hf.modeling.modeling_latte_flow",
    "LatteFlowPipelineOutput": "latte_flow_hf.pipelines.pipeline_output",
    "LatteFlowProcessor": "latte_flow_hf.modeling.processing_latte_flow",
    "LatteFlowSchedulerOutput": "latte_flow_hf.schedulers.scheduling_latte_flow",
}

_LINK = re.compile(r"\[`~?(\w+)([\w.]*)`\](?![\[(])")
# "name (`type`, *optional*):", "name (*optional*):", "name ([`Class`]):"; the signature has the type.
_ARGUMENT = re.compile(r"^(\s+[\w, ]+?) \((?:`|\*|\[`|a list|`[^`]*`,? or)[^:\n]*\):", re.MULTILINE)
_JOINED = re.compile(r"^([ \t]+)((?:\w+, )+\w+):(.*(?:\n\1[ \t]+.*)*)", re.MULTILINE)
_RAISED = re.compile(r"^(\s+)`(\w+)`:", re.MULTILINE)


def to_google(text: str) -> str:
    """Convert a docstring from the Hugging Face format to Google's."""
    text = _ARGUMENT.sub(r"\1:", text)
    text = _JOINED.sub(lambda found: "\n".join(f"{found[1]}{name}:{found[3]}" for name in found[2].split(", ")), text)
    text = _RAISED.sub(r"\1\2:", text)
    return _LINK.sub(_link, text)


def _link(match: re.Match) -> str:
    name, member = match.groups()
    if name not in MODULES:
        return f"`{name}{member}`"
    return f"[`{name}{member}`][{MODULES[name]}.{name}{member}]"


class HuggingFaceDocstrings(griffe.Extension):
    """Converts every docstring of the package before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_google(obj.docstring.value)
