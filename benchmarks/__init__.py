# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""Speed and memory benchmarks. Not installed: run them from the repository's root, see README.md."""
