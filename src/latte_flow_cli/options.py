# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Options that several verbs have."""

from typing import Annotated, Literal

import typer


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder or hub id of a pipeline; the embedded checkpoint if left out."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; the accelerator if there is one, if left out.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(
        help="Of all weights. bfloat16 takes half the memory and is faster on a GPU, but slower on most CPUs."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the initial noise.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Number of sampling steps; those of the model, mostly 40, if left out.")
]
Guidance = Annotated[
    float | None,
    typer.Option(help="Scale of classifier-free guidance, 1 is none; that of the model, mostly 4, if left out."),
]
Fast = Annotated[
    bool, typer.Option("--fast", help="With the embedded checkpoint: its adapter for 4 evaluations per image.")
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:WEIGHT]",
        help="Adapter: a PEFT folder, file or hub id, and the weight of its effect, 1 if left out; may be repeated.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="For programs: one JSON object per line on stdout, everything else on stderr.")
]
