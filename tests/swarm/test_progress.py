"""Progress: bars on a terminal, one log line per job without one."""

from __future__ import annotations

import io
import logging

import pytest

from hexswarm.progress import Progress, Quiet, Terminal


class Screen(io.StringIO):
    """A stderr that is a terminal, or says that it is none."""

    def __init__(self, *, tty: bool) -> None:
        super().__init__()
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


def work(progress: Progress) -> None:
    progress.note("waiting")
    with progress.bar("hashing", 4_000_000) as advance:
        advance(4_000_000)


def test_a_terminal_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(tty=True)
    monkeypatch.setattr("sys.stderr", screen)
    work(Terminal())
    assert "waiting\n" in screen.getvalue()
    assert "hashing" in screen.getvalue()


def test_without_a_terminal_there_are_single_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Screen(tty=False)
    monkeypatch.setattr("sys.stderr", screen)
    with caplog.at_level(logging.INFO):
        work(Terminal())
    assert screen.getvalue() == ""
    assert [record.message for record in caplog.records] == ["waiting", "hashing: 4.0 MB done"]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    work(Quiet())
    assert capfd.readouterr() == ("", "")
