"""Telling a person how far a long job is: downloads, hashing, conversion, loading.

Cores that take long accept a `Progress` and know nothing of terminals. `Terminal` draws a tqdm bar
on a tty; without one (a service log, a test) a bar becomes a single line in the module's log when
the work is done, because half-drawn bars make logs unreadable. `Quiet`, the default everywhere,
says nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], object]
"""Called with the number of bytes done since the last call."""

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Where a long job reports to."""

    def note(self, text: str) -> None:
        """Say one line, e.g. what is waited for."""

    def bar(self, what: str, total_bytes: int) -> AbstractContextManager[Advance]:
        """Open a bar for `what`; the context's value advances it."""


class Quiet:
    """Reports to nobody."""

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def bar(self, what: str, total_bytes: int) -> Iterator[Advance]:
        yield lambda _: None


class Terminal:
    """Bars on stderr if it is a terminal, else one log line per finished job."""

    def note(self, text: str) -> None:
        if not sys.stderr.isatty():
            logger.info("%s", text)
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    @contextmanager
    def bar(self, what: str, total_bytes: int) -> Iterator[Advance]:
        if not sys.stderr.isatty():
            yield lambda _: None
            logger.info("%s: %.1f MB done", what, total_bytes / 1e6)
            return
        from tqdm import tqdm

        with tqdm(
            total=total_bytes,
            desc=what,
            unit="B",
            unit_scale=True,
            leave=False,
            file=sys.stderr,
        ) as bar:
            yield bar.update


@contextmanager
def gauge(what: str, total_s: float) -> Iterator[Callable[[float, str], None]]:
    """A bar over seconds: the context's value takes how many are done, and a word beside the bar.

    Without a terminal it says nothing.
    """
    if not sys.stderr.isatty():
        yield lambda done_s, words: None
        return
    from tqdm import tqdm

    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=total_s, desc=what, leave=False, file=sys.stderr, bar_format=form) as bar:

        def show(done_s: float, words: str) -> None:
            bar.set_postfix_str(words, refresh=False)
            bar.update(min(done_s, total_s) - bar.n)

        yield show
