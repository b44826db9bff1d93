"""Renders chat templates in a process of their own, within 2 s and 1 MiB.

Why a process: see `hexswarm.template_worker`, which is that process. It is started with the first
chat (0.2 s) and kept; what takes too long or dies is killed and started anew for the next chat. It
sees the template and this chat's messages; no environment, no files of ours, no network address.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hexswarm.errors import UsageError

WORKER = Path(__file__).with_name("template_worker.py")
RENDER_S = 2.0
START_S = 20.0
"""Limit for the worker to be ready; a machine may be busy."""
MAX_TEMPLATE = 1 << 20
"""Characters; those of known models have up to 20,000."""
MAX_ANSWER = 8 << 20
"""Bytes of an answer: MAX_TEXT characters, each written as six at most, and the rest."""


class Templates:
    """A worker, started when first needed; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text of `template`; UsageError if it fails, takes too long or grows too large."""
        if len(template) > MAX_TEMPLATE:
            raise UsageError(f"it has {len(template)} characters")
        request = json.dumps({"template": template, "variables": dict(variables)})
        with self._lock:
            answer = self._ask(request.encode() + b"\n")
        if "text" not in answer:
            raise UsageError(str(answer.get("error", "it gave no text")))
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer = json.loads(_line(process, RENDER_S))
        except TimeoutError:
            self._end()
            return {"error": f"it took longer than {RENDER_S:g} s"}
        except (OSError, EOFError, ValueError):
            self._end()
            return {"error": "it ended the process that renders it"}
        return answer if isinstance(answer, dict) else {}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONUTF8": "1"},
            cwd="/",
            start_new_session=True,
        )
        self._process = process
        weakref.finalize(self, _kill, process)
        try:
            _line(process, START_S)
        except (OSError, EOFError, TimeoutError) as error:
            self._end()
            raise UsageError(
                "the process that renders chat templates does not start",
                remedy="check that jinja2 is installed, or use a plain prompt",
            ) from error
        return process

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _line(process: subprocess.Popen[bytes], within_s: float) -> bytes:
    """One line of its output. Raises EOFError, TimeoutError, or ValueError if it is too long."""
    assert process.stdout is not None
    deadline_s, line = time.monotonic() + within_s, bytearray()
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not waiting.select(left_s):
                raise TimeoutError
            part = process.stdout.raw.read(1 << 16)  # type: ignore[attr-defined]  # buffered
            if not part:
                raise EOFError
            line += part
            if len(line) > MAX_ANSWER:
                raise ValueError("too long an answer")
    return bytes(line)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it, whatever it does, and give its pipes back."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
