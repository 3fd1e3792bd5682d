# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The tiny world, on which the embedded checkpoint is trained: shapes, handwritten digits, questions, an oracle."""
