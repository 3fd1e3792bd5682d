# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""The sampling schedule: sigmas, solvers, and the expert of each step."""
