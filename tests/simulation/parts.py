"""The integer model cut in parts, and the words by which a leader has its members compute.

Every integer v that the uncut model (`tests.loopback.IntegerModel`) would add or keep falls apart
by the shares of the group: rank r has floor(v c_r+1) - floor(v c_r), where c are the shares summed
up in thousandths. A rank keeps its parts in its KV cells, adds them up over the tokens before, and
the ranks' terms make the layer's value: one sum a layer. So a part that is missing, doubled, of
another epoch or of stale KV is another number, and another token.

`Part` mirrors what a `Shard` does, `Teller` what `hexswarm.peer.runner` and `hexswarm.peer.led`
tell the members for a batch, `Obeyer` what `hexswarm.peer.groups.obeying` and
`hexswarm.peer.following` make of it. Words, commands and their checks are the product's own.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hexswarm.errors import MemberLost, OutOfMemory, RemoteProtocolError
from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.peer.groups import words
from hexswarm.peer.groups.checks import Checks
from hexswarm.peer.groups.streams import Place
from hexswarm.peer.steps import Activations, Batch, Result, Row
from hexswarm.records import SHARES_SUM, Span
from tests.loopback import VOCABULARY
from tests.simulation.collective import Account, VirtualCollective, VirtualSums

MODULUS = 9973
"""As in `IntegerModel`."""
SHARED_S = 5.0
"""As in `hexswarm.peer.stream_sums`."""
Extent = list[Any]
"""Position, count, blocks, tokens of a block: as `pack_extents` makes them."""
Waits = Callable[[int], Awaitable[None]]
"""Takes as long as so many tokens take to compute here."""


class Part:
    """One rank's share of the layers and of the KV."""

    def __init__(self, place: Place, span: Span, waits: Waits) -> None:
        shares, rank = place.invitation.shares, place.rank
        self.place, self.span, self.waits = place, span, waits
        self._low, self._high = sum(shares[:rank]), sum(shares[: rank + 1])
        self._cells: dict[int, list[list[int | None]]] = {}

    def own(self, value: int) -> int:
        return value * self._high // SHARES_SUM - value * self._low // SHARES_SUM

    def make_pool(self, blocks: int) -> None:
        self._cells = {
            layer: [[None] * BLOCK_TOKENS for _ in range(blocks)]
            for layer in range(self.span.first, self.span.end)
        }

    def poison(self, blocks: Iterable[int]) -> None:
        for layer in self._cells.values():
            for block in blocks:
                layer[block] = [None] * BLOCK_TOKENS

    def terms(self, layer: int, values: Sequence[int], extents: Sequence[Extent]) -> Any:
        """Our term of each token's value after the layer; our parts are kept."""
        cells, out, coming = self._cells[layer], list[int](), iter(values)
        for position, count, blocks, size in extents:
            seen = 0
            for at in range(position):
                kept = cells[blocks[at // size]][at % size]
                assert kept is not None, f"a gap in the KV before position {position}"
                seen += kept
            for at in range(position, position + count):
                value = next(coming)
                mine = self.own(value)
                cells[blocks[at // size]][at % size] = mine
                seen += mine
                out.append(self.own(3 * value + layer) + seen)
        return np.array(out, np.float32)

    async def forward(
        self,
        group: VirtualCollective,
        account: Account,
        values: Sequence[int],
        extents: Sequence[Extent],
        span: Span,
    ) -> list[int]:
        """The values after the layers, the same at all ranks. Raises MemberLost."""
        place, asked = self.place, self.place.invitation
        await self.waits(len(values))
        for layer in range(span.first, span.end):
            terms = self.terms(layer, values, extents)
            given = (place.rank, group.number + 1, terms.tobytes())
            account.gave(self.process, asked, *given)
            await group.total(terms)
            account.used(asked, place.rank, group.number, terms.tobytes())
            values = [int(term) % MODULUS for term in terms]
        return list(values)

    process: Any = None
    """Whose it is."""


class Teller:
    """The leader's end: batches become commands."""

    def __init__(self, part: Part, sums: VirtualSums, account: Account, layers: int) -> None:
        self.part, self.sums, self._account, self._layers = part, sums, account, layers
        self._erased: list[int] = []
        """Blocks of which the members do not know yet: told with the next word."""

    def erase(self, blocks: Sequence[int]) -> None:
        self.part.poison(blocks)
        self._erased += blocks

    async def make_pool(self, blocks: int) -> None:
        """Raises MemberLost or OutOfMemory."""
        await self._tell(["pool", blocks, BLOCK_TOKENS])
        self.part.make_pool(blocks)
        await self._await_all()

    async def run(self, batch: Batch) -> list[Result]:
        """As `Runner.run` on a `LedShard`: what fails in between ends the group."""
        found: dict[int, Result] = {}
        spans: dict[Span, list[int]] = {}
        for index, row in enumerate(batch.rows):
            spans.setdefault(row.span or self.part.span, []).append(index)
        if self._erased:
            erased, self._erased = self._erased, []
            await self._tell(["clear", erased])
        for span, at in spans.items():
            results = await self._run(span, [batch.rows[index] for index in at])
            found.update(zip(at, results, strict=True))
        return [found[index] for index in range(len(batch.rows))]

    async def _run(self, span: Span, rows: Sequence[Row]) -> list[Result]:
        group, values, extents = self.sums.collective, list[int](), list[Extent]()
        for row in rows:
            if isinstance(row.payload, Activations):
                values += map(int, struct.unpack(f"<{row.count}f", row.payload.data))
            else:
                values += row.payload
            blocks = row.blocks[: -(-(row.position + row.count) // BLOCK_TOKENS)]
            extents.append([row.position, row.count, list(blocks), BLOCK_TOKENS])
        shared = span.first > 0
        if not shared:
            await self._tell(["embed", values])
        count = len(values) if shared else None
        await self._tell(["forward", extents, span.first, span.end, count])
        if shared:
            await self._share(values)
        values = await self.part.forward(group, self._account, values, extents, span)
        ends = [sum(row.count for row in rows[: at + 1]) for at in range(len(rows))]
        if span.end < self._layers:
            cut = [values[end - row.count : end] for row, end in zip(rows, ends, strict=True)]
            return list(map(_handed_on, rows, cut))
        chosen = [(row, end) for row, end in zip(rows, ends, strict=True) if row.sample]
        tokens = iter(await self._head(values, [end - 1 for _, end in chosen]))
        return [_told(row, next(tokens)) if row.sample else Result(row) for row in rows]

    async def _head(self, values: Sequence[int], at: Sequence[int]) -> list[int]:
        """Of the last tokens what follows: the ranks lay their parts side by side."""
        if not at:
            return []
        known, last = len(at) == len(values), [values[index] for index in at]
        await self._tell(["head", None if known else len(last)])
        if not known:
            await self._share(last)
        return [value % VOCABULARY for value in await head(self.part, self.sums.collective, last)]

    async def _share(self, values: Sequence[int]) -> None:
        await self.sums.collective.say(struct.pack(f"<{len(values)}q", *values))

    async def _tell(self, command: Sequence[Any]) -> None:
        await self.sums.collective.say(words.pack(command))

    async def _await_all(self) -> None:
        """As `words.await_all`."""
        group, end_s = self.sums.collective, asyncio.get_running_loop().time() + words.LONG_S
        while True:
            await group.say(words.pack(words.STATUS))
            answers = await group.lay(words.pack(["done"]), words.MOST_ANSWER_BYTES)
            if all(answers):
                break
            if asyncio.get_running_loop().time() > end_s:
                raise group.lost(1, "was not done in time")
            await asyncio.sleep(words.STATUS_EVERY_S)
        for rank, answer in enumerate(answers):
            if words.unpack(answer) != ["done"]:
                raise OutOfMemory(f"rank {rank} of the group cannot do its part")


class Obeyer:
    """A member's end: commands become what is computed."""

    def __init__(self, part: Part, sums: VirtualSums, account: Account, kv_tokens: int) -> None:
        self._part, self._sums, self._account = part, sums, account
        self._checks = Checks(part.span, VOCABULARY, kv_tokens)
        self._x: list[int] = []
        self._said: Sequence[Any] = ()

    async def run(self) -> tuple[MemberLost, BaseException | None]:
        """To the end of the epoch: why it ended, and what went wrong here, if it did."""
        group = self._sums.collective
        try:
            while True:
                await self._next(group)
        except MemberLost as error:
            lost, wrong = error, None
        except RemoteProtocolError as error:
            lost, wrong = group.lost(0, f"said what was not agreed ({error.cause})"), error
        except Exception as error:
            lost, wrong = group.lost(group.rank, f"failed in a command ({error!r})"), error
        self._sums.leave(lost)
        return lost, wrong

    async def _next(self, group: VirtualCollective) -> None:
        said = await group.hear(words.SILENT_S)
        if not len(said):
            await group.lay(b"", 0)
            return
        command = words.unpack(said)
        if command == words.STATUS:
            answer = words.pack(self._said) if self._said else b""
            await group.lay(answer, words.MOST_ANSWER_BYTES)
            return
        self._checks.check(command)
        kind, *given = command
        match kind:
            case "pool":
                self._part.make_pool(given[0])
                self._said = ["done"]
            case "clear":
                self._part.poison(given[0])
            case "embed":
                self._x = given[0]
            case "forward":
                extents, first, end, rows = given
                x, span = await self._take(group, rows), Span(first, end)
                self._x = await self._part.forward(group, self._account, x, extents, span)
            case "head":
                await head(self._part, group, await self._take(group, given[0]))

    async def _take(self, group: VirtualCollective, rows: int | None) -> list[int]:
        if rows is None:
            return self._x
        came = await group.hear(SHARED_S)
        if len(came) != 8 * rows:
            raise group.lost(0, "shared hidden states of another size")
        return list(struct.unpack(f"<{rows}q", came))


async def head(part: Part, group: VirtualCollective, values: Sequence[int]) -> list[int]:
    """Each rank's parts of the values, laid side by side and added up. Raises MemberLost."""
    own = struct.pack(f"<{len(values)}q", *map(part.own, values))
    parts = await group.lay(own, len(own))
    return list(np.sum([np.frombuffer(one, np.int64) for one in parts], axis=0))


def _handed_on(row: Row, values: Sequence[int]) -> Result:
    data = struct.pack(f"<{row.count}f", *values)
    return Result(row, activations=Activations(data, "float32"))


def _told(row: Row, token: int) -> Result:
    assert row.policy is not None
    if row.policy.logits:
        logits = [float(word == token) for word in range(VOCABULARY)]
        return Result(row, logits=struct.pack(f"<{VOCABULARY}f", *logits))
    return Result(row, token=int(token))
