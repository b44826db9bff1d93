"""The KV blocks themselves: which are free, who holds which, and what ended sessions left.

A block is *free* (its runs are kept here), *held* by one lease or more, or *kept*: held by nobody,
but it has a name under which a client may ask for it again (`hexswarm.prefix`). A held block may
have a name, too, once it is full; then others of the same client may hold it beside the first.

Kept blocks count as free, for they are: whoever needs one gets it, the one unused for longest
first. Of a chain that was left together the deepest goes first, since a block whose beginning is
gone is found by nobody. What nobody asked for within `kept_s` goes as well: KV of one who went away
does not lie in a volunteer's memory for ever.

A named block is never written to. Who must write where one lies (`hexswarm.peer.cache`) first takes
the name off, or, if others hold the block, takes another block. A block leaves for the free ones
through `on_drop`, by which its owner erases it.

Rejected: a tree of prefixes (SGLang's radix cache): it finds partial matches of any length, but a
chain of hashes already says all that a peer can know, a dictionary is a tenth of the code, and an
eviction looks at one block. Names for half a block: they would change with every token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

Name = Hashable
"""Of a full block and all before it: whoever asks by the same name gets the same KV."""


class BlockPool:
    """All blocks of a pool. The caller checks `free` before it takes."""

    def __init__(
        self, blocks: int, on_drop: Callable[[tuple[int, ...]], None], *, kept_s: float
    ) -> None:
        self._on_drop = on_drop
        self._kept_s = kept_s
        self._runs = Runs(blocks)
        self._holders = [0] * blocks
        """Leases that hold each block."""
        self._name: dict[int, Name] = {}
        self._block: dict[Name, int] = {}
        self._kept: dict[int, float] = {}
        """Named blocks that nobody holds, and since when; the one unused for longest first."""

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return self._runs.count + len(self._kept)

    @property
    def kept(self) -> int:
        """Those of them that have a name."""
        return len(self._kept)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def name(self, block: int) -> Name | None:
        return self._name.get(block)

    def find(self, names: Iterable[Name]) -> tuple[int, ...]:
        """The blocks of these names, up to the first that is not here."""
        found: list[int] = []
        for name in names:
            block = self._block.get(name)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def hold(self, blocks: Iterable[int]) -> None:
        """One lease more holds these, which have names."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] += 1

    def take(self, count: int, after: int | None = None) -> tuple[int, ...]:
        """`count` blocks for one lease, right at `after` if possible; kept ones give way."""
        if self._runs.count < count:
            self._drop(list(self._kept)[: count - self._runs.count])
        taken = self._runs.take(count, after)
        for block in taken:
            self._holders[block] = 1
        return taken

    def give(self, blocks: Sequence[int], now: float) -> None:
        """A lease holds these no more."""
        dropped = []
        for block in reversed(blocks):  # the deepest of a chain is to go first
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._name:
                self._kept[block] = now
            else:
                dropped.append(block)
        self._free(dropped[::-1])

    def publish(self, name: Name, block: int) -> None:
        """Let a held block be found; not if another one is by that name, or it has one."""
        if name not in self._block and block not in self._name:
            self._block[name], self._name[block] = block, name

    def unname(self, block: int) -> None:
        """Let a held block be found no more."""
        name = self._name.pop(block, None)
        if name is not None:
            del self._block[name]

    def forget(self, now: float) -> None:
        """Drop what nobody asked for in time."""
        old = [block for block, since_s in self._kept.items() if now - since_s > self._kept_s]
        self._drop(old)

    def _drop(self, kept: Sequence[int]) -> None:
        for block in kept:
            del self._kept[block]
            self.unname(block)
        self._free(kept)

    def _free(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._runs.give(blocks)
            self._on_drop(tuple(blocks))


class Runs:
    """Free blocks as maximal runs [start, end), found by either end."""

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

    def give(self, blocks: Iterable[int]) -> None:
        """Put blocks back, joined with their free neighbours."""
        for block in blocks:
            self.count += 1
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
