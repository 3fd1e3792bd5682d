# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""One thread does all work that needs the model, in the order in which it was asked for.

Adapters are part of the model, so two visitors with other adapters cannot use it at once. And a visitor sees how many
are before them.
"""

import collections
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


# How often a visitor who waits is told the position, in seconds.
POLL_SECONDS = 0.25


class StoppedError(Exception):
    """Raised inside a job that was stopped."""


@dataclass(frozen=True)
class Waiting:
    """How many jobs are before this one."""

    position: int


class Job:
    """Something that needs the model.

    Args:
        work (`Callable[[Job], None]`): called in the queue's thread. It sends what it has to tell with `send`, and
            looks at `stopped` between its steps.
    """

    def __init__(self, work: Callable[["Job"], None]):
        self._work = work
        self._updates: queue.SimpleQueue = queue.SimpleQueue()
        self._stop = threading.Event()
        self._done = threading.Event()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def stop(self) -> None:
        """Ask the work to end after its current step; a job that waits never starts."""
        self._stop.set()

    def check(self) -> None:
        """
        Raises:
            `StoppedError`: if the job was stopped.
        """
        if self.stopped:
            raise StoppedError

    def send(self, update: Any) -> None:
        self._updates.put(update)

    def run(self) -> None:
        try:
            self.check()
            self._work(self)
        except StoppedError:
            pass
        except Exception as error:
            self.send(error)
        finally:
            self._done.set()
            self.send(None)


class ModelQueue:
    """The queue.

    Args:
        max_waiting (`int`): how many jobs may wait.
    """

    def __init__(self, max_waiting: int):
        self.max_waiting = max_waiting
        self._jobs: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="studio model").start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            job.run()
            with self._changed:
                self._jobs.popleft()

    def position(self, job: Job) -> int:
        """How many jobs are before this one."""
        with self._changed, contextlib.suppress(ValueError):
            return self._jobs.index(job)
        return 0

    def submit(self, work: Callable[[Job], None]) -> Job:
        """
        Raises:
            `ValueError`: if too many jobs wait.
        """
        job = Job(work)
        with self._changed:
            # A stopped job that waits goes by itself, as soon as it is its turn.
            num_waiting = sum(not other.stopped for other in self._jobs)
            if num_waiting > self.max_waiting:
                raise ValueError(f"{num_waiting} requests are waiting for the model. Try again in a minute.")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def follow(self, job: Job) -> Iterator[Any]:
        """What the job sends; before its turn, [`Waiting`] whenever the position changes. Closing the iterator stops
        the job.

        Raises:
            The error of the job.
        """
        shown = 0
        try:
            while True:
                try:
                    update = job._updates.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    position = self.position(job)
                    if job.stopped and position:
                        return  # It will never start.
                    if position != shown:
                        shown = position
                        yield Waiting(position)
                    continue
                if update is None:
                    return
                if isinstance(update, Exception):
                    raise update
                yield update
        finally:
            job.stop()
