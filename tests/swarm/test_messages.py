"""The schema of messages: what is legal survives a round trip, everything else is refused."""

from __future__ import annotations

import dataclasses
import struct
import time
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm import messages as module
from hexswarm.errors import LocalProtocolError, RemoteProtocolError, UsageError
from hexswarm.messages import (
    MAX_HEADER_BYTES,
    MAX_TOKENS,
    Generate,
    GoAway,
    Hello,
    Hidden,
    Message,
    Open,
    Ping,
    Refuse,
    Tokens,
    decode,
    encode,
    neighbour,
)
from tests.frames import messages

KEY = bytes(range(16))
PING = Ping(7)
OPEN = Open(KEY, 1, "d" * 64, 0, 4, "tail", "next", ("/ip4/1.2.3.4/tcp/5",), 100)
HIDDEN = Hidden(KEY, 0, 0, 0, 1, True, "float32")
GENERATE = Generate(KEY, 0, 0, 10, (2,), 0.0, 1.0, 0, 0.0, 1.0, 7)


@given(messages)
def test_round_trip(message: Message) -> None:
    """Every legal message is understood as it was meant, whatever its size."""
    assert decode(encode(message)) == message


def test_every_kind_has_a_number_of_its_own() -> None:
    """Slotted dataclasses are made twice, so classes are told apart by name."""
    kinds = {kind.__name__: kind.KIND for kind in Message.__subclasses__()}
    assert sorted(kinds.values()) == list(range(len(kinds)))
    assert kinds == {kind.__name__: number for number, kind in module._KINDS.items()}


def test_the_largest_open_fits_a_header() -> None:
    address = "/ip6/2001:0db8:85a3:0000:0000:8a2e:0370:7334/tcp/65535/p2p/" + "1" * 52
    peer = "1" * 52
    largest = Open(
        KEY,
        1 << 16,
        "f" * 64,
        4095,
        4096,
        peer,
        peer,
        (address + "/p2p-circuit",) * 8,
        MAX_TOKENS,
        1e-300,
    )
    assert len(encode(largest)) < MAX_HEADER_BYTES / 4


WRONG: list[Any] = [
    None,
    True,
    -1,
    1 << 63,
    1.5,
    float("nan"),
    float("inf"),
    "text",
    "x" * 300,
    b"bytes",
    b"x" * 16,
    [],
    [[1]],
    [None],
    {},
]


@given(messages, st.data())
def test_a_value_of_another_type_is_refused_on_both_sides(
    message: Message, data: st.DataObject
) -> None:
    """What `encode` refuses, `decode` refuses too, and nothing changes its meaning on the way."""
    field = data.draw(st.sampled_from(dataclasses.fields(message)))
    value = data.draw(st.sampled_from(WRONG))
    forged = dataclasses.replace(message, **{field.name: value})
    try:
        header = encode(forged)
    except LocalProtocolError:
        values = [getattr(forged, item.name) for item in dataclasses.fields(forged)]
        with pytest.raises(RemoteProtocolError):
            decode(msgpack.packb([message.KIND, *values]))
    else:
        assert decode(header) == forged or value == []


@pytest.mark.parametrize(
    "message",
    [
        dataclasses.replace(HIDDEN, count=0),
        dataclasses.replace(HIDDEN, position=MAX_TOKENS + 1),
        dataclasses.replace(HIDDEN, dtype="float64"),
        dataclasses.replace(HIDDEN, session=KEY[:-1]),
        dataclasses.replace(OPEN, kv_tokens=0),
        dataclasses.replace(OPEN, end=0),
        dataclasses.replace(OPEN, successor_addresses=("/a",) * 9),
        dataclasses.replace(OPEN, successor_addresses=("x" * 257,)),
        dataclasses.replace(OPEN, epoch=(1 << 16) + 1),
        dataclasses.replace(GENERATE, stop_ids=(1,) * 65),
        dataclasses.replace(GENERATE, stop_ids=(True,)),
        dataclasses.replace(GENERATE, seed=1 << 64),
        dataclasses.replace(GENERATE, temperature=10**400),
        Refuse(KEY, 0, "full", "\ud800", 0.0),
        Hello(1, "", 2, KEY),
        GoAway(float("inf")),
    ],
    ids=str,
)
def test_we_do_not_send_what_is_out_of_range(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


def test_an_unknown_class_is_our_mistake() -> None:
    with pytest.raises(LocalProtocolError):
        encode(Message())


def _packed(*values: Any) -> bytes:
    data: bytes = msgpack.packb(list(values))
    return data


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        _packed(),
        _packed(1),
        _packed(1, 2, 3),
        _packed(1, 2) + b"\0",
        _packed(99, 2),
        _packed(-1, 2),
        _packed(True, 2),
        _packed("1", 2),
        _packed([1], 2),
        _packed(None),
        msgpack.packb({1: 2}),
        msgpack.packb({}),
        msgpack.packb(7),
        msgpack.packb("text"),
        _packed(1, {}),
        _packed(1, msgpack.ExtType(5, b"x")),
        _packed(1, msgpack.ExtType(5, b"")),
        _packed(1, msgpack.Timestamp(1)),
        b"\x92\x01\xc7\x00\xff",
        b"\x92\x01\xc7\x00\x05",
        b"\x91" * 4000,
        b"\x92\x01" + b"\x91" * 4000 + b"\x00",
        b"\x91" * 70000,
        b"\x92\x01\xdd" + struct.pack("!I", 0xFFFFFFFF),
        b"\x92\x01\xdf" + struct.pack("!I", 0xFFFFFFFF),
        b"\x92\x01\xdb" + struct.pack("!I", 0xFFFFFFFF),
        b"\x92\x01\xc6" + struct.pack("!I", 0xFFFFFFFF),
        b"\x92\x01\xc9" + struct.pack("!I", 0xFFFFFFFF),
        b"\xdd" + struct.pack("!I", 0x7FFFFFFF) + b"\x01",
        b"\x92\x01\xa4\xff\xff\xff\xff",
    ],
)
def test_hostile_headers_cost_nothing(header: bytes) -> None:
    """Wrong arity, foreign types, nesting and huge lengths are refused in well under 10 ms."""
    began = time.perf_counter()
    with pytest.raises(RemoteProtocolError):
        decode(header)
    assert time.perf_counter() - began < 0.05


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(header: bytes) -> None:
    try:
        message = decode(header)
    except RemoteProtocolError:
        return
    assert encode(message)


def test_defaults_are_written_out() -> None:
    """The arity on the wire is fixed: an absent field is no second way to say zero."""
    tokens = Tokens(KEY, 0, 0, 5, True)
    assert decode(encode(tokens)).siblings == 0  # type: ignore[attr-defined]
    with pytest.raises(RemoteProtocolError):
        decode(_packed(7, KEY, 0, 0, 5, True))


def test_views_of_a_message() -> None:
    assert str(OPEN.span) == "0:4"
    assert GENERATE.sampling.greedy
    with pytest.raises(UsageError):
        _ = dataclasses.replace(GENERATE, temperature=-1.0).sampling
    assert neighbour("") is None
    assert neighbour("peer") == "peer"
