"""What hivemind's decoders are handed, without a network."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest

from hexswarm.directory import MAX_RECORD_BYTES
from hexswarm.guard import guard_decoding, unpack_dictionary
from hexswarm.shelf import MAX_ENTRIES
from hexswarm.transports.libp2p import load_hivemind

ENTRY = ["12D3Koo", b"value", 1.7e9]


def packed(*entries: Any, maxsize: Any = math.inf, latest: Any = 1.7e9) -> bytes:
    data: bytes = msgpack.packb([maxsize, latest, list(entries)])
    return data


def test_hivemind_writes_what_we_read() -> None:
    guard_decoding()
    load_hivemind()
    from hivemind.dht.storage import DictionaryDHTValue

    made = DictionaryDHTValue()
    made.store("a", b"1", 4e9)
    made.store("b", b"2", 4e9 + 1)
    assert unpack_dictionary(made.packb()) == [("a", b"1", 4e9), ("b", b"2", 4e9 + 1)]
    read = load_hivemind().MSGPackSerializer.loads(load_hivemind().MSGPackSerializer.dumps(made))
    assert dict(read.items()) == dict(made.items())
    assert read.latest_expiration_time == 4e9 + 1
    small = DictionaryDHTValue.unpackb(packed(ENTRY, maxsize=1, latest=math.inf))
    assert small.maxsize == math.inf, "a stranger does not say how much we hold"
    assert small.latest_expiration_time == 1.7e9, "nor until when"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x91" * 3000,
        msgpack.packb([1, 2]),
        msgpack.packb({}),
        packed(["a", b"1"]),
        packed([1, b"1", 1.0]),
        packed(["a", "1", 1.0]),
        packed(["a", b"1", 1]),
        packed(["a", b"1", math.inf]),
        packed(["a", b"1", math.nan]),
        packed(["a" * 65, b"1", 1.0]),
        packed(["a", bytes(MAX_RECORD_BYTES + 9), 1.0]),
        packed(["a", msgpack.ExtType(0x40, b"\x90"), 1.0]),
        packed([[], b"1", 1.0]),
        packed(*[ENTRY] * (MAX_ENTRIES + 1)),
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_any_other_dictionary_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        unpack_dictionary(raw)


def test_the_largest_dictionary_is_read() -> None:
    whole = packed(*[["a" * 64, bytes(MAX_RECORD_BYTES), 1.0]] * MAX_ENTRIES)
    assert len(whole) < 4 << 20, "it fits one answer"
    assert len(unpack_dictionary(whole)) == MAX_ENTRIES
