# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Adapters by name: loaded when they are asked for, dropped when they were not used for longest."""

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..files import read_json


logger = logging.get_logger(__name__)

# PEFT allows no dots in the name of an adapter; a name is never more than a part of a path.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class AdapterCache:
    """The adapters of a folder, some of them loaded in the pipeline.

    The adapters that were active when the cache was made stay active beside each of them.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        folder (`Path`, *optional*): holds one PEFT folder for each adapter; `None` is no adapters.
        max_loaded (`int`, defaults to 8): how many of them are loaded at a time.
        on_drop (`Callable`, *optional*): called with the name of an adapter that was unloaded.

    Raises:
        `ValueError`: if `max_loaded` is not positive.
        `OSError`: if `folder` is no folder.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path | None = None,
        max_loaded: int = 8,
        on_drop: Callable[[str], None] = lambda name: None,
    ):
        if max_loaded < 1:
            raise ValueError(f"max_loaded must be at least 1, got {max_loaded}.")
        if folder is not None and not Path(folder).is_dir():
            raise OSError(f"adapters must be a folder that holds one folder for each adapter, and {folder} is none.")
        self.pipe, self.folder, self.max_loaded, self.on_drop = pipe, folder, max_loaded, on_drop
        self._base: dict[str, Any] = dict(pipe.model.adapter_weights) if pipe._adapters() else {}
        # How many users each loaded adapter has; the one that was used last is the last one.
        self._users: OrderedDict[str, int] = OrderedDict()
        self._active: str | None = None

    @property
    def loaded(self) -> list[str]:
        """The loaded adapters, the one that was not used for longest first."""
        return list(self._users)

    def names(self) -> list[str]:
        """The adapters in the folder, as it is now."""
        if self.folder is None:
            return []
        found = sorted(path.parent.name for path in Path(self.folder).glob("*/adapter_config.json"))
        names = [name for name in found if _NAME.fullmatch(name)]
        if len(names) < len(found):
            logger.warning_once(
                f"adapters {sorted(set(found) - set(names))} are left out: use letters, digits, - and _ in the name."
            )
        return names

    def acquire(self, name: str | None) -> bool:
        """Load an adapter if it is not loaded, and keep it until [`~AdapterCache.release`].

        Returns:
            `bool`: `False` if there is no room for it before another adapter is released.

        Raises:
            `ValueError`, `OSError`: same as `load_lora_weights`, and if there is no such adapter.
        """
        if name is None:
            return True
        if name not in self._users:
            if name not in self.names():
                raise ValueError(f"adapter must be one of {self.names()}, got {name!r}.")
            if not self._make_room(name):
                return False
            self.pipe.load_lora_weights(self._path(name), adapter_name=name)
            # Loading makes it the only active one.
            self.pipe.model.set_adapter_weights({**self._base, name: 1.0})
            self._active = name
            self._users[name] = 0
        self._users[name] += 1
        self._users.move_to_end(name)
        return True

    def release(self, name: str | None) -> None:
        """The counterpart of [`~AdapterCache.acquire`]; the adapter stays loaded as long as there is room."""
        if name is not None:
            self._users[name] -= 1

    def activate(self, name: str | None) -> None:
        """Make an acquired adapter the active one, or none."""
        if name != self._active:
            self.pipe.model.set_adapter_weights(self._base if name is None else {**self._base, name: 1.0})
            self._active = name

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return Path(self.folder) / name

    def _make_room(self, name: str) -> bool:
        """Drop the adapters that must go before `name` can be loaded, or none of them if one is in use."""
        # PEFT cannot combine adapters of different methods, even if only one of them is active.
        method = read_json(self._path(name) / "adapter_config.json").get("peft_type")
        configs = getattr(self.pipe.model, "peft_config", None) or {}
        drop = [other for other in self._users if configs[other].peft_type != method]
        kept = [other for other in self._users if other not in drop]
        num_over = len(kept) + 1 - self.max_loaded
        idle = [other for other in kept if not self._users[other]]
        if any(self._users[other] for other in drop) or num_over > len(idle):
            return False
        for other in [*drop, *idle[: max(num_over, 0)]]:
            self._drop(other)
        return True

    def _drop(self, name: str) -> None:
        self.activate(None)
        self.pipe.delete_adapters(name)
        del self._users[name]
        self.on_drop(name)
