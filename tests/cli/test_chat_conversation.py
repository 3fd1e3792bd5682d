"""What the command line cannot be made to show: an answer that is interrupted."""

import pytest
from transformers import TextStreamer

from latte_flow_hf.cli.conversation import Conversation


class InterruptedStreamer(TextStreamer):
    """Ctrl-C after the prompt and one token."""

    num_calls = 0

    def put(self, value):
        super().put(value)
        self.num_calls += 1
        if self.num_calls == 2:
            raise KeyboardInterrupt


def test_after_ctrl_c_the_conversation_is_as_before(pipe, picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    events = []
    tell = lambda text, event: events.append(event)  # noqa: E731
    conversation = Conversation(pipe, tmp_path, tell, streams=False, max_new_tokens=4)
    conversation.say(f"/image {tmp_path / 'picture.png'}")
    conversation.streamer = InterruptedStreamer(pipe.processor.tokenizer)
    with pytest.raises(KeyboardInterrupt):
        conversation.say("what?")
    assert conversation.messages == [] and len(conversation.shown) == 1
    conversation.streamer = None
    conversation.say("what?")
    assert events[-1]["images"] == [str(tmp_path / "picture.png")] and len(conversation.messages) == 2
