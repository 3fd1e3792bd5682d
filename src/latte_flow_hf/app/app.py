# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Starts the studio. This file is also the `app.py` of a Space on the hub: its imports are absolute for that, and it
is set up by environment variables: LATTE_FLOW_MODEL, LATTE_FLOW_ADAPTERS, LATTE_FLOW_STUDIO_AUTH.
"""

import errno
import os
import socket
from pathlib import Path
from typing import Any


# Gradio asks its maker for the newest version, and reports launches, unless told not to before it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Nor does it keep a list of requests, which it would summarize after each one.
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"

AUTH_VARIABLE = "LATTE_FLOW_STUDIO_AUTH"


def read_auth(auth: str | None) -> tuple[str, str] | None:
    """`user:password`, of the argument or else of the environment variable.

    Raises:
        `ValueError`: if it has another form. The message does not repeat it.
    """
    auth = auth or os.environ.get(AUTH_VARIABLE)
    if not auth:
        return None
    user, colon, password = auth.partition(":")
    if not user or not colon or not password:
        raise ValueError(f"auth (or {AUTH_VARIABLE}) must be user:password, with neither empty.")
    return user, password


def check_port(host: str, port: int) -> None:
    """
    Raises:
        `ValueError`: if the address is not one of this machine.
        `OSError`: if the port is in use, or may not be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server does: without it, connections that were closed a moment ago would count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ValueError(f"host must be an address of this machine, such as 127.0.0.1, got {host!r}.") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"host must be an address of this machine, such as 127.0.0.1, got {host!r}."
                ) from error
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise OSError(f"port {port} of {host} {reason}; choose another one by --port.") from error


def make_studio(
    pipe: Any, name: str, adapters: str | Path | None = None, others: dict[str, Any] | None = None, **limits: Any
) -> Any:
    """A studio around a pipeline.

    Args:
        pipe ([`LatteFlowPipeline`]): the pipeline.
        name (`str`): what visitors see.
        adapters (`str` or `Path`, *optional*): a folder of PEFT folders.
        others (`dict[str, LatteFlowPipeline]`, *optional*): further pipelines for comparisons.
        limits: fields of [`limits.Limits`].

    Raises:
        `ValueError`, `OSError`: if an adapter does not fit.
    """
    from latte_flow_hf.app.limits import Limits
    from latte_flow_hf.app.studio import Studio

    studio = Studio(pipe, name, others, Limits(**limits))
    if adapters is not None:
        studio.shelf.add_folder(adapters)
    return studio


def launch(
    studio: Any,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
    blocks_thread: bool = True,
) -> Any:
    """Serve the page of a studio until the process ends.

    Args:
        studio ([`studio.Studio`]): the studio.
        host (`str`): the address; `127.0.0.1` is this machine alone, `0.0.0.0` everybody.
        port (`int`): the port.
        auth (`tuple[str, str]`, *optional*): user and password that are asked for.
        blocks_thread (`bool`): `False` returns when the page is served; `close()` of what is returned ends it.

    Raises:
        `OSError`, `ValueError`: for the reasons of `check_port`.
    """
    check_port(host, port)
    from latte_flow_hf.app.page import CSS, HEAD, THEME, build_page

    page = build_page(studio)
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        css=CSS,
        head=HEAD,
        theme=THEME,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        allowed_paths=[],
        max_file_size=max(studio.limits.adapter_bytes, studio.limits.upload_bytes),
        state_session_capacity=200,
        strict_cors=True,
        prevent_thread_lock=True,
    )
    if blocks_thread:
        shown = f"[{host}]" if ":" in host else host
        print(f"studio: http://{shown}:{port} (end it with Ctrl+C)", flush=True)
        page.block_thread()
    return page


def main(blocks_thread: bool = True) -> Any:
    """Serve the model of the environment variables; the embedded checkpoint if there is none."""
    from latte_flow_hf.checkpoints import tiny_checkpoint
    from latte_flow_hf.pipelines.pipeline_latte_flow import LatteFlowPipeline

    model = os.environ.get("LATTE_FLOW_MODEL")
    auth = read_auth(None)
    pipe = LatteFlowPipeline.from_pretrained(model or tiny_checkpoint())
    studio = make_studio(pipe, model or "tiny world", os.environ.get("LATTE_FLOW_ADAPTERS"))
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    return launch(studio, host, port, auth, blocks_thread)


if __name__ == "__main__":
    main()
