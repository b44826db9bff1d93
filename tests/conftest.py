"""Settings of the whole test run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Triton decides when a kernel is defined whether it compiles or interprets it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidia0").exists() else "1")

# A shared machine stalls for longer than any sensible deadline; pytest-timeout guards the test.
hypothesis.settings.register_profile("hexswarm", deadline=None)
hypothesis.settings.load_profile("hexswarm")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A door that a test enters in this process sets logging up for the process."""
    logger = logging.getLogger("hexswarm")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
