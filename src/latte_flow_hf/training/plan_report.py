# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A plan as text for a terminal."""

from .plan import Plan


PARTS = {
    "backbone": "weights: backbone",
    "autoencoder": "weights: autoencoder",
    "tower": "weights: tower",
    "gradients": "gradients",
    "gradient_buckets": "gradients: buckets of data parallelism",
    "optimizer": "optimizer",
    "ema": "averaged weights",
    "half_precision": "weights: copies in half precision",
    "activations": "activations",
    "contexts": "contexts of prompts",
    "work": "for a moment at the peak",
}


def plan_text(plan: Plan, name: str = "recipe") -> str:
    """The tables of a plan, one line a row.

    Args:
        plan ([`Plan`]): the plan.
        name (`str`, defaults to `"recipe"`): of the recipe.
    """
    given, memory = plan.assumptions, plan.memory
    number = given["num_devices"]
    lines = [f"{name} on {number} x {given['device']}, {given['parallelism']}"]
    peaks = {part: f"{peak / 1e12:g}" for part, peak in given["peak_flops"].items()}

    def section(title: str, rows: list[tuple[str, str, str]]) -> None:
        width = max(len(left) for left, _, _ in rows) + 2
        middle = max(len(value) for _, value, _ in rows)
        lines.extend(["", title])
        for left, value, right in rows:
            lines.append(f"  {left:<{width}}{value:>{middle}}  {right}".rstrip())

    section(
        "Assumed",
        [
            ("memory of a device", _bytes(given["memory"]), f"{given['source']}; {given['reserve']:.0%} stay free"),
            ("peak, training", f"{peaks['training']} TFLOP/s", "dense"),
            ("peak, encoding images", f"{peaks['latents']} TFLOP/s", "outside of mixed precision"),
            ("peak, encoding prompts", f"{peaks['contexts']} TFLOP/s", "outside of mixed precision"),
            ("utilisation", f"{given['utilisation']:.0%}", "of the peak"),
            ("bandwidth of memory", _bandwidth(given["bandwidth"]), "all of it"),
            ("bandwidth to the CPU", _bandwidth(given["bus_bandwidth"]), ""),
            ("images", _count(given["num_images"]), f"{given['latent_tokens']} latent tokens each"),
            ("prompts", _count(given["num_prompts"]), f"{given['prompt_tokens']} tokens each"),
            ("optimizer", given["optimizer"], ""),
        ],
    )
    comments = {"active": "of the tower, for an image at one step of sampling"}
    section(
        "Parameters",
        [(part, f"{count / 1e6:,.1f} M", comments.get(part, "")) for part, count in plan.parameters.items()],
    )
    batch = plan.batch
    split = ", ".join(map(str, batch["per_expert"]))
    section(
        "Batch",
        [
            ("images per device", f"{batch['per_device']:,}", f"{split} for experts {_listed(batch['experts'])}"),
            ("passes per step", f"{batch['accumulation']:,}", ""),
            ("images per step", f"{batch['per_step']:,}", ""),
        ],
    )
    rows = [(PARTS[part], _bytes(amount), "") for part, amount in memory.parts.items() if amount]
    verdict = f"at the {memory.peak_moment}; {_bytes(plan.available)} can be used: "
    verdict += "it fits" if plan.fits else "DOES NOT FIT"
    rows.append(("peak", _bytes(memory.peak), verdict))
    if memory.host:
        rows.append(("main memory, per process", _bytes(memory.host), "averaged weights"))
    section("Memory of one device (not all parts exist at the same time)", rows)
    if not plan.fits:
        largest = max(memory.parts, key=lambda part: memory.parts[part])
        lines.extend(["", f"The largest part is {PARTS[largest]}, {_bytes(memory.parts[largest])}."])
        for title, switches in (
            ("Switches, each alone", plan.switches),
            ("One after the other", plan.together),
        ):
            if switches:
                verdicts = ["it fits" if switch.fits else "does not fit" for switch in switches]
                section(title, [(s.setting, _bytes(s.peak), text) for s, text in zip(switches, verdicts)])
        if not any(switch.fits for switch in [*plan.switches, *plan.together]):
            lines.extend(["", "No switch is enough: use a device with more memory, or a smaller backbone."])
    rows = [
        ("step", _flops(plan.flops["step"]), "all devices"),
        ("run", _flops(plan.flops["run"]), f"{plan.steps:,} steps"),
    ]
    rows += [(part, _flops(plan.flops[part]), "once") for part in _once(plan)]
    section("Operations", rows)
    rows = [("training", _hours(plan.hours["training"]), "operations")]
    for part, comment in (("update", "the optimizer reads and writes weights"), ("averages", "copied to the CPU")):
        if plan.hours[part]:
            rows.append((part, _hours(plan.hours[part]), comment))
    rows += [(part, _hours(plan.hours[part]), "once") for part in _once(plan)]
    rows.append(("total", _hours(plan.hours["total"]), f"{plan.device_hours:,.2f} device hours"))
    section("Hours", rows)
    section("Disk", [(part, _bytes(amount), "") for part, amount in plan.disk.items() if amount])
    lines.extend(["", *(f"Note: {note}" for note in plan.notes)])
    return "\n".join(lines)


def _once(plan: Plan) -> list[str]:
    return [part for part in ("latents", "contexts", "trajectories") if plan.flops[part]]


def _listed(experts: list[int]) -> str:
    return ", ".join(map(str, experts))


def _count(number: int | None) -> str:
    return "not given" if number is None else f"{number:,}"


def _bandwidth(amount: float | None) -> str:
    return "not known" if amount is None else f"{amount / 1e9:,.0f} GB/s"


def _bytes(amount: float) -> str:
    return f"{amount / 1e9:,.2f} GB" if amount >= 1e7 else f"{amount / 1e6:,.2f} MB"


def _flops(amount: float) -> str:
    return f"{amount / 1e12:,.4g} TFLOP" if amount < 1e18 else f"{amount / 1e18:,.3f} EFLOP"


def _hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 0.01 else f"{3600 * hours:,.2g} s"
