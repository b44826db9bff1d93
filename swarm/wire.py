"""Bytes in, messages out: the framing of our streams, without any I/O.

A frame is `u32 header bytes, u32 payload bytes, header, payload`, big-endian. Both lengths are
checked against their limits when the eight bytes have arrived, before anything is allocated for
the rest; a frame that is not complete within its deadline counts against the sender as a whole
(`stalled`), so that a peer which trickles a byte now and then gains nothing. How much is much
depends on who speaks: a decoder works to `Limits`, which its owner changes as the sender comes to
take part in something (`hexswarm.guests`).

The decoder is fed whatever the network gives and returns the complete frames in it; any split of
the same bytes gives the same frames (a property test holds this). It keeps only bytes of frames
that are not complete, never more than was announced of one frame and `Limits.frames` behind it, and
gives the memory back with the frame. Frames that come whole are decoded where they lie, without a
copy into the decoder. The shape follows h11: events from bytes, no sockets, no clocks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hexswarm.errors import LocalProtocolError, RemoteProtocolError
from hexswarm.messages import MAX_HEADER_BYTES, Message, decode, encode

MAX_PAYLOAD_BYTES = 4 << 20
"""Chunks of a prompt are at most 2 MiB; logits of a 256k vocabulary are 1 MiB."""

FRAME_DEADLINE_S = 30.0
"""Time for one frame from first to last byte: 4 MiB at 1.2 Mbit/s."""

_PREFIX = struct.Struct("!II")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sender may do to a decoder."""

    header_bytes: int = MAX_HEADER_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES
    deadline_s: float = FRAME_DEADLINE_S
    frames: int = 1 << 30
    """Given out at once; the rest of what was fed waits (`FrameDecoder.more`)."""


FULL = Limits()


@dataclass(frozen=True, slots=True)
class Frame:
    message: Message
    payload: bytes = b""


def pack(message: Message, payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
    """The buffers of one frame, to be written in order; the payload is not copied.

    Raises LocalProtocolError if the frame would break a limit.
    """
    header = encode(message)
    size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
    if len(header) > MAX_HEADER_BYTES or size > MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(
            f"a frame of {len(header)} + {size} bytes is over the limits of "
            f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
        )
    start = _PREFIX.pack(len(header), size) + header
    return [start, payload] if size else [start]


class FrameDecoder:
    """Collects bytes of one direction of one stream."""

    def __init__(self, limits: Limits = FULL) -> None:
        self.limits = limits
        self.more = False
        """`feed` gave out as many frames as it may: call it again, with nothing new."""
        self._buffer = bytearray()
        self._since_s: float | None = None
        self._broken = False

    @property
    def held(self) -> int:
        """Bytes kept of frames that were not given out."""
        return len(self._buffer)

    def feed(self, data: bytes, now: float) -> list[Frame]:
        """The frames that `data` completes.

        Raises RemoteProtocolError for a frame over the limits or a malformed header; the stream
        is then of no further use.
        """
        if self._broken:
            raise RemoteProtocolError("the stream broke off in a malformed frame")
        kept = bool(self._buffer)
        if kept:
            self._buffer += data
        source = self._buffer if kept else data
        frames: list[Frame] = []
        try:
            start = self._cut(source, frames)
        except RemoteProtocolError:
            self._broken, self._since_s = True, None
            self._buffer.clear()
            raise
        if kept:
            del self._buffer[:start]
        elif start < len(data):
            self._buffer += memoryview(data)[start:]
        if not self._buffer:
            self._since_s = None
        elif start or self._since_s is None:
            self._since_s = now
        return frames

    def stalled(self, now: float) -> bool:
        """True if a frame began longer ago than its deadline and is still not complete."""
        return self._since_s is not None and now - self._since_s > self.limits.deadline_s

    def _cut(self, source: bytes | bytearray, frames: list[Frame]) -> int:
        """Cut complete frames off `source`; how far they reach."""
        limits, start, size = self.limits, 0, len(source)
        self.more = False
        with memoryview(source) as view:
            while size - start >= _PREFIX.size:
                header_size, payload_size = _PREFIX.unpack_from(source, start)
                if (
                    not 0 < header_size <= limits.header_bytes
                    or payload_size > limits.payload_bytes
                ):
                    raise RemoteProtocolError(
                        f"a frame announces {header_size} + {payload_size} bytes, over the limits "
                        f"of {limits.header_bytes} + {limits.payload_bytes}"
                    )
                body = start + _PREFIX.size + header_size
                if size < body + payload_size:
                    break
                if len(frames) >= limits.frames:
                    self.more = True
                    break
                # A copy: the traceback of a malformed header would else pin the buffer's size.
                message = decode(bytes(view[start + _PREFIX.size : body]))
                start = body + payload_size
                frames.append(Frame(message, bytes(view[body:start])))
        return start
