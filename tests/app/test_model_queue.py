# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The one thread that uses the model."""

import threading

import pytest

from latte_flow_hf.app.model_queue import ModelQueue, Waiting


@pytest.fixture
def held():
    """A queue whose first job runs until `release()`."""
    queue, started, release = ModelQueue(max_waiting=3), threading.Event(), threading.Event()

    def work(job):
        started.set()
        release.wait(10)

    queue.submit(work)
    assert started.wait(10)
    yield queue, release.set
    release.set()


def test_jobs_run_in_order_in_one_thread():
    queue, order = ModelQueue(10), []
    jobs = [queue.submit(lambda job, n=n: order.append((n, threading.get_ident()))) for n in range(5)]
    for job in jobs:
        assert list(queue.follow(job)) == []
    assert [n for n, _ in order] == list(range(5))
    assert len({thread for _, thread in order}) == 1 and order[0][1] != threading.get_ident()


def test_the_position_is_told(held):
    queue, release = held
    queue.submit(lambda job: None)
    updates = queue.follow(queue.submit(lambda job: job.send("result")))
    assert next(updates) == Waiting(2)
    release()
    assert list(updates)[-1] == "result"


def test_a_job_that_waits_and_is_stopped_never_starts(held):
    queue, release = held
    ran = []
    job = queue.submit(ran.append)
    updates = queue.follow(job)
    assert next(updates) == Waiting(1)
    job.stop()
    assert list(updates) == []  # although the first job still runs
    release()
    assert list(queue.follow(queue.submit(lambda job: job.send("after")))) == ["after"]
    assert ran == []


def test_closing_the_iterator_stops_the_job():
    queue, seen = ModelQueue(1), threading.Event()

    def work(job):
        job.send("first")
        job._stop.wait(10)
        job.check()
        seen.set()

    job = queue.submit(work)
    updates = queue.follow(job)
    assert next(updates) == "first"
    updates.close()
    assert job.stopped and job._done.wait(10) and not seen.is_set()


def test_errors_reach_who_asked_and_nobody_else(held):
    queue, release = held

    def fail(job):
        raise ValueError("of this job")

    failing, good = queue.submit(fail), queue.submit(lambda job: job.send(1))
    release()
    with pytest.raises(ValueError, match="of this job"):
        list(queue.follow(failing))
    assert list(queue.follow(good))[-1] == 1


def test_too_many_are_refused(held):
    queue, _ = held
    jobs = [queue.submit(lambda job: None) for _ in range(3)]
    with pytest.raises(ValueError, match="4 requests are waiting"):
        queue.submit(lambda job: None)
    jobs[1].stop()
    queue.submit(lambda job: None)
