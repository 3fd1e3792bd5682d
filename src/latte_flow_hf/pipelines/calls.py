# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The state of a call, apart from the pipeline: several threads can use one pipeline at the same time.

Other diffusers pipelines keep the state of a call in themselves and in their scheduler, so that overlapping calls
overwrite each other. Here each call has its own copy of the scheduler and its own record, found by the thread that
runs the call. Attributes keep the names that callbacks use (`pipe.scheduler`, `pipe._interrupt`, ...).
"""

import contextlib
import copy
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from .offloading import uses_shared_state


# Held for what several threads read and write: schedulers while they are copied, and the locks of components.
_GUARD = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
# How often each thread uses a component, by its identifier, and the thread that uses it alone.
_USERS: weakref.WeakKeyDictionary[nn.Module, Counter[int]] = weakref.WeakKeyDictionary()
_ALONE: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass
class PipelineCall:
    """What belongs to one call.

    Args:
        scheduler: the call's copy of the pipeline's scheduler; `None` after the call.
        values (`dict`): the attributes of the pipeline that belong to the call, such as `_guidance_scale`.
    """

    scheduler: Any = None
    values: dict[str, Any] = field(default_factory=dict)


class _OfCall:
    """An attribute of the pipeline that belongs to the running call of the thread that reads it.

    After a call it keeps its value for that thread. A thread without a running call sets it for all running calls, as
    a button that interrupts them does.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: type) -> Any:
        if pipe is None:
            return self
        call = pipe._calls.get(threading.get_ident())
        if call is None or self.name not in call.values:
            raise AttributeError(f"{self.name} has no value before the first call in this thread.")
        return call.values[self.name]

    def __set__(self, pipe: Any, value: Any) -> None:
        call = pipe._running_call
        calls = list(pipe._calls.values()) if call is None else [call]
        for call in calls:
            if call.scheduler is not None:
                call.values[self.name] = value


class LatteFlowCallsMixin:
    """The attributes of a pipeline that belong to a call; it stands before `DiffusionPipeline`."""

    _guidance_scale = _OfCall()
    _current_expert = _OfCall()
    _interrupt = _OfCall()
    _num_timesteps = _OfCall()

    @property
    def _calls(self) -> dict[int, PipelineCall]:
        """The last call of each thread, by the identifier of the thread."""
        return self.__dict__.setdefault("_call_of_thread", {})

    @property
    def _running_call(self) -> PipelineCall | None:
        """The call that runs in this thread."""
        call = self._calls.get(threading.get_ident())
        return call if call is not None and call.scheduler is not None else None

    @property
    def scheduler(self) -> Any:
        """The scheduler. During a call, in its callbacks, it is the copy that the call uses. Between calls, its
        `sigmas` and `timesteps` are those of the last call that ended, same as in other pipelines."""
        call = self._running_call
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.__dict__["scheduler"] = scheduler

    @contextlib.contextmanager
    def _new_call(self) -> Iterator[None]:
        component = self.__dict__["scheduler"]
        if not isinstance(component, SchedulerMixin):
            raise ValueError(
                "scheduler must be a LatteFlowScheduler, or a flow-matching scheduler of diffusers, got "
                f"{component!r}."
            )
        with _GUARD:
            thread, own_copy = threading.get_ident(), copy.deepcopy(component)
        call = PipelineCall(own_copy)
        # A callback may call its pipeline again.
        outer_call = self._running_call
        self._calls[thread] = call
        try:
            yield
        finally:
            # The scheduler of a few-step adapter, in place of the copy, must not change the component.
            if call.scheduler is own_copy:
                with _GUARD:
                    # No call reads it: `set_timesteps` starts anew.
                    vars(component).update(vars(own_copy))
            call.scheduler = None
            if outer_call is not None:
                self._calls[thread] = outer_call


def own_call(method: Callable) -> Callable:
    """Give each call of a pipeline's `__call__` its own state, and refuse a call that would share more than weights.

    The method raises a `ValueError` if the weights of a component are moved or changed during a call (see
    [`~offloading.uses_shared_state`]) and another thread uses the component.
    """

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with one_thread_at_a_time(self.model, self.vae), self._new_call():
            return method(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def one_thread_at_a_time(*components: nn.Module | None) -> Iterator[None]:
    """Use components that cannot be used by two threads at once, in whichever pipelines they are.

    Raises:
        `ValueError`: if another thread uses such a component.
    """
    with contextlib.ExitStack() as held:
        for component in components:
            if component is None:
                continue
            held.enter_context(_counted(component))
            if not uses_shared_state(component):
                continue
            with _GUARD:
                # Re-entrant, since a callback may decode its latents or call the pipeline again.
                lock = _LOCKS.setdefault(component, threading.RLock())
            if not lock.acquire(blocking=False):
                raise ValueError(
                    f"{type(component).__name__} is in use by another thread, and off-loading, hooks or sharding move "
                    "or change its weights during a call. Wait for the other call, or load a pipeline for each thread."
                )
            held.callback(lock.release)
        yield


@contextlib.contextmanager
def _counted(component: nn.Module) -> Iterator[None]:
    """Note that this thread uses a component.

    Raises:
        `ValueError`: if another thread uses it `alone`.
    """
    thread = threading.get_ident()
    with _GUARD:
        if _ALONE.get(component, thread) != thread:
            raise ValueError(
                f"{type(component).__name__} is in use by another thread, which scales its adapters by "
                "attention_kwargs. Wait for the other call, or set the weights of adapters before by set_adapters."
            )
        users = _USERS.setdefault(component, Counter())
        users[thread] += 1
    try:
        yield
    finally:
        with _GUARD:
            users[thread] -= 1
            if not users[thread]:
                del users[thread]


@contextlib.contextmanager
def alone(component: nn.Module) -> Iterator[None]:
    """Use a component in this thread only, because its weights are changed for a while.

    Raises:
        `ValueError`: if another thread uses it.
    """
    thread = threading.get_ident()
    with _GUARD:
        if _USERS.get(component, Counter()).keys() - {thread}:
            raise ValueError(
                f"{type(component).__name__} is in use by another thread, which attention_kwargs would change too. "
                "Wait for the other call, or set the weights of adapters before by set_adapters."
            )
        outer = _ALONE.get(component)
        _ALONE[component] = thread
    try:
        yield
    finally:
        with _GUARD:
            if outer is None:
                del _ALONE[component]
