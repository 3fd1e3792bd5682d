# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The adapters that visitors can choose: those of a folder, and those that a visitor uploads.

An uploaded adapter belongs to its visitor and is deleted with the session. Pickled files are refused, since reading
one can run code.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modeling.adapters import read_sampling_mark
from ..modeling.sampling import describe_sampling
from ..pipelines.fingerprint import hash_adapter
from .limits import Limits


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TOWER_LAYER = re.compile(r"tower\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Adapter:
    """An adapter on the shelf.

    Args:
        name (`str`): what visitors call it.
        owner (`str`): the session that uploaded it; empty if it is for all.
        method (`str`): of PEFT, such as `LORA`.
        experts (`tuple[int, ...]`): whose layers it adapts.
        shares (`bool`): whether it also adapts what all experts share.
        num_parameters (`int`): its size.
        sha256 (`str`): of its weights.
        sampling (`str`): the steps and guidance that it was distilled to; empty if it was not.
    """

    name: str
    owner: str
    method: str
    experts: tuple[int, ...]
    shares: bool
    num_parameters: int
    sha256: str
    sampling: str


class AdapterShelf:
    """The adapters of one pipeline. Everything that touches the model must run in the thread of the queue.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        limits ([`Limits`]): of uploads.
        max_uploads (`int`): uploaded adapters of one visitor.
    """

    def __init__(self, pipe: Any, limits: Limits, max_uploads: int = 4):
        self.pipe, self.limits, self.max_uploads = pipe, limits, max_uploads
        self._adapters: dict[tuple[str, str], Adapter] = {}
        self._active: tuple[tuple[str, tuple[float, ...]], ...] | None = None

    def names(self, session: str = "") -> list[str]:
        return [adapter.name for adapter in self.adapters(session)]

    def adapters(self, session: str = "") -> list[Adapter]:
        """Those of everybody and those of a session."""
        return [adapter for (owner, _), adapter in list(self._adapters.items()) if owner in ("", session)]

    def find(self, name: str, session: str = "") -> Adapter:
        """
        Raises:
            `ValueError`: if this session has no such adapter.
        """
        for owner in ("", session):
            if (owner, name) in self._adapters:
                return self._adapters[owner, name]
        raise ValueError(f"There is no adapter {name!r} here; there are: {', '.join(self.names(session)) or 'none'}.")

    def add_folder(self, folder: str | Path) -> None:
        """Add all adapters in the subfolders of `folder`, or `folder` itself if it is one. Called once, at the start.

        Raises:
            `ValueError`, `OSError`: if there is none, or one of them does not fit the model.
        """
        folder = Path(folder)
        found = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not found:
            raise ValueError(f"adapters must be a folder of PEFT folders (with {CONFIG}), and {folder} has none.")
        for path in found:
            self.add(path.name, path)

    def add(self, name: str, source: Path, session: str = "") -> Adapter:
        """Load an adapter, which is not active yet.

        Raises:
            `ValueError`, `OSError`: if it does not fit the model, or the name is taken.
        """
        if name in self.names(session):
            raise ValueError(f"There already is an adapter {name!r}; rename the file.")
        key = _key(name, session)
        try:
            self.pipe.load_lora_weights(source, adapter_name=key)
        except (KeyError, TypeError, RuntimeError) as error:
            # PEFT raises these for configurations that it does not know.
            raise ValueError(f"its configuration cannot be read: {error}") from error
        self._active = None
        self.activate((), session)
        model = self.pipe.model
        config, state = model.peft_config[key], model.get_adapter_state_dict(key)
        layers = {int(match[1]) for parameter in state if (match := _TOWER_LAYER.search(parameter))}
        experts = [k for k in range(model.config.num_experts) if layers & set(model.expert_layers(k))]
        sampling = read_sampling_mark(getattr(config, "target_modules", None))
        adapter = Adapter(
            name=name,
            owner=session,
            method=str(getattr(config.peft_type, "value", config.peft_type)),
            experts=tuple(experts),
            shares=any(not _TOWER_LAYER.search(parameter) for parameter in state),
            num_parameters=sum(weight.numel() for weight in state.values()),
            sha256=hash_adapter(model, key),
            sampling=describe_sampling(sampling) if sampling else "",
        )
        self._adapters[session, name] = adapter
        return adapter

    def upload(self, paths: list[str], session: str) -> Adapter:
        """Add what a visitor uploaded: a safetensors file, alone or with its `adapter_config.json`.

        Raises:
            `ValueError`: if the files are something else, are too large, or do not fit the model.
        """
        uploaded = [Path(path) for path in paths]
        weights = [path for path in uploaded if path.suffix == ".safetensors"]
        configs = [path for path in uploaded if path.name == CONFIG]
        if len(weights) != 1 or len(weights) + len(configs) != len(uploaded) or len(configs) > 1:
            raise ValueError(f"Upload one .safetensors file, and if you have it its {CONFIG}; nothing else is read.")
        size = weights[0].stat().st_size
        if size > self.limits.adapter_bytes:
            raise ValueError(
                f"{weights[0].name} has {size / 1e6:,.0f} MB; at most {self.limits.adapter_bytes / 1e6:,.0f} MB are "
                "accepted."
            )
        own = [adapter for adapter in self.adapters(session) if adapter.owner]
        if len(own) >= self.max_uploads:
            raise ValueError(f"You have uploaded {len(own)} adapters already. Remove one first.")
        folder = Path(tempfile.mkdtemp(prefix="latte-flow-adapter-"))
        try:
            shutil.copyfile(weights[0], folder / WEIGHTS)
            for path in configs:
                shutil.copyfile(path, folder / CONFIG)
            stem = re.sub(r"[^\w. -]", "_", weights[0].stem)[:40] or "adapter"
            # A file without its configuration is read as a single file.
            return self.add(stem, folder if configs else folder / WEIGHTS, session)
        except (ValueError, OSError) as error:
            message = " ".join(str(error).replace(str(folder), weights[0].name).split())
            raise ValueError(f"This adapter cannot be used: {message}") from error
        finally:
            # Its weights are in the model.
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, name: str, session: str) -> None:
        """Forget an adapter that this session uploaded.

        Raises:
            `ValueError`: if it is not theirs.
        """
        adapter = self.find(name, session)
        if not adapter.owner:
            raise ValueError(f"{name!r} belongs to the studio; only adapters that you uploaded can be removed.")
        del self._adapters[session, name]
        self.activate((), session)
        self.pipe.delete_adapters(_key(name, session))

    def forget(self, session: str) -> None:
        """Remove all adapters of a session that has ended."""
        for adapter in self.adapters(session):
            if adapter.owner:
                self.remove(adapter.name, session)

    def activate(self, chosen: tuple[tuple[str, tuple[float, ...]], ...], session: str) -> None:
        """Make exactly these adapters the active ones, with a weight for each expert.

        Raises:
            `ValueError`: if this session has no such adapter, or the model refuses a weight.
        """
        keys = tuple((_key(name, self.find(name, session).owner), weights) for name, weights in chosen)
        if keys == self._active or (not keys and not self.pipe.get_list_adapters()):
            return
        self._active = None
        self.pipe.set_adapters([key for key, _ in keys], [list(weights) for _, weights in keys])
        self._active = keys


def _key(name: str, session: str) -> str:
    """The name of an adapter in the model, where dots would separate modules."""
    return f"{session}-{name}".replace(".", "_")
