"""Who owns which KV block: leases over a pool of 16-token blocks, without a tensor in sight.

A session leases blocks for its whole prompt and answer when it opens. Reserving at open (and not
block by block, as vLLM does) is what a volunteer pipeline needs: a session that runs out of KV at
one stage stalls all the others, and a middle stage cannot recompute what it evicted because it
never saw the inputs. The price, memory kept for answers that end early, is paid back at release.

A lease prefers one run of consecutive blocks, best fit: the CPU runner then sees the session's KV
as a plain view instead of a gather. When no run is long enough the lease is pieced together, from
the longest runs, because a scattered session is slower and a refused one is lost. Extending grows
the last block's run in place if its neighbours are free, and scatters otherwise.

The *cached length* of a session is what its accepted steps have written or will have written when
they ran, in order. A step that starts below it crops: nothing is erased, the tokens above are
simply overwritten later, so speculation and replay need no message of their own. A step above it
would leave a hole and is refused without a trace.

A lease idle for `lease_s` ends; a step renews it. So does its owner who asks again, since a session
whose route is being repaired stands still; but without a step it ends after `UNUSED_LEASES` times
that, however often it is asked for. An opened session that never steps, or a client that went away
without a word, therefore costs memory for a bounded time.

No locks and no clock here: the owner (`hexswarm.peer.engine`) guards it and passes `now`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hexswarm.errors import HexswarmError, RemoteProtocolError, SessionClosed, UsageError
from hexswarm.peer.steps import SessionKey

BLOCK_TOKENS = 16
"""Tokens of one block; small enough to waste little, large enough for coalesced reads."""

UNUSED_LEASES = 3
"""So many times `lease_s` a lease lives without a step, at the most."""

_FIRST_LIFE_S = 10.0
"""How long a session is expected to live before any has ended here."""


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


@dataclass(frozen=True, slots=True)
class Lease:
    """Blocks of one session in the order of its tokens: token t lies in `blocks[t // 16]`."""

    session: SessionKey
    tokens: int
    """Positions allowed; the last block may have room for more."""
    blocks: tuple[int, ...]

    @property
    def consecutive(self) -> bool:
        """One run: the session's KV is a view of the pool."""
        return self.blocks[-1] - self.blocks[0] == len(self.blocks) - 1 and all(
            b == a + 1 for a, b in zip(self.blocks, self.blocks[1:], strict=False)
        )


@dataclass(slots=True)
class _Holder:
    lease: Lease
    opened_s: float
    used_s: float
    """When it was renewed."""
    stepped_s: float
    """When a step came or ended."""
    length: int = 0


class BlockTables:
    """All leases over a pool of `blocks` blocks."""

    def __init__(self, blocks: int, *, lease_s: float = 60.0) -> None:
        if blocks < 1:
            raise UsageError("the KV pool has at least one block")
        self.total_blocks = blocks
        self.lease_s = lease_s
        self.on_release: Callable[[tuple[int, ...]], None] = lambda blocks: None
        """Told of the blocks of every lease that ends."""
        self._holders: dict[SessionKey, _Holder] = {}
        self._free = _Runs(blocks)
        self._life_s = min(_FIRST_LIFE_S, lease_s)

    @property
    def free_blocks(self) -> int:
        return self._free.count

    @property
    def free_tokens(self) -> int:
        """Tokens that one new session could lease."""
        return self._free.count * BLOCK_TOKENS

    @property
    def sessions(self) -> tuple[SessionKey, ...]:
        return tuple(self._holders)

    def lease(self, session: SessionKey, tokens: int, now: float) -> Lease:
        """Reserve blocks for `tokens` tokens or raise KvFull."""
        if session in self._holders:
            raise RemoteProtocolError("the session is open already")
        if tokens < 1:
            raise UsageError("a session leases at least one token")
        lease = Lease(session, tokens, self._take(tokens, blocks_of(tokens), None, now))
        self._holders[session] = _Holder(lease, opened_s=now, used_s=now, stepped_s=now)
        return lease

    def extend(self, session: SessionKey, tokens: int, now: float) -> Lease:
        """Make the lease `tokens` long in all (never shorter) or raise KvFull, changing nothing.

        Its owner asked for it: it is renewed.
        """
        holder = self._holder(session)
        lease = holder.lease
        if tokens <= lease.tokens:
            holder.used_s = now
            return lease
        more = blocks_of(tokens) - len(lease.blocks)
        if more > 0:
            added = self._take(tokens, more, lease.blocks[-1] + 1, now)
            lease = replace(lease, blocks=lease.blocks + added)
        holder.lease = replace(lease, tokens=tokens)
        holder.used_s = now
        return holder.lease

    def write(self, session: SessionKey, position: int, count: int, now: float) -> None:
        """Record that a step writes `count` tokens from `position` on, and renew the lease."""
        holder = self._holder(session)
        if position < 0 or count < 1:
            raise RemoteProtocolError("a step has a position >= 0 and at least one token")
        if position > holder.length:
            raise KvGap(position, holder.length)
        if position + count > holder.lease.tokens:
            raise BeyondLease(position + count, holder.lease.tokens)
        holder.length = position + count
        holder.used_s = holder.stepped_s = now

    def renew(self, session: SessionKey, now: float) -> None:
        """A step of the session ended; a long prompt may compute for longer than `lease_s`."""
        if session in self._holders:
            holder = self._holders[session]
            holder.used_s = holder.stepped_s = now

    def rewind(self, session: SessionKey, position: int) -> None:
        """Forget tokens from `position` on, which a failed step did not write after all."""
        if session in self._holders:
            holder = self._holders[session]
            holder.length = min(holder.length, position)

    def length(self, session: SessionKey) -> int:
        return self._holder(session).length

    def lease_of(self, session: SessionKey) -> Lease:
        return self._holder(session).lease

    def blocks(self, session: SessionKey) -> tuple[int, ...]:
        return self._holder(session).lease.blocks

    def release(self, session: SessionKey, now: float) -> bool:
        """End the lease; False if there is none (closing twice is no mistake)."""
        holder = self._holders.pop(session, None)
        if holder is None:
            return False
        self._free.give(holder.lease.blocks)
        self.on_release(holder.lease.blocks)
        self._life_s += 0.2 * (now - holder.opened_s - self._life_s)
        return True

    def expire(self, now: float) -> list[SessionKey]:
        """End the leases that nothing renewed for `lease_s` and name their sessions."""
        old = [key for key, held in self._holders.items() if self._idle(held, now)]
        for session in old:
            self.release(session, now)
        return old

    def _idle(self, held: _Holder, now: float) -> bool:
        unused_s = UNUSED_LEASES * self.lease_s
        return now - held.used_s > self.lease_s or now - held.stepped_s > unused_s

    def _holder(self, session: SessionKey) -> _Holder:
        try:
            return self._holders[session]
        except KeyError:
            raise SessionClosed(
                "this stage holds no KV for the session",
                remedy="open it again and replay",
            ) from None

    def _take(self, tokens: int, count: int, after: int | None, now: float) -> tuple[int, ...]:
        if count > self._free.count:
            raise KvFull(tokens, self.free_tokens, self._retry_s(tokens, count, now))
        return self._free.take(count, after)

    def _retry_s(self, tokens: int, count: int, now: float) -> float:
        """When enough sessions will have ended, if they live as long as those before them."""
        if blocks_of(tokens) > self.total_blocks:
            return 0.0
        free, wait_s = self._free.count, 1.0
        for holder in sorted(self._holders.values(), key=lambda held: held.opened_s):
            if free >= count:
                break
            free += len(holder.lease.blocks)
            wait_s = max(wait_s, holder.opened_s + self._life_s - now)
        return min(wait_s, self.lease_s)


def blocks_of(tokens: int) -> int:
    """Blocks that `tokens` tokens fill."""
    return -(-tokens // BLOCK_TOKENS)


class _Runs:
    """The free blocks as maximal runs [start, end), found by either end."""

    def __init__(self, blocks: int) -> None:
        self.count = blocks
        self._end_of = {0: blocks}
        self._start_of = {blocks: 0}

    def take(self, count: int, after: int | None) -> tuple[int, ...]:
        """Remove `count` blocks: right at `after`, else the tightest run, else the longest runs."""
        self.count -= count
        if after is not None and self._end_of.get(after, after) - after >= count:
            return self._cut(after, count)
        fitting = [(end - s, s) for s, end in self._end_of.items() if end - s >= count]
        if fitting:
            return self._cut(min(fitting)[1], count)
        taken: list[int] = []
        for length, start in sorted(((end - s, -s) for s, end in self._end_of.items()))[::-1]:
            taken += self._cut(-start, min(length, count - len(taken)))
            if len(taken) == count:
                break
        return tuple(taken)

    def give(self, blocks: tuple[int, ...]) -> None:
        """Put blocks back, joined with their free neighbours."""
        self.count += len(blocks)
        for block in blocks:
            end = self._end_of.pop(block + 1, block + 1)
            start = self._start_of.pop(block, block)
            self._end_of[start], self._start_of[end] = end, start

    def _cut(self, start: int, count: int) -> tuple[int, ...]:
        """Remove the first `count` blocks of the run at `start`."""
        end = self._end_of.pop(start)
        del self._start_of[end]
        if start + count < end:
            self._end_of[start + count], self._start_of[end] = end, start + count
        return tuple(range(start, start + count))
