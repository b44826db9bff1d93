"""Files that people name on a command line: read, checked, written, with errors of one line.

What such a file says is somebody else's matter; here it becomes JSON or lines, or an error that
names the file and what to do. `parsed` hands JSON to the reader of its schema and puts the file's
name before whatever that complains of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hexswarm.errors import UsageError

T = TypeVar("T")


def read_text(path: Path) -> str:
    """All of a text file. Raises UsageError."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", remedy="name a file that is there"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text file", remedy="is it another file?") from error


def parsed(path: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a JSON file. Raises UsageError."""
    text = read_text(path)
    try:
        said = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON: line {error.lineno}: {error.msg}",
            remedy="mend that line, or name another file",
        ) from error
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"{path}: {error}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply") from error
    try:
        return parse(said)
    except UsageError as error:
        raise UsageError(f"{path}: {error.cause}", remedy=error.remedy) from error
    except OverflowError as error:
        raise UsageError(f"{path}: a number is not finite") from error


def check_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path | None]) -> None:
    """That files which are to be written can be, before the work whose results they take.

    None: not asked for. Raises UsageError, also for a name that is given twice.
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in taken and not path.is_char_device():
            raise UsageError(f"{path} would be overwritten", remedy="name another file")
        if path.is_dir():
            raise UsageError(f"{path} is a folder", remedy=f"name a file, as {path / 'x'}")
        if not path.parent.is_dir():
            raise UsageError(
                f"{path} cannot be written: there is no folder {path.parent}",
                remedy="make it, or name another",
            )
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written", remedy="name a file that is yours")
        taken.add(path.resolve())


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises UsageError."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}", remedy="name another file"
        ) from error
