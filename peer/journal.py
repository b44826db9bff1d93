"""What this peer sent on, kept for the day when the next stage is lost.

A replacement starts without KV. It gets its inputs from the stage before it, which kept what it had
sent (DESIGN 4.8): so the other stages compute nothing anew, and the client, who never saw these
activations, sends none. Host memory, for the life of a session, bounded over all sessions.

Over the bound the session that keeps *most* loses its journal, as a whole and for good. As a whole,
since a newcomer needs everything from position 0: half a journal replaces nobody. The largest, and
not the one idle longest, for the sake of a promise: with n sessions, one that keeps no more than
budget / n never loses anything, whoever else comes. By age a stranger's huge prompt would push out
many small sessions that stood still for a moment. The price is small: without a journal the stage
computes again what it must send, and the stages before it help it to its inputs. A session keeps at
most `MOST_EACH_BYTES`, because a replay is handed to the link at once, and a link with much more
than that waiting is given up.

A decode step keeps 2-16 kB and must cost next to nothing, in time and in bytes. Outputs are kept as
they are, uncopied: single rows in a list, `BLOCK_ROWS` to a block, in which a position is found by
arithmetic; several rows at once as a block of their own. That is 50 bytes a row beside the row.
Rejected: to append to a buffer (copying 16 kB and growing it took 4 us a step), an entry with its
position for each row (hundreds of bytes), and a file, since a disk that is shared stalls for
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hexswarm.errors import UsageError
from hexswarm.peer.steps import SessionKey

BLOCK_ROWS = 256
MOST_EACH_BYTES = 128 << 20
DEFAULT_BYTES = 512 << 20
FREE_SHARE = 8
"""Of the free memory of a small machine a journal takes one in so many parts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Outputs of `count` consecutive positions, row-major."""

    position: int
    count: int
    data: bytes
    dtype: str


@dataclass(slots=True)
class _Block:
    """Rows of one size; `data` is a list of them, or all of them in one."""

    first: int
    end: int
    row_bytes: int
    dtype: str
    data: list[bytes] | bytes

    def cut(self, first: int, end: int) -> bytes | memoryview:
        first, end = first - self.first, end - self.first
        if isinstance(self.data, list):
            return b"".join(self.data[first:end])
        return memoryview(self.data)[first * self.row_bytes : end * self.row_bytes]

    def crop(self, end: int) -> None:
        if isinstance(self.data, list):
            del self.data[end - self.first :]
        else:
            self.data = bytes(self.cut(self.first, end))
        self.end = end


@dataclass(slots=True)
class _Kept:
    """One session: blocks that follow each other without a hole."""

    blocks: list[_Block] = field(default_factory=list)
    used_bytes: int = 0

    @property
    def end(self) -> int:
        return self.blocks[-1].end if self.blocks else 0


class Journal:
    """The outputs of all sessions of this peer, in at most `most_bytes`."""

    def __init__(
        self, most_bytes: int = DEFAULT_BYTES, *, most_each_bytes: int = MOST_EACH_BYTES
    ) -> None:
        if most_bytes < 0 or most_each_bytes < 0:
            raise UsageError("a journal has no negative size")
        self.used_bytes = 0
        self.most_bytes = most_bytes
        self._most_each_bytes = min(most_each_bytes, most_bytes)
        self._kept: dict[SessionKey, _Kept] = {}
        self._lost: set[SessionKey] = set()
        """Sessions whose journal had to go; they stay without."""

    def __len__(self) -> int:
        return len(self._kept)

    def keep(
        self, session: SessionKey, position: int, count: int, data: bytes | memoryview, dtype: str
    ) -> None:
        """Add the outputs of `count` positions; what was kept from `position` on is replaced."""
        kept = self._kept.get(session)
        if kept is None:
            if session in self._lost:
                return
            kept = self._kept[session] = _Kept()
        elif position != kept.end:
            self._fit(kept, position)
        size = len(data)
        _append(kept, position, count, data, dtype)
        kept.used_bytes += size
        self.used_bytes += size
        if kept.used_bytes > self._most_each_bytes:
            self._lose(session)
        elif self.used_bytes > self.most_bytes:
            self._lose(max(self._kept, key=lambda key: (self._kept[key].used_bytes, key)))

    def crop(self, session: SessionKey, position: int) -> None:
        """Forget what is kept from `position` on."""
        kept = self._kept.get(session)
        if kept is not None and position < kept.end:
            self._fit(kept, position)
            if not kept.blocks:
                del self._kept[session]

    def start(self, session: SessionKey) -> int | None:
        """The first position from which everything up to the end is kept; None: nothing is."""
        kept = self._kept.get(session)
        return kept.blocks[0].first if kept is not None and kept.blocks else None

    def end(self, session: SessionKey) -> int:
        """Where what is kept ends (0: nothing is kept)."""
        kept = self._kept.get(session)
        return 0 if kept is None else kept.end

    def pieces(self, session: SessionKey, first: int, end: int, most_bytes: int) -> list[Piece]:
        """What is kept of [first, end), joined to pieces of at most `most_bytes` or one row."""
        kept = self._kept.get(session)
        pieces: list[Piece] = []
        parts: list[bytes | memoryview] = []
        began = at = first
        row_bytes, dtype = 0, ""
        for block in kept.blocks if kept is not None else ():
            while max(at, block.first) < min(end, block.end):
                at = max(at, block.first)
                other = (block.row_bytes, block.dtype) != (row_bytes, dtype)
                room = 0 if other else most_bytes // row_bytes - (at - began)
                if room < 1:
                    if parts:
                        pieces.append(Piece(began, at - began, b"".join(parts), dtype))
                    parts, began, row_bytes, dtype = [], at, block.row_bytes, block.dtype
                    room = max(1, most_bytes // row_bytes)
                stop = min(end, block.end, at + room)
                parts.append(block.cut(at, stop))
                at = stop
        if parts:
            pieces.append(Piece(began, at - began, b"".join(parts), dtype))
        return pieces

    def drop(self, session: SessionKey) -> None:
        """The session has ended, or begins anew."""
        self._lost.discard(session)
        kept = self._kept.pop(session, None)
        if kept is not None:
            self.used_bytes -= kept.used_bytes

    def _lose(self, session: SessionKey) -> None:
        self.drop(session)
        self._lost.add(session)

    def _fit(self, kept: _Kept, position: int) -> None:
        """Make the blocks end at `position`; beyond a hole nothing that was kept is of use."""
        blocks = kept.blocks
        rows_bytes = 0
        while blocks and (blocks[-1].first >= position or blocks[-1].end < position):
            last = blocks.pop()
            rows_bytes += (last.end - last.first) * last.row_bytes
        if blocks and blocks[-1].end > position:
            rows_bytes += (blocks[-1].end - position) * blocks[-1].row_bytes
            blocks[-1].crop(position)
        kept.used_bytes -= rows_bytes
        self.used_bytes -= rows_bytes


def _append(kept: _Kept, position: int, count: int, data: bytes | memoryview, dtype: str) -> None:
    row_bytes = len(data) // count
    owned = data if isinstance(data, bytes) else bytes(data)
    if count > 1:
        kept.blocks.append(_Block(position, position + count, row_bytes, dtype, owned))
        return
    if kept.blocks:
        last = kept.blocks[-1]
        rows, same = last.data, last.row_bytes == row_bytes and last.dtype == dtype
        if same and isinstance(rows, list) and len(rows) < BLOCK_ROWS:
            rows.append(owned)
            last.end += 1
            return
    kept.blocks.append(_Block(position, position + 1, row_bytes, dtype, [owned]))
