"""The tree of errors: drawn as it is, each one line, each with its content."""

from __future__ import annotations

import inspect
import re

import pytest

from hexswarm import errors
from hexswarm.errors import (
    ContextTooLong,
    HexswarmError,
    NoRoute,
    PeerLost,
    Refused,
    UsageError,
)

CLASSES = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, HexswarmError)
]


def test_the_drawing_is_the_tree() -> None:
    """Each class stands in the docstring of its module, one step deeper than its base."""
    depth: dict[str, int] = {}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"^    ([│├└─ ]*)([A-Z]\w+)", line):
            depth[found[2]] = len(found[1]) // 4
    assert set(depth) == {item.__name__ for item in CLASSES}
    for item in CLASSES:
        if item is not HexswarmError:
            base = next(base for base in item.__bases__ if issubclass(base, HexswarmError))
            assert depth[item.__name__] == depth[base.__name__] + 1


def test_the_text_is_the_cause_and_the_remedy_on_one_line() -> None:
    assert str(HexswarmError("it broke")) == "it broke"
    error = NoRoute("no peer serves layer 3", missing=[(3, 4)], remedy="start one")
    assert str(error) == "no peer serves layer 3; start one"
    assert (error.cause, error.remedy, error.missing) == (
        "no peer serves layer 3",
        "start one",
        ((3, 4),),
    )


def test_a_mistake_of_the_caller_is_a_value_error_with_exit_status_2() -> None:
    assert issubclass(UsageError, ValueError)
    for item in CLASSES:
        assert item.exit_status == (2 if issubclass(item, UsageError) else 1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ContextTooLong(900, 200, 1024),
            "prompt of 900 tokens + 200 new tokens exceeds the context of 1024; "
            "shorten the prompt or lower max_new_tokens",
        ),
        (
            PeerLost("12D3KooWabcdefgh", (3, 9), "stopped answering"),
            "peer abcdefgh (layers 3-8) stopped answering; send the request again",
        ),
        (PeerLost("12D3KooWabcdefgh", None, "left"), "peer abcdefgh left; send the request again"),
        (
            Refused("12D3KooWabcdefgh", "full", "no KV is free", 3.0),
            "peer abcdefgh refused: no KV is free; try again in 3 s",
        ),
        (Refused("12D3KooWabcdefgh", "model", "x"), "peer abcdefgh refused: x"),
    ],
)
def test_errors_with_content_tell_it(error: HexswarmError, text: str) -> None:
    assert str(error) == text
    assert "\n" not in text
