"""What a session leases of the KV pool, and why it may not have it, or not write there."""

from __future__ import annotations

from dataclasses import dataclass

from hexswarm.errors import HexswarmError, RemoteProtocolError
from hexswarm.peer.steps import SessionKey
from hexswarm.prefix import BLOCK_TOKENS


def blocks_of(tokens: int) -> int:
    """Blocks that `tokens` tokens fill."""
    return -(-tokens // BLOCK_TOKENS)


class KvFull(HexswarmError):
    """Not enough free blocks; `retry_s` guesses when there will be (0: never, the pool is small).

    The server answers it with a `Refused` of code "full", which adds the peer's name.
    """

    def __init__(self, tokens: int, free_tokens: int, retry_s: float) -> None:
        again = f"try again in {retry_s:.0f} s" if retry_s else "ask for fewer tokens"
        super().__init__(f"KV for {tokens} tokens wanted, {free_tokens} free", remedy=again)
        self.tokens, self.free_tokens, self.retry_s = tokens, free_tokens, retry_s


class KvGap(RemoteProtocolError):
    """A step starts above the cached length; `length` is where it should have started."""

    def __init__(self, position: int, length: int) -> None:
        super().__init__(
            f"a step at position {position} leaves a gap: {length} tokens are cached",
            remedy=f"replay from position {length}",
        )
        self.position, self.length = position, length


class BeyondLease(RemoteProtocolError):
    """A step ends above the tokens leased."""

    def __init__(self, end: int, tokens: int) -> None:
        super().__init__(
            f"a step ends at position {end}, the session leased {tokens} tokens",
            remedy="extend the lease or open the session with more tokens",
        )
        self.end, self.tokens = end, tokens


class SharedBlock(RemoteProtocolError):
    """A step starts in the middle of a block that other sessions read."""

    def __init__(self, position: int) -> None:
        super().__init__(
            f"a step at position {position} starts inside a block that others hold, too",
            remedy=f"start at position {position - position % BLOCK_TOKENS}",
        )
        self.position = position


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks of one session in the order of its tokens: token t lies in `blocks[t // 16]`."""

    session: SessionKey
    tokens: int
    """Positions allowed; the last block may have room for more."""
    blocks: tuple[int, ...]
    known: int = 0
    """So many of its tokens were here when it began."""

    @property
    def consecutive(self) -> bool:
        """One run: the session's KV is a view of the pool."""
        return self.blocks[-1] - self.blocks[0] == len(self.blocks) - 1 and all(
            b == a + 1 for a, b in zip(self.blocks, self.blocks[1:], strict=False)
        )
