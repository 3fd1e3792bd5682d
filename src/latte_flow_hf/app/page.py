# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The page: five tabs around a [`studio.Studio`]. It only shows; what is shown is made elsewhere."""

import hashlib
import html
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..modeling.sampling import DEFAULT_GUIDANCE_SCALE, DEFAULT_NUM_STEPS
from . import conversation, figures
from .limits import read_prompt
from .model_queue import Waiting
from .runs import Generated, Progress
from .shelf import CONFIG
from .studio import Inside, Side, Studio


CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
# A new session follows the system's light or dark; no font is fetched.
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.blue,
    neutral_hue=gr.themes.colors.slate,
    font=("ui-sans-serif", "system-ui", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "monospace"),
).set(
    color_accent="#2459a6",
    button_primary_background_fill="#2459a6",
    button_primary_background_fill_hover="#1d4a8c",
    button_primary_background_fill_dark="#2459a6",
    button_primary_background_fill_hover_dark="#2f6bc2",
    button_primary_text_color="#ffffff",
    body_text_color_subdued="#475569",
    body_text_color_subdued_dark="#b6c2d2",
    block_info_text_color="#475569",
    block_info_text_color_dark="#b6c2d2",
    block_label_text_color="#334155",
    block_label_text_color_dark="#cbd5e1",
    input_placeholder_color="#64748b",
    input_placeholder_color_dark="#94a3b8",
)
# Gradio's button that enlarges an image in a conversation has no name, which a screen reader needs. On a phone the
# preview is below the form.
HEAD = """<script>
new MutationObserver(() => document.querySelectorAll(".image-container button:not([aria-label])").forEach(
  (button) => button.setAttribute("aria-label", "Enlarge the image")
)).observe(document, {childList: true, subtree: true});
document.addEventListener("click", (event) => {
  if (event.target.closest("#lf-generate") && innerWidth < 720)
    document.querySelector("#lf-preview")?.scrollIntoView({block: "start"});
});
</script>"""
MAX_KEPT = 24  # images in the gallery of a visitor
STEPS_HELP = "Refinements: one number, or one for each expert. Empty: the model's own."
GUIDANCE_HELP = "How closely to follow the prompt: one number, or one for each expert."
SMALL_WORLD_EXAMPLES = ("a red circle left of a blue square", "a purple triangle", "a handwritten seven")
EXAMPLES = ("a lighthouse on a cliff at dawn", "a red bicycle against a white wall")
READY = '<div class="lf-stage"><p>Your image will appear here.</p></div>'
INSIDE_INTRO = figures.note("Write a prompt and look inside, or choose “Look inside” under an image of yours.")


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio, to be launched with [`app.launch`]."""
    # Files are deleted an hour after their last use.
    with gr.Blocks(
        title="LaTtE-Flow studio", fill_width=True, analytics_enabled=False, delete_cache=(600, 3600)
    ) as blocks:
        page = _Page(studio)
        blocks.unload(page.leave)
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks


def _session(request: gr.Request) -> str:
    return request.session_hash or ""


class _Page:
    def __init__(self, studio: Studio):
        self.studio = studio
        self.folder = Path(tempfile.mkdtemp(prefix="latte-flow-studio-"))
        # A small world has single questions: a model that learned from it is confused by a conversation.
        self.remembers_one = studio.pipe.model.config.trained_words is not None
        self.chosen = gr.State({})
        self.kept = gr.State([])
        self.selected = gr.State(None)
        self.talk = gr.State({"messages": [], "shown": [], "unasked": []})
        gr.HTML(
            f"<h1>LaTtE-Flow studio</h1><p>{html.escape(studio.name)}: one model for images and conversation. Its "
            f"{studio.num_experts} experts take turns on the way from noise to image.</p>",
            elem_id="lf-title",
        )
        with gr.Tabs(elem_id="lf-tabs") as self.tabs:
            with gr.Tab("Create", id="create"):
                self._lay_out_create()
            with gr.Tab("Chat", id="chat"):
                self._lay_out_chat()
            with gr.Tab("Inside", id="inside"):
                self._lay_out_inside()
            with gr.Tab("Compare", id="compare"):
                self._lay_out_compare()
            with gr.Tab("Adapters", id="adapters"):
                self._lay_out_adapters()
        gr.HTML(f"<p>{figures.limits_line(studio.limits)}</p>", elem_id="lf-limits")
        self._connect_create()
        self._connect_chat()
        self._connect_inside()
        self._connect_compare()
        self._connect_adapters()

    def leave(self, request: gr.Request) -> None:
        """The visitor's page is closed."""
        self.studio.leave(_session(request))
        shutil.rmtree(self.folder / _session(request), ignore_errors=True)

    def stop(self, request: gr.Request) -> None:
        self.studio.stop(_session(request))

    # ------------------------------------------------------------------------------------------------- Create

    def _lay_out_create(self) -> None:
        limits = self.studio.limits
        is_small_world = self.studio.pipe.model.config.trained_words is not None
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.prompt = gr.Textbox(
                    label="Prompt",
                    lines=2,
                    placeholder="What do you want to see?",
                    elem_id="lf-prompt",
                    autofocus=True,
                )
                gr.Examples(
                    [[example] for example in (SMALL_WORLD_EXAMPLES if is_small_world else EXAMPLES)],
                    inputs=self.prompt,
                    label="Try one of these",
                )
                with gr.Row():
                    self.create_button = gr.Button("Generate", variant="primary", elem_id="lf-generate")
                    self.stop_button = gr.Button("Stop", elem_id="lf-stop")
                with gr.Row():
                    self.count = gr.Number(
                        1, label="Number of images", precision=0, minimum=1, maximum=limits.images, min_width=120
                    )
                    self.seed = gr.Textbox(
                        label="Seed", placeholder="new each time", min_width=120, elem_id="lf-seed", max_lines=1
                    )
                self.steps = gr.Textbox(
                    label="Steps", placeholder=self._own_steps(), info=STEPS_HELP, elem_id="lf-steps", max_lines=1
                )
                self.guidance = gr.Textbox(
                    label="Guidance", placeholder=self._own_guidance(), info=GUIDANCE_HELP, max_lines=1
                )
                with gr.Accordion("More", open=False):
                    with gr.Row():
                        # Not `gr.Number`, which keeps its value when it is emptied.
                        own_size = str(self.studio.pipe.default_size)
                        self.width = gr.Textbox(
                            label="Width in pixels", placeholder=own_size, max_lines=1, min_width=120
                        )
                        self.height = gr.Textbox(
                            label="Height in pixels", placeholder=own_size, max_lines=1, min_width=120
                        )
                    self.amount = gr.Slider(
                        0,
                        1,
                        0.4,
                        step=0.05,
                        label="Vary: how different",
                        info="The share of new noise: 0 gives the same image, 1 an unrelated one.",
                        buttons=[],
                    )
                self.in_use = gr.HTML(self._in_use({}))
            with gr.Column(scale=6, min_width=300):
                self.status = gr.HTML("", elem_id="lf-status")
                self.stage = gr.HTML(READY, elem_id="lf-preview")
                self.axis = gr.HTML(figures.time_axis(self.studio.boundaries, caption="Ready"), elem_id="lf-time")
                self.gallery = gr.Gallery(
                    label="Your images",
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    format="png",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="lf-gallery",
                )
                self.about = gr.HTML("", elem_id="lf-about")
                with gr.Row():
                    self.download = gr.DownloadButton("Download", interactive=False, min_width=88, size="sm")
                    self.again = gr.Button("Same again", interactive=False, min_width=88, size="sm")
                    self.vary = gr.Button("Vary", interactive=False, min_width=88, size="sm")
                    self.look = gr.Button("Look inside", interactive=False, min_width=88, size="sm")
                    self.talk_about = gr.Button("Ask about it", interactive=False, min_width=88, size="sm")
        self.actions = (self.download, self.again, self.vary, self.look, self.talk_about)

    def _own_steps(self) -> str:
        sampling = self.studio.pipe.model.sampling
        own = sampling.get("steps_per_expert") or [sampling.get("num_inference_steps", DEFAULT_NUM_STEPS)]
        return ", ".join(map(str, own))

    def _own_guidance(self) -> str:
        own = self.studio.pipe.model.sampling.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
        return _listed(tuple(own) if isinstance(own, list) else own)

    def _connect_create(self) -> None:
        form = [self.prompt, self.seed, self.steps, self.guidance, self.width, self.height, self.count, self.chosen]
        shown = [self.status, self.stage, self.axis, self.gallery, self.about, self.kept, self.selected, *self.actions]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        gr.on(
            [self.create_button.click, self.prompt.submit],
            self.create,
            [*form, self.kept],
            shown,
            api_name="create",
            **quiet,
        )
        self.stop_button.click(self.stop, queue=False, **quiet)
        self.gallery.select(self.select, self.kept, [self.selected, self.stage, self.about, self.download], **quiet)
        own = [self.kept, self.selected]
        self.again.click(self.same_again, own, shown, **quiet)
        self.vary.click(self.variations, [*own, self.count, self.amount], shown, **quiet)
        self.look.click(
            self.look_inside,
            own,
            [
                self.tabs,
                self.inside_prompt,
                self.inside_seed,
                self.inside_steps,
                self.inside_guidance,
                self.inside_axis,
                self.inside_view,
            ],
            **quiet,
        )
        self.talk_about.click(self.ask_about, [*own, self.talk], [self.tabs, self.chatbot, self.talk], **quiet)

    def create(
        self,
        prompt: Any,
        seed: Any,
        steps: Any,
        guidance: Any,
        width: Any,
        height: Any,
        count: Any,
        chosen: dict,
        kept: list,
        request: gr.Request,
    ) -> Iterator[dict]:
        try:
            settings = self.studio.settings(prompt, seed, steps, guidance, width, height, chosen)
            series = self.studio.series(settings, count)
        except ValueError as error:
            yield {self.status: figures.alert(str(error))}
            return
        yield from self._generate(series, kept, request, self.studio.unknown_words(settings.prompt))

    def same_again(self, kept: list, selected: int | None, request: gr.Request) -> Iterator[dict]:
        before: Generated = kept[selected or 0]
        for update in self._generate([before.settings], kept, request):
            after = update.get(self.kept)
            if after is not None and len(after) > 0 and after[0] is not before:
                is_same = after[0].image.tobytes() == before.image.tobytes()
                told = "The same image again, equal in every pixel." if is_same else "The image came out differently."
                update[self.status] = figures.note(told)
            yield update

    def variations(
        self, kept: list, selected: int | None, count: Any, amount: Any, request: gr.Request
    ) -> Iterator[dict]:
        try:
            series = self.studio.variations(kept[selected or 0].settings, count, amount)
        except ValueError as error:
            yield {self.status: figures.alert(str(error))}
            return
        yield from self._generate(series, kept, request)

    def _generate(self, series: list, kept: list, request: gr.Request, remark: str = "") -> Iterator[dict]:
        """Generate images into the gallery, showing how they come about."""
        axis, boundaries = figures.time_axis, self.studio.boundaries
        yield {self.status: figures.note(remark) if remark else "", self.axis: axis(boundaries, caption="Starting")}
        sigmas: list[float] = []
        done, last = 0, None
        started = time.perf_counter()
        try:
            for update in self.studio.create(_session(request), series):
                if isinstance(update, Waiting):
                    caption = f"Waiting: {update.position} before you"
                    yield {self.axis: axis(boundaries, caption=caption)}
                elif isinstance(update, Progress):
                    sigmas = [*sigmas, update.sigma] if update.step > 1 else [update.sigma]
                    last = update
                    if update.preview is None and not self._is_due(update):
                        continue
                    of_all = f"image {update.image + 1} of {len(series)}, " if len(series) > 1 else ""
                    caption = f"Expert {update.expert} is running: {of_all}step {update.step} of {update.num_steps}"
                    shown = {self.axis: axis(boundaries, sigmas, update.expert, update.sigma, caption)}
                    if update.preview is not None:
                        text = f"Estimate of the image after step {update.step}"
                        shown[self.stage] = _stage(figures.picture(update.preview, text))
                    yield shown
                else:
                    done += 1
                    kept = [update, *kept][:MAX_KEPT]
                    seconds = time.perf_counter() - started
                    steps = f"{len(update.sigmas)} steps, {seconds:.1f} s" + (f", {done} images" if done > 1 else "")
                    yield {
                        self.axis: axis(boundaries, update.sigmas, caption=f"Done: {steps}"),
                        **self._show(kept, 0, request),
                    }
        except ValueError as error:
            yield {self.status: figures.alert(str(error)), self.axis: axis(boundaries, caption="Not generated")}
            return
        if done < len(series):
            at = f" after step {last.step} of {last.num_steps}" if last is not None else ""
            told = f"Stopped{at}. {done} of {len(series)} images are finished."
            yield {self.status: figures.note(told), self.axis: axis(boundaries, sigmas, caption="Stopped")}

    def _is_due(self, update: Progress) -> bool:
        """Whether a step is shown without a preview: the first of each tenth of the way."""
        tenth = max(1, update.num_steps // 10)
        return update.step % tenth == 1 or tenth == 1

    def _show(self, kept: list, selected: int, request: gr.Request) -> dict:
        """The gallery, and the chosen image with what can be done with it."""
        paths = [(str(self._file(one, request)), one.settings.prompt) for one in kept]
        return {
            self.kept: kept,
            self.selected: selected,
            self.gallery: gr.Gallery(value=paths, selected_index=None),
            **self._show_one(kept[selected], request),
            **{action: gr.update(interactive=True) for action in self.actions[1:]},
        }

    def _show_one(self, one: Generated, request: gr.Request) -> dict:
        return {
            self.stage: _stage(figures.picture(one.image, one.settings.prompt)),
            self.about: _about(one),
            self.download: gr.update(value=str(self._file(one, request)), interactive=True),
        }

    def _file(self, one: Generated, request: gr.Request) -> Path:
        """The PNG file of an image, written when it is first needed."""
        data = one.png()
        words = re.sub(r"\W+", "-", one.settings.prompt.lower()).strip("-")[:40]
        name = f"{words or 'image'}-{one.settings.seed}-{hashlib.sha256(data).hexdigest()[:8]}.png"
        path = self.folder / (_session(request) or "nobody") / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return path

    def select(self, kept: list, event: gr.SelectData, request: gr.Request) -> dict:
        return {self.selected: event.index, **self._show_one(kept[event.index], request)}

    def look_inside(self, kept: list, selected: int | None, request: gr.Request) -> Iterator[dict]:
        settings = kept[selected or 0].settings
        yield {
            self.tabs: gr.Tabs(selected="inside"),
            self.inside_prompt: settings.prompt,
            self.inside_seed: str(settings.seed),
            self.inside_steps: _listed(settings.steps),
            self.inside_guidance: _listed(settings.guidance),
        }
        yield from self._look(settings, request)

    def ask_about(self, kept: list, selected: int | None, talk: dict, request: gr.Request) -> dict:
        one = kept[selected or 0]
        talk = self._with_picture(talk, one, request)
        return {self.tabs: gr.Tabs(selected="chat"), self.chatbot: talk["shown"], self.talk: talk}

    # --------------------------------------------------------------------------------------------------- Chat

    def _lay_out_chat(self) -> None:
        self.chatbot = gr.Chatbot(
            label="Conversation",
            height=430,
            elem_id="lf-chatbot",
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            render_markdown=False,
            placeholder="Show an image and ask about it, or have one generated and ask about that.",
        )
        if self.remembers_one:
            gr.HTML(
                '<p class="lf-quiet">This small model learned single questions: it sees the latest image and your '
                "question, not the whole conversation.</p>"
            )
        self.chat_status = gr.HTML("", elem_id="lf-chat-status")
        self.words = gr.MultimodalTextbox(
            label="Your message",
            placeholder="Ask a question, or: /paint a red circle",
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            elem_id="lf-words",
            max_plain_text_length=20_000,
        )
        with gr.Row():
            self.paint_button = gr.Button("Generate an image of it", min_width=160)
            self.stop_chat = gr.Button("Stop", min_width=90, elem_id="lf-stop-chat")
            self.new_talk = gr.Button("New conversation", min_width=150)

    def _connect_chat(self) -> None:
        inputs = [self.words, self.talk, self.chosen]
        outputs = [self.chatbot, self.chat_status, self.words, self.talk]
        self.words.submit(self.say, inputs, outputs, show_progress="hidden")
        self.paint_button.click(self.paint, inputs, outputs, show_progress="hidden")
        self.stop_chat.click(self.stop, queue=False, show_progress="hidden")
        gr.on(
            [self.new_talk.click, self.chatbot.clear],
            self.start_again,
            None,
            outputs[:-2] + outputs[-1:],
            show_progress="hidden",
        )

    def start_again(self, request: gr.Request) -> dict:
        self.studio.stop(_session(request))
        talk: dict = {"messages": [], "shown": [], "unasked": []}
        return {self.chatbot: [], self.chat_status: "", self.talk: talk}

    def say(self, words: dict, talk: dict, chosen: dict, request: gr.Request) -> Iterator[dict]:
        prompt = conversation.paint_prompt(words["text"])
        if prompt is not None:
            yield from self._paint(prompt, talk, chosen, request)
        else:
            yield from self._ask(words, talk, chosen, request)

    def paint(self, words: dict, talk: dict, chosen: dict, request: gr.Request) -> Iterator[dict]:
        prompt = conversation.paint_prompt(words["text"])
        yield from self._paint(words["text"] if prompt is None else prompt, talk, chosen, request)

    def _ask(self, words: dict, talk: dict, chosen: dict, request: gr.Request) -> Iterator[dict]:
        """Ask a question, about uploaded images and those that were generated since the last question."""
        try:
            conversation.check_turns(talk["messages"], self.studio.limits)
            files = [str(file) for file in words.get("files") or []]
            images = self.studio.read_images(files)
            text = read_prompt(words["text"], self.studio.limits, "question")
        except ValueError as error:
            # A file that is refused must not come again with the next question.
            yield {self.chat_status: figures.alert(str(error)), self.words: {"text": words["text"], "files": []}}
            return
        messages = [*talk["messages"], conversation.user_turn(text, [*talk["unasked"], *images])]
        seen = conversation.last_question(messages) if self.remembers_one else messages
        shown = [*talk["shown"], *({"role": "user", "content": {"path": file}} for file in files)]
        shown.append({"role": "user", "content": text})
        remark = self.studio.unknown_words(text)
        status = figures.note(remark) if remark else ""
        yield {self.chatbot: [*shown, _says("…")], self.chat_status: status, self.words: {"text": "", "files": []}}
        answer = ""
        try:
            for update in self.studio.ask(_session(request), seen, chosen):
                if isinstance(update, Waiting):
                    yield {self.chat_status: figures.note(f"Waiting: {update.position} before you")}
                    continue
                answer = update
                yield {self.chatbot: [*shown, _says(answer or "…")], self.chat_status: status}
        except ValueError as error:
            yield {self.chatbot: talk["shown"], self.chat_status: figures.alert(str(error)), self.words: words}
            return
        answer = answer or "(no answer)"
        talk = {
            "messages": [*messages, conversation.assistant_turn(answer)],
            "shown": [*shown, _says(answer)],
            "unasked": [],
        }
        yield {self.chatbot: talk["shown"], self.talk: talk, self.chat_status: status}

    def _paint(self, prompt: str, talk: dict, chosen: dict, request: gr.Request) -> Iterator[dict]:
        """Generate an image inside the conversation; the next question is about it."""
        try:
            settings = self.studio.settings(prompt, "", adapters=chosen)
        except ValueError as error:
            yield {self.chat_status: figures.alert(str(error))}
            return
        shown = [*talk["shown"], {"role": "user", "content": f"{conversation.PAINT} {settings.prompt}"}]
        yield {
            self.chatbot: [*shown, _says("Generating …")],
            self.chat_status: figures.note(remark) if (remark := self.studio.unknown_words(prompt)) else "",
            self.words: {"text": "", "files": []},
        }
        generated = None
        try:
            for update in self.studio.create(_session(request), [settings]):
                if isinstance(update, Generated):
                    generated = update
                elif isinstance(update, Waiting):
                    yield {self.chat_status: figures.note(f"Waiting: {update.position} before you")}
                elif self._is_due(update):
                    told = f"Generating: step {update.step} of {update.num_steps}, expert {update.expert}"
                    yield {self.chatbot: [*shown, _says(told)]}
        except ValueError as error:
            yield {self.chatbot: talk["shown"], self.chat_status: figures.alert(str(error))}
            return
        if generated is None:
            yield {self.chatbot: talk["shown"], self.chat_status: figures.note("Stopped. No image was generated.")}
            return
        talk = self._with_picture({**talk, "shown": shown}, generated, request)
        yield {self.chatbot: talk["shown"], self.talk: talk}

    def _with_picture(self, talk: dict, one: Generated, request: gr.Request) -> dict:
        """The conversation with an image at its end, which the next question is about."""
        path = str(self._file(one, request))
        picture = {"role": "assistant", "content": {"path": path, "alt_text": one.settings.prompt}}
        return {**talk, "shown": [*talk["shown"], picture], "unasked": [*talk["unasked"], one.image]}

    # ------------------------------------------------------------------------------------------------- Inside

    def _lay_out_inside(self) -> None:
        with gr.Row():
            self.inside_prompt = gr.Textbox(label="Prompt", scale=4, min_width=240, elem_id="lf-inside-prompt")
            self.inside_seed = gr.Textbox(label="Seed", placeholder="new each time", scale=1, min_width=110)
            self.inside_steps = gr.Textbox(label="Steps", placeholder=self._own_steps(), scale=1, min_width=110)
            self.inside_guidance = gr.Textbox(
                label="Guidance", placeholder=self._own_guidance(), scale=1, min_width=110
            )
        with gr.Row():
            self.inside_button = gr.Button("Look inside", variant="primary", elem_id="lf-look")
            self.inside_stop = gr.Button("Stop")
        self.inside_axis = gr.HTML("", elem_id="lf-inside-time")
        self.inside_view = gr.HTML(INSIDE_INTRO, elem_id="lf-inside")

    def _connect_inside(self) -> None:
        gr.on(
            [self.inside_button.click, self.inside_prompt.submit],
            self.inside,
            [self.inside_prompt, self.inside_seed, self.inside_steps, self.inside_guidance, self.chosen],
            [self.inside_axis, self.inside_view],
            show_progress="hidden",
        )
        self.inside_stop.click(self.stop, queue=False, show_progress="hidden")

    def inside(
        self, prompt: Any, seed: Any, steps: Any, guidance: Any, chosen: dict, request: gr.Request
    ) -> Iterator[dict]:
        try:
            settings = self.studio.settings(prompt, seed, steps, guidance, adapters=chosen)
        except ValueError as error:
            yield {self.inside_view: figures.alert(str(error))}
            return
        yield from self._look(settings, request)

    def _look(self, settings: Any, request: gr.Request) -> Iterator[dict]:
        boundaries, result = self.studio.boundaries, None
        sigmas: list[float] = []
        yield {self.inside_axis: figures.time_axis(boundaries, caption="Starting"), self.inside_view: ""}
        try:
            for update in self.studio.inside(_session(request), settings):
                if isinstance(update, Waiting):
                    caption = f"Waiting: {update.position} before you"
                    yield {self.inside_axis: figures.time_axis(boundaries, caption=caption)}
                elif isinstance(update, Inside):
                    result = update
                elif self._is_due(update):
                    sigmas = [*sigmas, update.sigma]
                    caption = f"Expert {update.expert} is running: step {update.step} of {update.num_steps}"
                    axis = figures.time_axis(boundaries, sigmas, update.expert, update.sigma, caption)
                    yield {self.inside_axis: axis}
        except ValueError as error:
            yield {self.inside_axis: "", self.inside_view: figures.alert(str(error))}
            return
        shown = figures.note("Stopped.") if result is None else inside_view(result, boundaries)
        yield {self.inside_axis: "", self.inside_view: shown}

    # ------------------------------------------------------------------------------------------------ Compare

    def _lay_out_compare(self) -> None:
        names = self.studio.shelf.names()
        with gr.Row():
            self.compare_prompt = gr.Textbox(label="Prompt", scale=4, min_width=240, elem_id="lf-compare-prompt")
            self.compare_seed = gr.Textbox(label="Seed", placeholder="new each time", scale=1, min_width=110)
        self.sides: list[tuple] = []
        with gr.Row():
            for side in ("Left", "Right"):
                with gr.Column(min_width=280), gr.Group():
                    is_right = side == "Right"
                    adapter = names[:1] if is_right else []
                    # One side must differ: by an adapter, or else by its steps.
                    steps = "10" if is_right and not adapter else ""
                    self.sides.append(
                        (
                            gr.Dropdown(
                                list(self.studio.pipes),
                                value=list(self.studio.pipes)[-1 if is_right else 0],
                                label=f"{side}: model",
                                visible=len(self.studio.pipes) > 1,
                            ),
                            gr.Textbox(steps, label=f"{side}: steps", placeholder="the model's own", max_lines=1),
                            gr.Textbox("", label=f"{side}: guidance", placeholder="the model's own", max_lines=1),
                            gr.CheckboxGroup(names, value=adapter, label=f"{side}: adapters", visible=bool(names)),
                        )
                    )
        with gr.Row():
            self.compare_button = gr.Button("Compare", variant="primary", elem_id="lf-compare")
            self.compare_stop = gr.Button("Stop")
        self.compare_view = gr.HTML(figures.note("Both sides start from the same noise."), elem_id="lf-compared")

    def _connect_compare(self) -> None:
        inputs = [self.compare_prompt, self.compare_seed, *self.sides[0], *self.sides[1], self.chosen]
        gr.on(
            [self.compare_button.click, self.compare_prompt.submit],
            self.compare,
            inputs,
            self.compare_view,
            show_progress="hidden",
        )
        self.compare_stop.click(self.stop, queue=False, show_progress="hidden")

    def compare(
        self,
        prompt: Any,
        seed: Any,
        left_model: str,
        left_steps: Any,
        left_guidance: Any,
        left_adapters: list[str],
        right_model: str,
        right_steps: Any,
        right_guidance: Any,
        right_adapters: list[str],
        chosen: dict,
        request: gr.Request,
    ) -> Iterator[str]:
        sides = (
            Side(left_model, left_steps, left_guidance, tuple(left_adapters)),
            Side(right_model, right_steps, right_guidance, tuple(right_adapters)),
        )
        done: list[Generated] = []
        yield figures.note("Starting")
        try:
            for update in self.studio.compare(_session(request), prompt, seed, sides, chosen):
                if isinstance(update, Waiting):
                    yield figures.note(f"Waiting: {update.position} before you")
                elif isinstance(update, Generated):
                    done.append(update)
                elif self._is_due(update):
                    side = ("Left", "Right")[update.image]
                    yield figures.note(f"{side}: expert {update.expert}, step {update.step} of {update.num_steps}")
        except ValueError as error:
            yield figures.alert(str(error))
            return
        yield comparison(*done) if len(done) == 2 else figures.note("Stopped.")

    # ----------------------------------------------------------------------------------------------- Adapters

    def _lay_out_adapters(self) -> None:
        names = self.studio.shelf.names()
        self.cards = gr.HTML(self._cards({}, ""), elem_id="lf-adapters")
        self.adapter_status = gr.HTML("", elem_id="lf-adapter-status")
        with gr.Row():
            with gr.Column(min_width=280):
                self.adapter = gr.Dropdown(
                    names, value=names[0] if names else None, label="Adapter", elem_id="lf-adapter"
                )
                self.weight = gr.Textbox(
                    "1",
                    label="Weight",
                    info=f"1: as trained; 0: left out. Or one for each of {self.studio.num_experts} experts.",
                    max_lines=1,
                )
                with gr.Row():
                    self.use = gr.Button("Use it", variant="primary", min_width=100)
                    self.leave_out = gr.Button("Leave it out", min_width=110)
                    self.forget = gr.Button("Remove mine", min_width=110)
            with gr.Column(min_width=280):
                self.files = gr.File(
                    label="Your adapter: .safetensors (and adapter_config.json)",
                    file_count="multiple",
                    file_types=[".safetensors", ".json"],
                    height=160,
                )
                self.add = gr.Button("Add the uploaded adapter")

    def _connect_adapters(self) -> None:
        outputs = [self.cards, self.adapter_status, self.chosen, self.in_use, self.adapter]
        outputs += [self.sides[0][3], self.sides[1][3], self.files]
        self.use.click(self.use_adapter, [self.adapter, self.weight, self.chosen], outputs, show_progress="hidden")
        self.leave_out.click(self.drop_adapter, [self.adapter, self.chosen], outputs, show_progress="hidden")
        self.add.click(self.add_adapter, [self.files, self.chosen], outputs, show_progress="hidden")
        self.forget.click(self.remove_adapter, [self.adapter, self.chosen], outputs, show_progress="hidden")

    def use_adapter(self, name: str | None, weights: Any, chosen: dict, request: gr.Request) -> dict:
        return self._change(request, chosen, lambda: self._weighted(name, weights, chosen, request))

    def drop_adapter(self, name: str | None, chosen: dict, request: gr.Request) -> dict:
        return self._change(request, chosen, lambda: self._weighted(name, "0", chosen, request))

    def add_adapter(self, files: list | None, chosen: dict, request: gr.Request) -> dict:
        if not files:
            return {self.adapter_status: figures.alert("Choose a file first.")}

        def add() -> tuple[dict, str]:
            name = self.studio.add_adapter(_session(request), [str(file) for file in files])
            told = f"{name} is on the shelf. Choose a weight to use it."
            if not any(Path(file).name == CONFIG for file in files):
                told += f" Without its {CONFIG}, its own scale may be unknown and is then taken to be 1."
            return chosen, told

        return {**self._change(request, chosen, add), self.files: None}

    def remove_adapter(self, name: str | None, chosen: dict, request: gr.Request) -> dict:
        def remove() -> tuple[dict, str]:
            self.studio.remove_adapter(_session(request), name or "")
            return {other: weight for other, weight in chosen.items() if other != name}, f"{name} is removed."

        return self._change(request, chosen, remove)

    def _weighted(self, name: str | None, weights: Any, chosen: dict, request: gr.Request) -> tuple[dict, str]:
        changed = self.studio.choose_adapter(_session(request), chosen, name or "", weights)
        return changed, f"{name} is used from now on, in all tabs." if name in changed else f"{name} is left out."

    def _change(self, request: gr.Request, chosen: dict, action: Callable[[], tuple[dict, str]]) -> dict:
        """Do something with the adapters, and show them."""
        before = self.studio.shelf.names(_session(request))
        try:
            chosen, told = action()
            status = figures.note(told)
        except ValueError as error:
            status = figures.alert(str(error))
        names = self.studio.shelf.names(_session(request))
        shown: dict = {
            self.chosen: chosen,
            self.adapter_status: status,
            self.cards: self._cards(chosen, _session(request)),
            self.in_use: self._in_use(chosen),
        }
        if names != before:
            shown[self.adapter] = gr.Dropdown(choices=names, value=names[-1] if names else None)
            for side in self.sides:
                shown[side[3]] = gr.CheckboxGroup(choices=names, value=[], visible=bool(names))
        return shown

    def _cards(self, chosen: dict, session: str) -> str:
        return figures.adapter_cards(self.studio.shelf.adapters(session), chosen, self.studio.num_experts)

    def _in_use(self, chosen: dict) -> str:
        if not chosen:
            return ""
        return f'<p class="lf-quiet">Adapters in use: {html.escape(", ".join(chosen))}</p>'


def _stage(content: str) -> str:
    return f'<div class="lf-stage">{content}</div>'


def _says(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _listed(values: Any) -> str:
    if values is None:
        return ""
    return ", ".join(f"{value:g}" for value in (values if isinstance(values, tuple) else (values,)))


def _about(one: Generated) -> str:
    """A line on how an image was made."""
    settings = one.settings
    parts = [f"seed {settings.seed}", f"{len(one.sigmas)} steps", f"{one.seconds:.2f} s"]
    parts += [f"guidance {_listed(settings.guidance)}"] if settings.guidance is not None else []
    parts += [f"varied by {settings.variation:g}"] if settings.variation else []
    parts += [f"adapters {', '.join(name for name, _ in settings.adapters)}"] if settings.adapters else []
    return (
        f'<p><strong>{html.escape(settings.prompt)}</strong><br><span class="lf-quiet">{", ".join(parts)}</span></p>'
    )


def inside_view(inside: Inside, boundaries: list[float]) -> str:
    """All figures of the tab Inside."""
    generated, reports = inside.generated, inside.reports

    def section(title: str, about: str, content: str) -> str:
        return f'<section class="lf-section"><h2>{title}</h2><p>{about}</p>{content}</section>'

    return "".join(
        (
            section(
                "What each expert made of it",
                "The clean image as the last step of each expert estimates it, and below it where that differs from "
                "the estimate before (black: nowhere, white: most).",
                figures.estimates(reports, inside.noise, inside.estimates, generated.image),
            ),
            section(
                "How far each expert went",
                "Root mean squares over the latents: how far each expert moved the noisy image through its interval, "
                "and how much its estimate of the clean image changed.",
                figures.movement(reports)
                + figures.estimate_curve(generated.sigmas, inside.changes, generated.experts, boundaries),
            ),
            section(
                "Gates of the residual attention",
                "How much of the attention map of the layer before is added in each head, over time. Orange adds it, "
                "blue subtracts it. The first layer of an expert has no gate.",
                figures.gate_map(reports, boundaries),
            ),
            section(
                "Where the time went",
                f"{generated.seconds:.3f} s on this machine, for {len(generated.sigmas)} evaluations of one expert "
                "each.",
                figures.time_parts(inside.encode_seconds, reports, inside.decode_seconds),
            ),
            figures.report_table(reports),
        )
    )


def comparison(left: Generated, right: Generated) -> str:
    """Two images beside each other, with their times."""
    tiles = []
    for side, one in (("Left", left), ("Right", right)):
        settings = one.settings
        parts = [f"{len(one.sigmas)} steps"]
        parts += [f"guidance {_listed(settings.guidance)}"] if settings.guidance is not None else []
        parts += [f"{name} x {_weights(weights)}" for name, weights in settings.adapters]
        tiles.append(
            f'<figure class="lf-tile">{figures.picture(one.image, f"{side}: {settings.prompt}")}'
            f'<figcaption><span class="lf-time">{one.seconds:.2f} s</span>'
            f"<strong>{html.escape(one.model)}</strong><span>{html.escape(', '.join(parts))}</span>"
            "</figcaption></figure>"
        )
    difference = "different sizes"
    if left.image.size == right.image.size:
        mean = figures.pixel_difference(left.image, right.image).mean()
        difference = "equal in every pixel" if mean == 0 else f"{mean:.1f} of 255 apart on average"
    faster, slower = sorted((left, right), key=lambda one: one.seconds)
    side = "left" if faster is left else "right"
    return (
        f'<div class="lf-pair">{"".join(tiles)}</div><p>Same noise (seed {left.settings.seed}). The {side} one took '
        f"{100 * faster.seconds / slower.seconds:.0f}% of the other's time; the images are {difference}.</p>"
    )


def _weights(weights: tuple[float, ...]) -> str:
    return f"{weights[0]:g}" if len(set(weights)) == 1 else "/".join(f"{weight:g}" for weight in weights)
