# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Answers that come in parts, and can be stopped."""

from itertools import pairwise

import pytest

from latte_flow_hf.app import conversation
from latte_flow_hf.app.limits import Limits
from latte_flow_hf.app.model_queue import Job


def parts(job):
    found = []
    while not job._updates.empty():
        found.append(job._updates.get())
    return found


def test_commands():
    assert conversation.paint_prompt("/paint a red circle ") == "a red circle"
    assert conversation.paint_prompt("/paint") == ""
    assert conversation.paint_prompt("/painting") is None
    assert conversation.paint_prompt("what is /paint?") is None


def test_answers_are_streamed(pipe, picture):
    messages = [conversation.user_turn("what is in the picture?", [picture])]
    job = Job(lambda job: None)
    answer = conversation.answer(pipe, messages, Limits(answer_tokens=12), job)
    assert answer == pipe.chat(messages, max_new_tokens=12, do_sample=False)
    streamed = parts(job)
    assert len(streamed) > 1 and streamed[-1] == answer
    assert all(later.startswith(earlier) for earlier, later in pairwise(streamed))


def test_a_stopped_answer_ends(pipe):
    messages = [conversation.user_turn("what is this?", [])]
    job = Job(lambda job: None)
    full = conversation.answer(pipe, messages, Limits(answer_tokens=40), job)
    sent = []
    job = Job(lambda job: None)
    job.send = lambda part: (sent.append(part), job.stop())
    short = conversation.answer(pipe, messages, Limits(answer_tokens=40), job)
    assert len(short) < len(full) and full.startswith(short)


def test_long_conversations_are_refused(pipe):
    messages = [conversation.user_turn("a " * 1200, [])]
    with pytest.raises(ValueError, match="tokens, and at most"):
        conversation.answer(pipe, messages, Limits(), Job(lambda job: None))
    turns = [conversation.user_turn("a", []), conversation.assistant_turn("b")] * 3
    conversation.check_turns(turns, Limits(turns=4))
    with pytest.raises(ValueError, match="3 questions"):
        conversation.check_turns(turns, Limits(turns=3))


def test_the_last_question_with_the_latest_images(picture):
    other = picture.rotate(90)
    messages = [
        conversation.user_turn("first", [picture]),
        conversation.assistant_turn("yes"),
        conversation.user_turn("second", [other]),
        conversation.assistant_turn("no"),
        conversation.user_turn("third", []),
    ]
    assert conversation.last_question(messages) == [conversation.user_turn("third", [other])]
    assert conversation.last_question(messages[:1]) == messages[:1]
    assert conversation.last_question([conversation.user_turn("alone", [])])[0]["content"][0]["text"] == "alone"
