"""Settings of the whole test run."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis

# Triton decides when a kernel is defined whether it compiles or interprets it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidia0").exists() else "1")

# A shared machine stalls for longer than any sensible deadline; pytest-timeout guards the test.
hypothesis.settings.register_profile("hexswarm", deadline=None)
hypothesis.settings.load_profile("hexswarm")
