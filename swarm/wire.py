"""Bytes in, messages out: the framing of our streams, without any I/O.

A frame is `u32 header bytes, u32 payload bytes, header, payload`, big-endian. Both lengths are
checked against their limits when the eight bytes have arrived, before anything is allocated for
the rest; a frame that is not complete within its deadline counts against the sender as a whole
(`stalled`), so that a peer which trickles a byte now and then gains nothing.

The decoder is fed whatever the network gives and returns the complete frames in it; any split of
the same bytes gives the same frames (a property test holds this). The shape follows h11: events
from bytes, no sockets, no clocks.
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

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._since_s: float | None = None

    def feed(self, data: bytes, now: float) -> list[Frame]:
        """The frames that `data` completes.

        Raises RemoteProtocolError for a frame over the limits or a malformed header; the stream
        is then of no further use.
        """
        self._buffer += data
        frames, start = [], 0
        while True:
            frame, used = self._next(start)
            if frame is None:
                break
            frames.append(frame)
            start += used
        if start:
            del self._buffer[:start]
        if not self._buffer:
            self._since_s = None
        elif start or self._since_s is None:
            self._since_s = now
        return frames

    def stalled(self, now: float) -> bool:
        """True if a frame began longer ago than its deadline and is still not complete."""
        return self._since_s is not None and now - self._since_s > FRAME_DEADLINE_S

    def _next(self, start: int) -> tuple[Frame | None, int]:
        available = len(self._buffer) - start
        if available < _PREFIX.size:
            return None, 0
        header_size, payload_size = _PREFIX.unpack_from(self._buffer, start)
        if not 0 < header_size <= MAX_HEADER_BYTES or payload_size > MAX_PAYLOAD_BYTES:
            raise RemoteProtocolError(
                f"a frame announces {header_size} + {payload_size} bytes, over the limits of "
                f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
            )
        size = _PREFIX.size + header_size + payload_size
        if available < size:
            return None, 0
        body = start + _PREFIX.size
        with memoryview(self._buffer) as view:
            # A copy: the traceback of a malformed header would else pin the buffer's size.
            message = decode(bytes(view[body : body + header_size]))
            payload = bytes(view[body + header_size : start + size])
        return Frame(message, payload), size
