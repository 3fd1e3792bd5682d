# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The studio: a page in the browser for generating images, chatting, and seeing what the experts do.

Nothing but `page` and `app` imports Gradio.
"""
