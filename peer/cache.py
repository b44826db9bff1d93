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

*Prefixes.* Whoever leases may name the blocks of its prompt, in a chain (`hexswarm.prefix`). Those
that are here already are held together with whoever else holds them, and the session begins with
that length cached; its own blocks are filed under their names as they become full and computed. So
is, at the end, what the client names of the answer: what a session leaves under a name stays, and
counts as free (`peer/blocks.py`). A block with a name is never written to. A step that starts below
takes the names off; where others hold a block, it gets another one instead, so that nobody's KV
changes under him. Only the middle of such a block cannot be had: there is nobody to copy its first
half, and clients know to start at a block's begin (`SharedBlock`).

Until its first step has said how much of what was found it wants (the other stages of its route may
have less), a session counts as if it shared nothing: what it found may have to be computed again
beside the others who hold it, and a session that was let in is not refused at its first step.

A lease idle for `lease_s` ends; a step renews it. So does its owner who asks again, since a session
whose route is being repaired stands still; but without a step it ends after `UNUSED_LEASES` times
that, however often it is asked for. An opened session that never steps, or a client that went away
without a word, therefore costs memory for a bounded time.

No locks and no clock here: the owner (`hexswarm.peer.engine`) guards it and passes `now`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hexswarm.errors import RemoteProtocolError, SessionClosed, UsageError
from hexswarm.peer.blocks import BlockPool, Name
from hexswarm.peer.leases import BeyondLease, KvFull, KvGap, Lease, SharedBlock, blocks_of
from hexswarm.peer.steps import SessionKey
from hexswarm.prefix import BLOCK_TOKENS as BLOCK_TOKENS

UNUSED_LEASES = 3
"""So many times `lease_s` a lease lives without a step, at the most."""

KEPT_S = 600.0
"""So long KV with a name outlives the session that left it, if nobody asks for it."""

_FIRST_LIFE_S = 10.0
"""How long a session is expected to live before any has ended here."""


@dataclass(slots=True)
class _Holder:
    lease: Lease
    opened_s: float
    used_s: float
    """When it was renewed."""
    stepped_s: float
    """When a step came or ended."""
    length: int = 0
    computed: int = 0
    """Tokens of it whose step has ended well."""
    names: tuple[Name, ...] = ()
    """Of the prompt's blocks; none any more once something else was written in their place."""
    frozen: int = 0
    """Blocks from this one on have no name and no other holder."""
    begun: bool = False
    """A step came: until then the client has not said how much of `known` it wants."""


@dataclass(frozen=True, slots=True)
class PrefixCounts:
    """What names were good for, so far."""

    asked: int = 0
    """Sessions that named what they begin with,"""
    found: int = 0
    """those of them that began with some of it,"""
    tokens: int = 0
    """and the tokens that were not computed again."""


class BlockTables:
    """All leases over a pool of `blocks` blocks; with `keep`, blocks with names outlive them."""

    def __init__(
        self, blocks: int, *, lease_s: float = 60.0, keep: bool = True, kept_s: float = KEPT_S
    ) -> None:
        if blocks < 1:
            raise UsageError("the KV pool has at least one block")
        self.total_blocks = blocks
        self.lease_s = lease_s
        self.on_release: Callable[[tuple[int, ...]], None] = lambda blocks: None
        """Told of blocks that are free and have no name any more."""
        self.prefixes = PrefixCounts()
        self._keep = keep
        self._holders: dict[SessionKey, _Holder] = {}
        self._waiting: dict[SessionKey, _Holder] = {}
        """Sessions that found something here and have not begun."""
        self._pool = BlockPool(blocks, lambda blocks: self.on_release(blocks), kept_s=kept_s)
        self._life_s = min(_FIRST_LIFE_S, lease_s)

    @property
    def free_blocks(self) -> int:
        return self._pool.free

    @property
    def kept_blocks(self) -> int:
        """Those of the free blocks that hold what an ended session left under a name."""
        return self._pool.kept

    @property
    def free_tokens(self) -> int:
        """Tokens that one new session could lease."""
        return max(0, self._pool.free - self._owed()) * BLOCK_TOKENS

    @property
    def sessions(self) -> tuple[SessionKey, ...]:
        return tuple(self._holders)

    def lease(
        self,
        session: SessionKey,
        tokens: int,
        now: float,
        names: Sequence[Name] = (),
        *,
        publish: bool = True,
    ) -> Lease:
        """Reserve blocks for `tokens` tokens or raise KvFull.

        Blocks called by `names`, from the first on, are held and not computed again; what is
        computed is filed under the others if `publish`.
        """
        if session in self._holders:
            raise RemoteProtocolError("the session is open already")
        if tokens < 1:
            raise UsageError("a session leases at least one token")
        # The last token is always computed: what comes after it is asked for.
        names = tuple(names[: (tokens - 1) // BLOCK_TOKENS]) if self._keep else ()
        held = self._pool.find(names)
        if not self._room(blocks_of(tokens)):
            raise self._full(tokens, blocks_of(tokens), now)
        self._pool.hold(held)
        after = held[-1] + 1 if held else None
        blocks = held + self._pool.take(blocks_of(tokens) - len(held), after)
        known = len(held) * BLOCK_TOKENS
        lease = Lease(session, tokens, blocks, known)
        holder = _Holder(lease, opened_s=now, used_s=now, stepped_s=now, length=known)
        holder.computed, holder.frozen = known, len(held)
        holder.names = names if publish else ()
        self._holders[session] = holder
        if held:
            self._waiting[session] = holder
        if names:
            self.prefixes = replace(self.prefixes, asked=self.prefixes.asked + 1)
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
        self._make_way(holder, position, now)
        if not holder.begun:
            self._begin(session, holder, position)
        holder.length = position + count
        holder.used_s = holder.stepped_s = now

    def computed(self, session: SessionKey, end: int, now: float) -> None:
        """A step that wrote up to `end` ended well: full blocks may be found from now on."""
        holder = self._holders.get(session)
        if holder is None:
            return
        holder.used_s = holder.stepped_s = now
        holder.computed = max(holder.computed, min(end, holder.length))
        full = min(len(holder.names), holder.computed // BLOCK_TOKENS)
        for index in range(holder.frozen, full):
            self._pool.publish(holder.names[index], holder.lease.blocks[index])
        holder.frozen = max(holder.frozen, full)

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
            holder.computed = min(holder.computed, position)
            holder.begun, holder.names = True, ()
            self._waiting.pop(session, None)

    def length(self, session: SessionKey) -> int:
        return self._holder(session).length

    def lease_of(self, session: SessionKey) -> Lease:
        return self._holder(session).lease

    def blocks(self, session: SessionKey) -> tuple[int, ...]:
        return self._holder(session).lease.blocks

    def release(self, session: SessionKey, now: float, names: Sequence[Name] = ()) -> bool:
        """End the lease; False if there is none (closing twice is no mistake).

        `names` are those of all that the session holds: full blocks stay under them.
        """
        holder = self._holders.pop(session, None)
        self._waiting.pop(session, None)
        if holder is None:
            return False
        if self._keep:
            self._file(holder, names)
        self._pool.give(holder.lease.blocks, now)
        self._life_s += 0.2 * (now - holder.opened_s - self._life_s)
        return True

    def borrow(self, count: int, now: float) -> tuple[int, ...]:
        """Blocks for a moment and for no session, or KvFull; `give_back` ends it."""
        if not self._room(count):
            raise self._full(count * BLOCK_TOKENS, count, now)
        return self._pool.take(count)

    def give_back(self, blocks: tuple[int, ...], now: float) -> None:
        self._pool.give(blocks, now)

    def expire(self, now: float) -> list[SessionKey]:
        """End the leases that nothing renewed for `lease_s` and name their sessions.

        What was kept of others for too long goes, too.
        """
        old = [key for key, held in self._holders.items() if self._idle(held, now)]
        for session in old:
            self.release(session, now)
        self._pool.forget(now)
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

    def _begin(self, session: SessionKey, holder: _Holder, position: int) -> None:
        """The first step says with how much of what was known the session begins."""
        holder.begun = True
        self._waiting.pop(session, None)
        if position:
            last = self.prefixes
            self.prefixes = replace(last, found=last.found + 1, tokens=last.tokens + position)

    def _make_way(self, holder: _Holder, position: int, now: float) -> None:
        """Before a step writes from `position` on: let nobody find, or read, what was there."""
        first, table = position // BLOCK_TOKENS, holder.lease.blocks
        holder.computed = min(holder.computed, position)
        if position < holder.length and holder.begun:
            holder.names = ()
        if first >= holder.frozen:
            return
        shared = [i for i in range(first, holder.frozen) if self._pool.holders(table[i]) > 1]
        if position % BLOCK_TOKENS and first in shared:
            raise SharedBlock(position)
        if len(shared) > self._pool.free - (self._owed() if holder.begun else 0):
            raise self._full(holder.lease.tokens, len(shared), now)
        for index in range(first, holder.frozen):
            if index not in shared or not holder.begun:  # what it computes now is the newest
                self._pool.unname(table[index])
        if shared:
            fresh = dict(zip(shared, self._pool.take(len(shared)), strict=True))
            blocks = tuple(fresh.get(i, block) for i, block in enumerate(table))
            holder.lease = replace(holder.lease, blocks=blocks)
            self._pool.give([table[i] for i in shared], now)
        holder.frozen = first

    def _file(self, holder: _Holder, names: Sequence[Name]) -> None:
        """Put what the session computed under `names`, as far as they agree with what is there."""
        for name, block in zip(
            names[: holder.computed // BLOCK_TOKENS], holder.lease.blocks, strict=False
        ):
            if self._pool.name(block) not in (None, name):
                return
            self._pool.publish(name, block)

    def _take(self, tokens: int, count: int, after: int | None, now: float) -> tuple[int, ...]:
        if not self._room(count):
            raise self._full(tokens, count, now)
        return self._pool.take(count, after)

    def _room(self, count: int) -> bool:
        """Are so many blocks free beside those that are owed?"""
        free = self._pool.free
        most = sum(holder.frozen for holder in self._waiting.values())
        return count <= free - most or count <= free - self._owed()

    def _owed(self) -> int:
        """Blocks that sessions which have not begun need if they want nothing of what they found.

        Of a block with `n` holders, `k` of whom have not begun, that is at most one for each of
        these, and one holder keeps the block itself.
        """
        found = Counter[int]()
        for holder in self._waiting.values():
            found.update(holder.lease.blocks[: holder.frozen])
        return sum(min(k, self._pool.holders(block) - 1) for block, k in found.items())

    def _full(self, tokens: int, count: int, now: float) -> KvFull:
        return KvFull(tokens, self.free_tokens, self._retry_s(tokens, count, now))

    def _retry_s(self, tokens: int, count: int, now: float) -> float:
        """When enough sessions will have ended, if they live as long as those before them."""
        if blocks_of(tokens) > self.total_blocks:
            return 0.0
        free, wait_s = self._pool.free, 1.0
        for holder in sorted(self._holders.values(), key=lambda held: held.opened_s):
            if free >= count:
                break
            free += len(holder.lease.blocks)
            wait_s = max(wait_s, holder.opened_s + self._life_s - now)
        return min(wait_s, self.lease_s)
