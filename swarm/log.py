"""Logging as doors set it up: one line per event on stderr, nothing of anybody's text.

Libraries never configure logging; a door calls `set_up` once. No prompt, answer, activation or key
is logged at any level.
"""

from __future__ import annotations

import logging
import sys

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def set_up(verbose: int = 0) -> None:
    """Log to stderr: warnings, with -v information, with -vv everything of ours."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    logger = logging.getLogger("hexswarm")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(_LEVELS[min(verbose, len(_LEVELS) - 1)])
    if not verbose:  # hivemind leaves tasks behind whose failures nobody takes
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
