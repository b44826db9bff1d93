"""Framing: any split of the same bytes gives the same frames, and lies are caught early."""

from __future__ import annotations

import itertools
import random
import struct
import sys
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import LocalProtocolError, RemoteProtocolError
from hexswarm.messages import MAX_HEADER_BYTES, MAX_TOKENS, GoAway, Hidden, Open, Ping, Tokens
from hexswarm.wire import (
    FRAME_DEADLINE_S,
    MAX_PAYLOAD_BYTES,
    Frame,
    FrameDecoder,
    Limits,
    pack,
)
from tests.frames import frames

KEY = bytes(16)


def data_of(frame: Frame) -> bytes:
    return b"".join(pack(frame.message, frame.payload))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(pieces: list[bytes]) -> list[Frame]:
    decoder = FrameDecoder()
    return [frame for piece in pieces for frame in decoder.feed(piece, 0.0)]


@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 1 << 16), max_size=8))
def test_any_split_gives_the_same_frames(sent: list[Frame], places: list[int]) -> None:
    data = b"".join(map(data_of, sent))
    assert read(cut(data, places)) == sent


@settings(max_examples=20)
@given(st.lists(frames, max_size=3))
def test_byte_by_byte(sent: list[Frame]) -> None:
    data = b"".join(map(data_of, sent))
    assert read([data[i : i + 1] for i in range(len(data))]) == sent


def test_a_frame_is_handed_out_with_its_last_byte() -> None:
    decoder, data = FrameDecoder(), data_of(Frame(Ping(1), b"payload"))
    assert decoder.feed(data[:-1], 0.0) == []
    assert decoder.feed(data[-1:] + data, 0.0) == [Frame(Ping(1), b"payload")] * 2


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (0, 0),
        (0, 5),
        (MAX_HEADER_BYTES + 1, 0),
        (1 << 31, 0),
        (10, MAX_PAYLOAD_BYTES + 1),
        (10, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
def test_limits_are_checked_on_the_prefix(header: int, payload: int) -> None:
    """Eight bytes are enough to be refused; nothing of the announced size is allocated."""
    tracemalloc.start()
    try:
        decoder = FrameDecoder()
        with pytest.raises(RemoteProtocolError, match="over the limits"):
            decoder.feed(struct.pack("!II", header, payload), 0.0)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
        with pytest.raises(RemoteProtocolError):
            decoder.feed(b"more", 0.0)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [-3, -1, 1, 3])
def test_a_frame_that_lies_about_its_header_is_refused(change: int) -> None:
    data = data_of(Frame(GoAway(1.0)))
    size = struct.unpack("!I", data[:4])[0] + change
    lie = struct.pack("!II", size, 0) + data[8:] + bytes(8)
    with pytest.raises(RemoteProtocolError):
        FrameDecoder().feed(lie, 0.0)


def test_trickled_bytes_use_bounded_memory() -> None:
    """A hundred kilobytes in single bytes: the buffer holds one frame, and time stays linear."""
    data = data_of(Frame(GoAway(1.0), bytes(50_000)))
    stream, decoder, count = data * 2, FrameDecoder(), 0
    tracemalloc.start()
    try:
        for index in range(len(stream)):
            count += len(decoder.feed(stream[index : index + 1], 0.0))
            assert len(decoder._buffer) <= len(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 2
    assert peak < 4 * len(data)


def test_the_largest_frame_passes() -> None:
    frame = Frame(GoAway(1.0), bytes(MAX_PAYLOAD_BYTES))
    assert read(cut(data_of(frame), [1, 7, 9, 1 << 18, 1 << 20])) == [frame]


def test_we_do_not_send_over_the_limits() -> None:
    with pytest.raises(LocalProtocolError, match="over the limits"):
        pack(GoAway(1.0), bytes(MAX_PAYLOAD_BYTES + 1))
    address = "\U0001f41d" * 256
    message = Open(KEY, 0, "", 0, 1, "", "", (address,) * 8, 1)
    with pytest.raises(LocalProtocolError, match="over the limits"):
        pack(message)


def test_a_payload_is_not_copied() -> None:
    payload = memoryview(bytearray(b"12345678")).cast("I")
    start, rest = pack(Ping(1), payload)
    assert rest is payload
    assert FrameDecoder().feed(bytes(start) + bytes(rest), 0.0) == [Frame(Ping(1), b"12345678")]


@settings(max_examples=300)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_random_bytes(data: bytes, places: list[int]) -> None:
    """Frames or RemoteProtocolError, never another exception."""
    decoder = FrameDecoder()
    try:
        for piece in cut(data, places):
            decoder.feed(piece, 0.0)
    except RemoteProtocolError:
        with pytest.raises(RemoteProtocolError):
            decoder.feed(b"\0", 0.0)


@settings(max_examples=300)
@given(st.lists(frames, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_damaged_frames(sent: list[Frame], rng: random.Random) -> None:
    """Valid frames with bytes changed, lost or doubled: likewise, and at once."""
    data = bytearray(b"".join(map(data_of, sent)))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice([0, 0xC7, 0xD8, 0xDD, 0xDF, 0xFF])
            case 2 if len(data) > 1:
                del data[at]
            case _:
                data[at:at] = data[at : at + 9]
    began = time.perf_counter()
    try:
        got = read(cut(bytes(data), [rng.randrange(999) for _ in range(3)]))
    except RemoteProtocolError:
        got = []
    assert all(isinstance(frame, Frame) for frame in got)
    assert time.perf_counter() - began < 0.5


@given(st.lists(frames, max_size=9), st.lists(st.integers(0, 1 << 16), max_size=8))
def test_a_few_frames_at_a_time_are_the_same_frames(sent: list[Frame], places: list[int]) -> None:
    """And none is left behind: `more` says that there are some."""
    decoder = FrameDecoder(Limits(frames=2))
    got: list[Frame] = []
    for piece in cut(b"".join(map(data_of, sent)), places):
        got += decoder.feed(piece, 0.0)
        while decoder.more:
            found = decoder.feed(b"", 0.0)
            assert 0 < len(found) <= 2
            got += found
    assert got == sent
    assert decoder.held == 0


def test_limits_may_change_in_the_middle_of_a_frame() -> None:
    """The sender took part in something, and does not any more."""
    data = data_of(Frame(GoAway(1.0), bytes(1000)))
    decoder = FrameDecoder(Limits(payload_bytes=999))
    with pytest.raises(RemoteProtocolError, match="over the limits"):
        decoder.feed(data[:8], 0.0)
    decoder = FrameDecoder(Limits(payload_bytes=1000))
    assert decoder.feed(data[:500], 0.0) == []
    decoder.limits = Limits(payload_bytes=999)
    with pytest.raises(RemoteProtocolError, match="over the limits"):
        decoder.feed(data[500:], 0.0)
    assert decoder.held == 0
    with pytest.raises(RemoteProtocolError, match="broke off"):
        decoder.feed(data, 0.0)


def test_memory_is_given_back_with_the_frame() -> None:
    """Whether it came whole, in pieces, or broke off."""
    data = data_of(Frame(GoAway(1.0), bytes(MAX_PAYLOAD_BYTES)))
    decoder = FrameDecoder()
    for pieces in ([data], cut(data, [1, 7, 9, 1 << 18, 1 << 20])):
        assert sum(len(decoder.feed(piece, 0.0)) for piece in pieces) == 1
        assert decoder.held == 0
        assert sys.getsizeof(decoder._buffer) < 1 << 10
    decoder.feed(data[:-1], 0.0)
    assert decoder.held == len(data) - 1
    assert sys.getsizeof(decoder._buffer) < 1.2 * len(data)
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"x" + bytes([255]) * 8, 0.0)
    assert sys.getsizeof(decoder._buffer) < 1 << 10


def test_overhead_of_a_step() -> None:
    """What a decode step adds to its activations, with every field as long as it gets."""
    big = 1 << 16
    hidden = Hidden(b"\xff" * 16, big, big, MAX_TOKENS, 1 << 20, True, "bfloat16", big)
    tokens = Tokens(b"\xff" * 16, big, big, MAX_TOKENS, True, big)
    for message in (hidden, tokens):
        frame = data_of(Frame(message, b"1234"))
        assert len(frame) - 4 <= 120


def test_a_frame_has_a_deadline() -> None:
    """From its first byte to its last, however lively the trickle; each frame anew."""
    decoder, data = FrameDecoder(), data_of(Frame(Ping(1)))
    assert not decoder.stalled(1e9)
    for second in range(int(FRAME_DEADLINE_S) + 1):
        assert not decoder.stalled(float(second))
        decoder.feed(data[second : second + 1], float(second)) if second < 3 else None
    assert decoder.stalled(FRAME_DEADLINE_S + 0.1)
    assert len(decoder.feed(data[3:] + data[:5], 40.0)) == 1
    assert not decoder.stalled(40.0 + FRAME_DEADLINE_S)
    assert decoder.stalled(40.1 + FRAME_DEADLINE_S)
    decoder.feed(data[5:], 90.0)
    assert not decoder.stalled(1e9)
