"""From a batch of rows to their results: payloads in, the shard's layers, payloads out.

The rows of a batch are independent computations that share the reading of the weights, and the
runner keeps them so: a row with an id outside the vocabulary, activations that are not finite or a
block table that does not fit gets an error of its own and never enters the batch, hence never
touches the KV store or its neighbours; a row whose own result overflows fails alone, too. So do
activations of a size that no model has (`MAX_ACTIVATION`), on either side. Only running out of
memory concerns the whole batch and is raised.

Numbers of all rows go to the device in one copy, are checked there in one pass, and come back in
one copy, since sixty-four of each would take longer than the layers. On a GPU nobody can wait for
that check before the layers begin: zeros stand in there for a row that must not be taken, whose own
KV then is worthless, and its session is taken back, as after any error. `launch` gives the batch to
the device, its `Flight` the results (`hexswarm.peer.flight`); `run` does both.

Sessions may use different parts of the span; rows with the same part run together. Payload bytes
are elements in the machine's order, which is little-endian wherever we run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hexswarm.errors import HexswarmError, OutOfMemory, UsageError
from hexswarm.kernels.ragged import Extent, Ragged, places
from hexswarm.peer.choosing import Choice
from hexswarm.peer.flight import Chosen, Flight, down, up
from hexswarm.peer.kv import KvPool
from hexswarm.peer.shard import Shard, torch_dtype
from hexswarm.peer.steps import Activations, Batch, Result, Row, SessionKey, TailPolicy
from hexswarm.records import Span

assert sys.byteorder == "little", "payloads are little-endian"

MAX_ACTIVATION = 1e9
"""Largest element that is taken or handed on. The largest ones published for open models are about
2e4; the squares of a whole row of these can still be summed in float32, as its norm does."""

_INSANE = f"activations are not finite, or above {MAX_ACTIVATION:g}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row that passed its checks: where it goes in the cache."""

    index: int
    row: Row
    extent: Extent
    span: Span
    policy: TailPolicy | None
    """Set if and only if a token is to be chosen after the row."""


class Runner:
    """Runs batches on one shard and its KV pool; owned by the one thread that owns the device.

    A sampled row at the tail ends as its `policy` says, or else as `policies` says of its session.
    That may be a live mapping which the stage keeps as sessions come and go.
    """

    def __init__(
        self,
        shard: Shard,
        pool: KvPool,
        policies: Mapping[SessionKey, TailPolicy] | None = None,
    ) -> None:
        if pool.layers != len(shard.span) or pool.data.dtype != shard.dtype:
            raise UsageError("the KV pool was made for another shard")
        self.shard, self.pool = shard, pool
        self.policies: Mapping[SessionKey, TailPolicy] = {} if policies is None else policies

    def run(
        self, batch: Batch, policies: Mapping[SessionKey, TailPolicy] | None = None
    ) -> list[Result]:
        """One result per row, in order; `policies` stands in for those given at construction."""
        return self.launch(batch, policies).results()

    def launch(
        self, batch: Batch, policies: Mapping[SessionKey, TailPolicy] | None = None
    ) -> Flight:
        """Give the batch to the device."""
        policies = self.policies if policies is None else policies
        flight = Flight(len(batch.rows), self.shard.device)
        groups: dict[Span, list[_Entry]] = {}
        with torch.inference_mode(), self._here():
            for index, row in enumerate(batch.rows):
                try:
                    entry = self._admit(index, row, policies)
                    groups.setdefault(entry.span, []).append(entry)
                except HexswarmError as error:
                    flight.put(index, Result(row, error=error.cause))
            for span, entries in groups.items():
                self._launch_group(flight, span, entries)
            return flight.depart()

    def forget(self, blocks: Sequence[int]) -> None:
        """Erase what a session that ended left in its blocks."""
        self.pool.clear(blocks)

    def _here(self) -> AbstractContextManager[Any]:
        """Events are those of the current device."""
        device = self.shard.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _admit(self, index: int, row: Row, policies: Mapping[SessionKey, TailPolicy]) -> _Entry:
        """Check all that a row may get wrong by itself; HexswarmError says what."""
        span, shard = row.span or self.shard.span, self.shard
        if not shard.span.covers(span):
            raise UsageError(f"span {span} is not inside {shard.span}")
        if row.position < 0 or row.count < 1:
            raise UsageError(f"{row.count} tokens at position {row.position}")
        if row.position + row.count > shard.architecture.context:
            raise UsageError(f"position {row.position + row.count} exceeds the model's context")
        policy = None
        if row.sample and span.end == shard.total_layers:
            policy = row.policy or policies.get(row.session)
            if policy is None:
                raise UsageError("the session has no sampling policy")
        extent = self.pool.extent(row.position, row.count, row.blocks)
        (self._check_ids if span.first == 0 else self._check_hidden)(row)
        return _Entry(index, row, extent, span, policy)

    def _check_ids(self, row: Row) -> None:
        ids, vocabulary = row.payload, self.shard.architecture.vocabulary
        if isinstance(ids, Chosen):
            return
        if not isinstance(ids, Sequence) or len(ids) != row.count:
            raise UsageError(f"the head expects {row.count} token ids")
        if not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
            raise UsageError(f"a token id is outside 0..{vocabulary - 1}")

    def _check_hidden(self, row: Row) -> None:
        payload, hidden = row.payload, self.shard.architecture.hidden
        if not isinstance(payload, Activations):
            raise UsageError("a stage after the head expects activations")
        itemsize, size = torch_dtype(payload.dtype).itemsize, len(payload.data)
        if isinstance(payload.data, memoryview):
            size = payload.data.nbytes
        if size != row.count * hidden * itemsize:
            raise UsageError(f"{size} bytes are not {row.count} x {hidden} x {payload.dtype}")

    def _launch_group(self, flight: Flight, span: Span, entries: list[_Entry]) -> None:
        """Give rows of one sub-span to the device together."""
        shard, came = self.shard, None
        try:
            if span.first > 0:
                x, came = self._hidden(entries)
                if shard.device.type == "cpu" and not bool(came.all()):
                    entries, x = _leave_out(flight, entries, x, came)
                    came = None
                    if not entries:
                        return
                elif shard.device.type != "cpu":
                    x.masked_fill_(came.logical_not()[:, None], 0)
                batch = self._batch(entries)
            else:
                batch, ids = self._batch_of_ids(entries)
                x = shard.embed(ids)
            x = shard.forward(x, batch, self.pool, span)
            if span.end == shard.total_layers:
                self._finish(flight, x, entries, came)
            else:
                self._hand_on(flight, x, entries, came)
        except torch.OutOfMemoryError as error:
            tokens = sum(entry.row.count for entry in entries)
            raise OutOfMemory(
                f"a batch of {tokens} tokens does not fit {shard.device}",
                remedy="lower the tokens per batch",
            ) from error

    def _hidden(self, entries: list[_Entry]) -> tuple[Tensor, Tensor]:
        """All rows' hidden states `[tokens, hidden]` on the device, and which of them are sane."""
        hidden, parts = self.shard.architecture.hidden, []
        kinds = {entry.row.payload.dtype for entry in entries}
        for kind in kinds:  # nearly always one
            own = (e.row.payload.data for e in entries if e.row.payload.dtype == kind)
            raw = up(np.frombuffer(bytearray().join(own), np.uint8), self.shard.device)
            parts.append(raw.view(torch_dtype(kind)).view(-1, hidden).to(self.shard.dtype))
        x = parts[0] if len(parts) == 1 else _in_order(entries, list(kinds), parts)
        return x, _sane(x)

    def _batch(self, entries: list[_Entry]) -> Ragged:
        extents = [entry.extent for entry in entries]
        both = up(np.array(places(extents), np.int64), self.shard.device)
        return Ragged(tuple(extents), both[0], both[1])

    def _batch_of_ids(self, entries: list[_Entry]) -> tuple[Ragged, Tensor]:
        """The batch and its token ids, of which the device may know some already."""
        extents, chosen = [entry.extent for entry in entries], list[Tensor]()
        ids: list[int] = []
        sources: list[int] = []
        for entry in entries:
            payload = entry.row.payload
            if isinstance(payload, Chosen):
                first = _offset(chosen, payload.tokens)
                ids.append(0)
                sources.append(first + payload.index)
            else:
                ids.extend(payload)
                sources.extend([-1] * entry.row.count)
        numbers = up(np.array([*places(extents), ids, sources], np.int64), self.shard.device)
        batch, wanted = Ragged(tuple(extents), numbers[0], numbers[1]), numbers[2]
        if chosen:
            known = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
            wanted = torch.where(numbers[3] < 0, wanted, known[numbers[3].clamp_min(0)])
            wanted.clamp_min_(0)  # of logits that were not finite no token was chosen
        return batch, wanted

    def _hand_on(
        self, flight: Flight, x: Tensor, entries: list[_Entry], came: Tensor | None
    ) -> None:
        """Bring the activations back."""
        sane = _sane(x)
        flags = down(sane[None] if came is None else torch.stack((sane, came)))
        data, dtype = down(x.contiguous().view(torch.uint8)), self.shard.dtype_name

        def land() -> list[Result]:
            lines, results, first = data.numpy(), [], 0
            errors = _errors(flags, entries)
            for entry, error in zip(entries, errors, strict=True):
                last = first + entry.row.count
                if error is None:
                    sent = Activations(lines[first:last].tobytes(), dtype)
                    results.append(Result(entry.row, activations=sent))
                else:
                    results.append(Result(entry.row, error=error))
                first = last
            return results

        flight.add([entry.index for entry in entries], land)

    def _finish(
        self, flight: Flight, x: Tensor, entries: list[_Entry], came: Tensor | None
    ) -> None:
        """At the tail: norm, LM head and choice for the rows that want a token."""
        last, sampled, end = [], [], 0
        for entry in entries:
            end += entry.row.count
            if entry.policy is not None:
                last.append(end - 1)
                sampled.append(entry)
        choice = None
        if last:
            logits = self.shard.head(x if len(last) == len(x) else x[last])
            choice = Choice(logits, [(entry.row, entry.policy) for entry in sampled])
            if entries[0].span.first == 0:
                for at in choice.ahead:
                    flight.chosen[sampled[at].index] = Chosen(choice.tokens, at)
        flags = None if came is None else down(came[None])

        def land() -> list[Result]:
            errors = [None] * len(entries) if flags is None else _errors(flags, entries, first=1)
            made = iter(() if choice is None else choice.results())
            results = []
            for entry, error in zip(entries, errors, strict=True):
                found = Result(entry.row) if entry.policy is None else next(made)
                results.append(found if error is None else Result(entry.row, error=error))
            return results

        flight.add([entry.index for entry in entries], land)


def _leave_out(
    flight: Flight, entries: list[_Entry], x: Tensor, sane: Tensor
) -> tuple[list[_Entry], Tensor]:
    """Fail the rows that brought what nobody may take; the others go on without them."""
    errors = _errors(sane[None], entries, first=1)
    lines = x.split([entry.row.count for entry in entries])
    kept, rest = [], []
    for entry, line, error in zip(entries, lines, errors, strict=True):
        if error is None:
            kept.append(entry)
            rest.append(line)
        else:
            flight.put(entry.index, Result(entry.row, error=error))
    return kept, torch.cat(rest) if rest else x[:0]


def _errors(flags: Tensor, entries: list[_Entry], first: int = 0) -> list[str | None]:
    """What is wrong with each row, by flags of its tokens: as computed, as it came.

    The words begin with the `first` of these.
    """
    words = ("computed", "incoming")[first:]
    found: list[str | None] = [None] * len(entries)
    if bool(flags.all()):
        return found
    counts = [entry.row.count for entry in entries]
    for word, line in zip(words, flags, strict=True):  # what came badly is told before what became
        for at, part in enumerate(line.split(counts)):
            if not bool(part.all()):
                found[at] = f"{word} {_INSANE}"
    return found


def _in_order(entries: list[_Entry], kinds: list[str], parts: list[Tensor]) -> Tensor:
    """Rows of several dtypes, gathered by dtype, as they stand in the batch."""
    rest = {
        kind: iter(x.split([e.row.count for e in entries if e.row.payload.dtype == kind]))
        for kind, x in zip(kinds, parts, strict=True)
    }
    return torch.cat([next(rest[entry.row.payload.dtype]) for entry in entries])


def _offset(chosen: list[Tensor], tokens: Tensor) -> int:
    """Where `tokens` begin among all that were `chosen`; they are added if they are new."""
    first = 0
    for known in chosen:
        if known is tokens:
            return first
        first += len(known)
    chosen.append(tokens)
    return first


def _sane(x: Tensor) -> Tensor:
    """Of each token, whether all elements are numbers that a residual stream may hold."""
    if x.device.type == "cpu" and bool(_within(*x.aminmax())):  # all at once is a fast pass
        return torch.ones(len(x), dtype=torch.bool)
    return _within(*x.aminmax(dim=-1))


def _within(lowest: Tensor, highest: Tensor) -> Tensor:
    """A NaN comes through to here, and fails both comparisons."""
    return (lowest.float() >= -MAX_ACTIVATION) & (highest.float() <= MAX_ACTIVATION)
