# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""A conversation in the terminal: questions, images, and images that are generated on the way."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from ..files import check_output, write_json
from ..pipelines.image_metadata import PipelineRecord, record_pipeline, write_metadata
from .generation import Request


HELP = """\
/image PATH    show an image with the next question; several times for several images
/paint PROMPT  generate an image, write it to a file and show it with the next question
/save PATH     write the conversation to a .json file
/reset         forget everything that was said and shown
/help          this text
/quit          end, as the end of the input does; Ctrl-C stops an answer"""


class Conversation:
    """A conversation with one pipeline, line by line.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        folder (`Path`): where generated images are written; made with the first one.
        tell (`Callable`): called with each event as text for people and a dict for programs; the text of an answer is
            empty if it was streamed.
        streams (`bool`): whether answers are printed while they are generated.
        max_new_tokens (`int`): the maximum length of an answer.
        seed (`int`): of the first generated image; each further one has the next.
        adapter_names (`dict[str, str]`): what to call loaded adapters in the files of images.
    """

    def __init__(
        self,
        pipe: Any,
        folder: Path,
        tell: Callable[[str, dict[str, Any]], None],
        streams: bool,
        max_new_tokens: int,
        seed: int = 0,
        adapter_names: dict[str, str] | None = None,
    ):
        self.pipe, self.folder, self.tell = pipe, folder, tell
        self.max_new_tokens, self.seed, self.adapter_names = max_new_tokens, seed, adapter_names
        self.streamer = None
        if streams:
            self.streamer = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        # As they are saved, with the paths of images; and as they are asked, since a file may change meanwhile.
        self.messages: list[dict[str, Any]] = []
        self._loaded: list[dict[str, Any]] = []
        self.shown: list[str] = []
        self._record: PipelineRecord | None = None

    def say(self, line: str) -> bool:
        """Do what a line asks for. Returns whether the conversation goes on.

        Raises:
            `ValueError` or `OSError`: if it cannot be done; the conversation is as it was before.
        """
        command, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if not command.startswith("/"):
            if line.strip():
                self.ask(line.strip())
            return True
        needs = {"/image": "a path", "/paint": "a prompt", "/save": "a path"}
        if command in needs and not argument:
            raise ValueError(f"{command} needs {needs[command]}, such as `{command} {_EXAMPLES[command]}`.")
        if command not in needs and argument:
            raise ValueError(f"{command} takes nothing after it, got {argument!r}. /help lists the commands.")
        match command:
            case "/image":
                self.show(str(Path(argument).expanduser()))
            case "/paint":
                self.paint(argument)
            case "/save":
                self.save(Path(argument).expanduser())
            case "/reset":
                self.messages, self._loaded, self.shown = [], [], []
                self.tell("The conversation is empty.", {"reset": True})
            case "/help":
                self.tell(HELP, {"help": HELP})
            case "/quit":
                return False
            case _:
                raise ValueError(f"there is no command {command}. /help lists the commands.")
        return True

    def ask(self, question: str) -> None:
        """Ask, about what was shown since the last question too."""
        (turn,) = self.pipe.processor.conversation(question, self.shown)
        start = time.perf_counter()
        answer = self.pipe.chat([*self._loaded, turn], streamer=self.streamer, max_new_tokens=self.max_new_tokens)
        content = [{"type": "image", "image": str(Path(path).absolute())} for path in self.shown]
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.messages += [{"role": "user", "content": [*content, {"type": "text", "text": question}]}, reply]
        self._loaded += [turn, reply]
        images, self.shown = self.shown, []
        self.tell(
            "" if self.streamer else answer,
            {
                "question": question,
                "images": images,
                "answer": answer,
                "seconds": round(time.perf_counter() - start, 3),
            },
        )

    def show(self, path: str) -> None:
        """Show an image with the next question."""
        self.pipe.processor.conversation("", path)
        self.shown.append(path)
        self.tell(f"{path} goes with the next question.", {"image": path})

    def paint(self, prompt: str) -> None:
        """Generate an image of a prompt, and show it with the next question."""
        request = Request(prompt, self.seed)
        path = self._new_path(prompt)
        (image,) = request.run(self.pipe)
        if self._record is None:
            self._record = record_pipeline(self.pipe, self.adapter_names)
        write_metadata(image, request.record(self.pipe, self._record), path)
        self.seed += 1
        self.shown.append(str(path))
        self.tell(
            f"wrote {path} (seed {request.seed}); it goes with the next question.",
            {"path": str(path), "prompt": prompt, "seed": request.seed},
        )

    def _new_path(self, prompt: str) -> Path:
        words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "image"
        number = 1
        while any(self.folder.glob(f"{number:03d}-*")):
            number += 1
        path = (self.folder / f"{number:03d}-{words}.png").absolute()
        check_output(path)
        return path

    def save(self, path: Path) -> None:
        """Write the conversation in the form of chat templates, for `pipe.chat(messages)`."""
        if path.suffix != ".json":
            raise ValueError(f"/save writes a .json file, got {str(path)!r}.")
        check_output(path)
        write_json({"messages": self.messages}, path)
        self.tell(f"wrote {path.absolute()} ({len(self.messages)} messages)", {"saved": str(path.absolute())})


_EXAMPLES = {"/image": "photo.png", "/paint": "a red circle", "/save": "conversation.json"}
