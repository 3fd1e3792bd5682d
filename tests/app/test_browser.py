# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The studio in a real browser, with the embedded checkpoint.

With LATTE_FLOW_SCREENSHOTS=docs/figures, the screenshots of the documentation are made.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte_flow_hf import LatteFlowPipeline, tiny_checkpoint
from latte_flow_hf.app import app
from latte_flow_hf.checkpoints import few_step_checkpoint


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install the Debian package `chromium`"),
]
TABS = ("Create", "Chat", "Inside", "Compare", "Adapters")
PROMPT = "a red circle left of a blue square"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def studio():
    pipe = LatteFlowPipeline.from_pretrained(tiny_checkpoint())
    studio = app.make_studio(pipe, "tiny world")
    studio.shelf.add("few steps", Path(few_step_checkpoint()))
    return studio


@pytest.fixture(scope="module")
def url(studio):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = app.launch(studio, port=port, blocks_thread=False)
    yield f"http://127.0.0.1:{port}/"
    page.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium has no sandbox for root, which containers often are.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url, studio):
    """Open the page; everything that it requests must come from the studio itself."""
    contexts, foreign = [], []

    def visit(**options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else foreign.append(r.url))
        page.goto(url)
        page.wait_for_selector("#lf-generate")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert foreign == []
    until(lambda: not studio._jobs)


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def fill(page, prompt: str = PROMPT, **fields: str) -> None:
    page.fill("#lf-prompt textarea", prompt)
    for name, value in fields.items():
        page.locator(f"#lf-{name}").locator("input, textarea").first.fill(value)


def create(page, prompt: str = PROMPT, **fields: str) -> None:
    fill(page, prompt, **fields)
    page.click("#lf-generate")
    page.wait_for_selector("#lf-time >> text=/Done/")


def open_tab(page, name: str) -> None:
    """By the tab, or where there is no room by the menu of those that are hidden."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.locator("#lf-tabs .overflow-menu > button").click()
        tab = page.locator("#lf-tabs .overflow-dropdown button", has_text=name)
    tab.click()
    page.wait_for_timeout(300)


def say(page, text: str) -> None:
    page.locator("#lf-words textarea").fill(text)
    page.keyboard.press("Enter")


def shown_image(page, selector: str = "#lf-preview img") -> np.ndarray:
    source = page.locator(selector).first.get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))


def expected_image(studio, prompt: str, seed: int) -> np.ndarray:
    settings = studio.settings(prompt, str(seed))
    *_, generated = studio.create("test", [settings])
    return np.asarray(generated.image)


def test_create(visit, studio, tmp_path):
    page = visit()
    create(page, seed="3")
    image = shown_image(page)
    assert np.array_equal(image, expected_image(studio, PROMPT, 3))

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "image.png")
    saved = Image.open(tmp_path / "image.png")
    assert np.array_equal(saved.convert("RGB"), image)
    assert json.loads(saved.text["latte_flow"])["seed"] == 3
    assert download.value.suggested_filename.startswith("a-red-circle-left-of-a-blue-square-3-")

    page.get_by_role("button", name="Same again").click()
    page.wait_for_selector("text=equal in every pixel")
    page.get_by_role("button", name="Vary").click()
    page.wait_for_selector("text=varied by 0.4")
    assert not np.array_equal(shown_image(page), image)
    assert page.locator("#lf-gallery button img, #lf-gallery .thumbnail-item img").count() >= 3


def test_the_preview_and_the_running_expert(visit):
    page = visit()
    fill(page, steps="200", seed="1")
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => {
            const running = document.querySelector("#lf-time .lf-running");
            const image = document.querySelector("#lf-preview img");
            if (running) window.seen.push([running.textContent, image ? image.alt : ""]);
        }).observe(document.body, {childList: true, subtree: true});
    }""")
    page.click("#lf-generate")
    page.wait_for_selector("#lf-time >> text=/Done: 200 steps/")
    seen = page.evaluate("window.seen")
    assert {text for text, _ in seen} == {f"Expert {expert}" for expert in range(4)}
    assert any(re.match(r"Estimate of the image after step \d+", alt) for _, alt in seen)


def test_stop_really_stops(visit, studio):
    steps = []
    handle = studio.pipe.model.tower.register_forward_hook(lambda *_: steps.append(1))
    try:
        page = visit()
        page.get_by_label("Number of images").fill("8")
        fill(page, steps="200")
        page.click("#lf-generate")
        page.wait_for_selector("#lf-time .lf-running")
        page.click("#lf-stop")
        page.wait_for_selector("#lf-status >> text=/Stopped after step \\d+ of 200. \\d of 8 images/")
        num_steps = len(steps)
        page.wait_for_timeout(1000)
        assert len(steps) == num_steps < 1600
    finally:
        handle.remove()


def test_others_see_their_position(visit, studio):
    first, second = visit(), visit()
    first.get_by_label("Number of images").fill("8")
    fill(first, steps="200")
    first.click("#lf-generate")
    first.wait_for_selector("#lf-time .lf-running")
    fill(second, steps="4")
    second.click("#lf-generate")
    second.wait_for_selector("#lf-time >> text=Waiting: 1 before you")
    first.click("#lf-stop")
    second.wait_for_selector("#lf-time >> text=/Done: 4 steps/")


@pytest.mark.parametrize("leave", ["reload", "close"])
def test_leaving_in_the_middle(visit, studio, leave):
    page = visit()
    page.get_by_label("Number of images").fill("8")
    fill(page, steps="200")
    page.click("#lf-generate")
    page.wait_for_selector("#lf-time .lf-running")
    start = time.monotonic()
    if leave == "reload":
        page.reload()
        page.wait_for_selector("#lf-generate")
    else:
        page.close()
        page = visit()
    until(lambda: not studio._jobs, 30)
    assert time.monotonic() - start < 30
    create(page, seed="3", steps="4")


def test_chat(visit, studio):
    page = visit()
    open_tab(page, "Chat")
    say(page, "/paint a purple triangle")
    page.wait_for_selector("#lf-chatbot .bot img")
    say(page, "what is in the picture?")
    page.wait_for_selector("#lf-chatbot .bot >> text=a purple triangle")
    page.locator("#lf-words textarea").fill("a white cross")
    page.get_by_role("button", name="Generate an image of it").click()
    until(lambda: page.locator("#lf-chatbot .bot img").count() == 2)
    say(page, "what shape is it?")
    page.wait_for_selector("#lf-chatbot .bot >> text=cross")
    assert page.locator("#lf-chatbot button[aria-label=Share]:visible").count() == 0
    page.get_by_role("button", name="New conversation").click()
    until(lambda: page.locator("#lf-chatbot .bot").count() == 0)


def test_chat_about_an_upload(visit, studio, tmp_path):
    Image.fromarray(expected_image(studio, "a green cross", 1)).save(tmp_path / "cross.png")
    page = visit()
    open_tab(page, "Chat")
    page.locator("#lf-words input[type=file]").set_input_files(tmp_path / "cross.png")
    page.wait_for_selector("#lf-words .thumbnail-item")
    say(page, "what colour is it?")
    page.wait_for_selector("#lf-chatbot .bot >> text=green")


def test_bad_uploads_and_inputs(visit, studio, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 99)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    page = visit()
    open_tab(page, "Chat")
    for name, told in (("broken.png", "damaged"), ("moves.gif", "animation of 2 frames"), ("huge.png", "pixels")):
        page.locator("#lf-words input[type=file]").set_input_files(tmp_path / name)
        page.wait_for_selector("#lf-words .thumbnail-item")
        say(page, "what is in the picture?")
        page.wait_for_selector(f"#lf-chat-status [role=alert] >> text={told}")
        until(lambda: page.locator("#lf-words .thumbnail-item").count() == 0)
    say(page, "why " * 2500)
    page.wait_for_selector("#lf-chat-status [role=alert] >> text=9,999 characters")

    open_tab(page, "Create")
    fill(page, "a" * 10_000)
    page.click("#lf-generate")
    page.wait_for_selector("#lf-status [role=alert] >> text=10,000 characters")
    fill(page, steps="1000")
    page.click("#lf-generate")
    page.wait_for_selector("#lf-status [role=alert] >> text=from 1 to 200")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Width in pixels").fill("8192")
    fill(page, steps="")
    page.click("#lf-generate")
    page.wait_for_selector("#lf-status [role=alert] >> text=Width must be")
    page.get_by_label("Width in pixels").fill("")
    create(page, "a dragon", steps="4")
    page.wait_for_selector("#lf-status >> text=not: dragon")


def test_inside(visit, studio):
    page = visit()
    create(page, seed="3")
    image = shown_image(page)
    page.locator("#lf-tabs").get_by_role("button", name="Look inside").first.click()
    page.wait_for_selector("text=Where the time went")
    assert np.array_equal(shown_image(page, '#lf-inside img[alt="The finished image"]'), image)
    assert page.locator("#lf-inside .lf-tile").count() == 6
    # One gate for each head of the second layer of each expert, at each step.
    assert page.locator("#lf-inside .lf-gates svg rect").count() == 40 * 6


def test_compare_and_adapters(visit, studio):
    page = visit()
    open_tab(page, "Compare")
    page.locator("#lf-compare-prompt").locator("input, textarea").first.fill("a white cross")
    page.click("#lf-compare")
    page.wait_for_selector("#lf-compared .lf-pair")
    text = page.inner_text("#lf-compared")
    assert "40 steps" in text and "4 steps, few steps x 1" in text
    open_tab(page, "Adapters")
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector("text=is used from now on")
    open_tab(page, "Create")
    create(page, "a white cross", seed="1")
    assert "4 steps" in page.inner_text("#lf-about")
    # The other visitors' model has no adapter.
    other = visit()
    create(other, "a white cross", seed="1")
    assert "40 steps" in other.inner_text("#lf-about")
    assert np.array_equal(shown_image(other), expected_image(studio, "a white cross", 1))


def test_upload_of_an_adapter(visit, tmp_path):
    shutil.copy(Path(few_step_checkpoint()) / "adapter_model.safetensors", tmp_path / "mine.safetensors")
    page = visit()
    open_tab(page, "Adapters")
    page.locator("input[type=file]:visible, input[type=file]").last.set_input_files(tmp_path / "mine.safetensors")
    page.wait_for_selector("text=mine")
    page.get_by_role("button", name="Add the uploaded adapter").click()
    page.wait_for_selector("text=mine is on the shelf")
    assert "uploaded by you" in page.inner_text("#lf-adapters")
    page.get_by_role("button", name="Remove mine").click()
    page.wait_for_selector("text=mine is removed")


def test_keyboard_only(visit):
    page = visit()

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(s) => !!document.activeElement.closest(s)", selector):
                return
        pytest.fail(f"{selector} cannot be reached with the tab key")

    tab_to("#lf-prompt")
    page.keyboard.type("a red circle")
    tab_to("#lf-generate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#lf-time >> text=/Done/")
    page.evaluate("document.activeElement.blur()")
    tab_to('#lf-tabs button[role="tab"]')
    for _ in range(3):  # To the tab Chat, by the tab key or the arrows.
        if page.evaluate("document.activeElement.textContent.trim()") == "Chat":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    tab_to("#lf-words textarea")
    page.keyboard.type("/paint a white cross")
    page.keyboard.press("Enter")
    page.wait_for_selector("#lf-chatbot .bot img")


def faults(page) -> list[str]:
    """Serious faults of accessibility that axe-core finds."""
    from axe_playwright_python.sync_playwright import Axe

    return [
        f"{fault['id']}: {node['target']} {node['html'][:120]}"
        for fault in Axe().run(page).response["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": PHONE, "has_touch": True}],
    ids=["light", "dark", "phone"],
)
def test_accessibility_and_width(visit, options):
    page = visit(**options)
    create(page, seed="3", steps="6")
    assert faults(page) == []
    page.get_by_role("button", name="Look inside").first.click()
    page.wait_for_selector("text=Where the time went")
    for name in TABS:
        open_tab(page, name)
        if name == "Chat":
            say(page, "/paint a purple triangle")
            page.wait_for_selector("#lf-chatbot .bot img")
        if name == "Compare":
            page.locator("#lf-compare-prompt").locator("input, textarea").first.fill("a white cross")
            page.click("#lf-compare")
            page.wait_for_selector("#lf-compared .lf-pair")
        page.wait_for_timeout(500)
        assert faults(page) == [], name
        width, inner = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= inner, name


def test_screenshots(visit, studio):
    """The page as it is in the documentation."""
    folder = os.environ.get("LATTE_FLOW_SCREENSHOTS")

    def save(page, name: str) -> None:
        page.wait_for_timeout(700)
        data = page.screenshot(full_page=True)
        assert len(data) > 20_000
        if folder:
            image = Image.open(io.BytesIO(data)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            image.save(Path(folder, f"studio-{name}.png"), optimize=True)

    page = visit()
    page.get_by_label("Number of images").fill("4")
    create(page, seed="3")
    page.wait_for_selector("#lf-time >> text=/4 images/")
    save(page, "create")
    page.get_by_role("button", name="Look inside").first.click()
    page.wait_for_selector("text=Where the time went")
    save(page, "inside")
    open_tab(page, "Chat")
    say(page, "/paint a purple triangle above a white cross")
    page.wait_for_selector("#lf-chatbot .bot img")
    say(page, "what is above the white cross?")
    page.wait_for_selector("#lf-chatbot .bot >> text=a purple triangle")
    save(page, "chat")
    open_tab(page, "Compare")
    page.locator("#lf-compare-prompt").locator("input, textarea").first.fill("a yellow square above a red cross")
    page.get_by_label("Seed").last.fill("2")
    page.click("#lf-compare")
    page.wait_for_selector("#lf-compared .lf-pair")
    save(page, "compare")
    open_tab(page, "Adapters")
    page.get_by_label("Weight").fill("1, 1, 0.5, 1")
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector("text=is used from now on")
    save(page, "adapters")
    dark = visit(color_scheme="dark", viewport=PHONE)
    create(dark, seed="3")
    save(dark, "phone")
