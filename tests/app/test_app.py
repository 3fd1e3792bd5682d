# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The start of the studio, and its server without a browser."""

import json
import runpy
import shutil
import socket
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from latte_flow_cli import app as command
from latte_flow_hf.app import app


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(studio):
    """Serve the page; gives a client for it."""
    pages = []

    def serve(**arguments) -> httpx.Client:
        port = free_port()
        pages.append(app.launch(studio, port=port, blocks_thread=False, **arguments))
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    yield serve
    for page in pages:
        page.close()


@pytest.fixture
def busy_port():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_busy_port_is_one_line_before_anything_is_loaded(busy_port):
    result = CliRunner().invoke(command, ["studio", "--port", str(busy_port), "--model", "no/model"])
    assert result.exit_code == 1
    assert result.stderr.strip() == (f"Error: port {busy_port} of 127.0.0.1 is in use; choose another one by --port.")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "203.0.113.7"], "host must be an address of this machine"),
        (["--host", "not a host"], "host must be an address of this machine"),
        (["--auth", "secret"], "must be user:password"),
        (["--auth", ":secret"], "must be user:password"),
        (["--adapters", "nowhere"], "there is none at nowhere"),
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_are_told_before_the_page_starts(arguments, told):
    result = CliRunner().invoke(command, ["studio", "--port", str(free_port()), *arguments])
    assert result.exit_code == 1 and told in result.stderr and "Traceback" not in result.stderr
    assert "secret" not in result.stderr


def test_auth_from_the_environment(monkeypatch):
    monkeypatch.delenv(app.AUTH_VARIABLE, raising=False)
    assert app.read_auth(None) is None
    monkeypatch.setenv(app.AUTH_VARIABLE, "ada:love:lace")
    assert app.read_auth(None) == ("ada", "love:lace")
    assert app.read_auth("grace:hopper") == ("grace", "hopper")


def test_the_page_is_served_and_no_file_beyond_uploads(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("the words")
    client = serve()
    page = client.get("/")
    assert page.status_code == 200 and "LaTtE-Flow studio" in page.text
    for path in ("/etc/passwd", str(tmp_path / "secret.txt"), "secret.txt", str(Path(app.__file__)), "../secret.txt"):
        answer = client.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404) and "the words" not in answer.text, path
    config = client.get("/config").json()
    assert config["analytics_enabled"] is False and config["footer_links"] == []
    # A page of another origin cannot use it.
    answer = client.post("/gradio_api/queue/join", json={}, headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in answer.headers


def test_auth_is_asked_for(serve):
    client = serve(auth=("ada", "lovelace"))
    assert client.get("/config").status_code == 401
    assert client.post("/login", data={"username": "ada", "password": "wrong"}).status_code == 400
    assert client.post("/login", data={"username": "ada", "password": "lovelace"}).status_code == 200
    assert client.get("/config").status_code == 200


def call(client: httpx.Client, name: str, data: list, session: str) -> list[dict]:
    """Call a function of the page as the browser does: the messages until it is complete."""
    config = client.get("/config").json()
    index = next(fn["id"] for fn in config["dependencies"] if fn["api_name"] == name)
    body = {"data": data, "fn_index": index, "session_hash": session}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    messages = []
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                messages.append(json.loads(line.removeprefix("data:")))
                if messages[-1]["msg"] == "process_completed":
                    break
    return messages


def test_bad_requests_that_pass_by_the_page_get_a_message(serve):
    """Not only the browser sends requests."""
    client = serve()
    for number, (data, told) in enumerate(
        (
            (["a" * 10_000, "", "", "", None, None, 1, None, None], "10,000 characters"),
            (["a", "0", "9999", "", None, None, 1, None, None], "Steps must be"),
            (["a", "0", "", "", 100_000, None, 1, None, None], "Width must be"),
        )
    ):
        messages = call(client, "create", data, f"s{number}")
        assert messages[-1]["success"] and told in json.dumps(messages), data
    messages = call(client, "create", ["a red circle", "0", "2", "", None, None, 1, None, None], "good")
    assert messages[-1]["success"] and "Done: 2 steps" in json.dumps(messages)


def test_a_copy_of_the_file_is_the_app_of_a_space(tmp_path, monkeypatch, pipeline):
    shutil.copy(app.__file__, tmp_path / "app.py")
    port = free_port()
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    monkeypatch.setenv("LATTE_FLOW_MODEL", pipeline)
    page = runpy.run_path(str(tmp_path / "app.py"))["main"](blocks_thread=False)
    try:
        assert "LaTtE-Flow studio" in httpx.get(f"http://127.0.0.1:{port}/").text
    finally:
        page.close()


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(command, ["studio", "--port", str(free_port()), "--model", "no/model"])
    assert result.exit_code == 1 and "install the extra 'app'" in result.stderr
