"""What came of a seed of the simulated world, and what surrounds it while it is played."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import hexswarm.tracing
from tests.simulation.invariants import Listener


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a seed."""

    seed: int
    broken: tuple[tuple[str, str], ...]
    trace: str
    events: int
    done: int
    failed: int
    abandoned: int
    stalls_s: tuple[float, ...]
    """Longest wait between tokens of each request that was answered while faults happened."""
    virtual_s: float
    epochs: int = 0
    """Of groups, that served."""
    sums: int = 0
    """Of groups, that went into answers."""
    shown_s: float = 0.0
    away_s: float = 0.0
    """See `Watch`."""
    lines: tuple[str, ...] = field(default=(), repr=False)


@contextlib.contextmanager
def controlled(seed: int) -> Iterator[Listener]:
    """No chance and no disk but the seed's; errors are heard instead of printed."""
    listener, urandom, save = Listener(), os.urandom, hexswarm.tracing.save
    loggers = [logging.getLogger(name) for name in ("hexswarm", "asyncio")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    os.urandom = random.Random(f"bytes {seed}").randbytes
    hexswarm.tracing.save = lambda *_: None
    for logger in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
    try:
        yield listener
    finally:
        os.urandom, hexswarm.tracing.save = urandom, save
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagate
