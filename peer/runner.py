"""From a batch of rows to their results: payloads in, the shard's layers, payloads out.

The rows of a batch are independent computations that share the reading of the weights, and the
runner keeps them so: a row with an id outside the vocabulary, activations that are not finite or a
block table that does not fit gets an error of its own and never enters the batch, hence never
touches the KV store or its neighbours; a row whose own result overflows fails alone, too. So do
activations of a size that no model has (`MAX_ACTIVATION`), on either side. Only running out of
memory concerns the whole batch and is raised.

Sessions may use different parts of the span; rows with the same part run together. Payload bytes
are elements in the machine's order, which is little-endian wherever we run.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hexswarm.errors import HexswarmError, OutOfMemory, UsageError
from hexswarm.kernels.ragged import Extent, ragged
from hexswarm.peer.kv import KvPool
from hexswarm.peer.sampling import choose, choose_greedy
from hexswarm.peer.shard import Shard, torch_dtype
from hexswarm.peer.steps import Activations, Batch, Result, Row, SessionKey, TailPolicy
from hexswarm.records import Span

assert sys.byteorder == "little", "payloads are little-endian"

MAX_ACTIVATION = 1e9
"""Largest element that is taken or handed on. The largest ones published for open models are about
2e4; the squares of a whole row of these can still be summed in float32, as its norm does."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row that passed its checks: where it goes in the cache and what it brings."""

    index: int
    row: Row
    extent: Extent
    span: Span
    policy: TailPolicy | None
    """Set if and only if a token is to be chosen after the row."""
    inputs: Tensor
    """Ids `[count]`, or hidden states `[count, hidden]` in the shard's dtype; on the host."""


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
        policies = self.policies if policies is None else policies
        results: list[Result | None] = [None] * len(batch.rows)
        groups: dict[Span, list[_Entry]] = {}
        with torch.inference_mode():
            for index, row in enumerate(batch.rows):
                try:
                    entry = self._admit(index, row, policies)
                    groups.setdefault(entry.span, []).append(entry)
                except HexswarmError as error:
                    results[index] = Result(row, error=error.cause)
            for span, entries in groups.items():
                outcome = self._run_group(span, entries)
                for entry, result in zip(entries, outcome, strict=True):
                    results[entry.index] = result
        return [result for result in results if result is not None]

    def forget(self, blocks: Sequence[int]) -> None:
        """Erase what a session that ended left in its blocks."""
        self.pool.clear(blocks)

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
        inputs = self._ids(row) if span.first == 0 else self._hidden(row)
        return _Entry(index, row, extent, span, policy, inputs)

    def _ids(self, row: Row) -> Tensor:
        ids, vocabulary = row.payload, self.shard.architecture.vocabulary
        if not isinstance(ids, Sequence) or len(ids) != row.count:
            raise UsageError(f"the head expects {row.count} token ids")
        if not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
            raise UsageError(f"a token id is outside 0..{vocabulary - 1}")
        return torch.tensor(ids)

    def _hidden(self, row: Row) -> Tensor:
        payload, hidden = row.payload, self.shard.architecture.hidden
        if not isinstance(payload, Activations):
            raise UsageError("a stage after the head expects activations")
        dtype, data = torch_dtype(payload.dtype), memoryview(payload.data).cast("B")
        if len(data) != row.count * hidden * dtype.itemsize:
            raise UsageError(f"{len(data)} bytes are not {row.count} x {hidden} x {payload.dtype}")
        raw = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        x = raw.view(dtype).view(row.count, hidden)
        x = x.to(self.shard.dtype)
        if not _sane(x):
            raise UsageError(f"incoming activations are not finite, or above {MAX_ACTIVATION:g}")
        return x

    def _run_group(self, span: Span, entries: list[_Entry]) -> list[Result]:
        """Run rows of one sub-span together."""
        shard = self.shard
        try:
            batch = ragged([entry.extent for entry in entries], shard.device)
            inputs = entries[0].inputs
            if len(entries) > 1:
                inputs = torch.cat([entry.inputs for entry in entries])
            inputs = inputs.to(shard.device)
            x = shard.embed(inputs) if span.first == 0 else inputs
            x = shard.forward(x, batch, self.pool, span)
            if span.end == shard.total_layers:
                return self._finish(x, entries)
            return _hand_on(x.cpu(), entries, shard.dtype_name)
        except torch.OutOfMemoryError as error:
            tokens = sum(entry.row.count for entry in entries)
            raise OutOfMemory(
                f"a batch of {tokens} tokens does not fit {shard.device}",
                remedy="lower the tokens per batch",
            ) from error

    def _finish(self, x: Tensor, entries: list[_Entry]) -> list[Result]:
        """At the tail: norm, LM head and choice for the rows that want a token."""
        last, sampled, end = [], [], 0
        for entry in entries:
            end += entry.row.count
            if entry.policy is not None:
                last.append(end - 1)
                sampled.append((entry.row, entry.policy))
        if not last:
            return [Result(entry.row) for entry in entries]
        logits = self.shard.head(x if len(last) == len(x) else x[last])
        chosen = iter(_choose_all(logits, sampled))
        return [Result(entry.row) if entry.policy is None else next(chosen) for entry in entries]


def _hand_on(x: Tensor, entries: list[_Entry], dtype: str) -> list[Result]:
    """Copy each row's activations out."""
    results, first, all_sane = [], 0, _sane(x)
    for entry in entries:
        part = x[first : first + entry.row.count]
        first += entry.row.count
        if all_sane or _sane(part):
            data = _as_bytes(part).numpy().tobytes()
            results.append(Result(entry.row, activations=Activations(data, dtype)))
        else:
            error = f"computed activations are not finite, or above {MAX_ACTIVATION:g}"
            results.append(Result(entry.row, error=error))
    return results


def _choose_all(logits: Tensor, rows: Sequence[tuple[Row, TailPolicy]]) -> list[Result]:
    """A token or logits for each row; plain greedy rows share one argmax."""
    best = choose_greedy(logits)
    finite = [True] * len(rows) if _finite(logits) else [_finite(line) for line in logits]
    results = []
    for line, (row, policy), token, fine in zip(logits, rows, best, finite, strict=True):
        sampling = policy.sampling
        if not fine:
            results.append(Result(row, error="computed logits are not finite"))
        elif policy.logits:
            data = _as_bytes(line.cpu()).numpy().tobytes()
            results.append(Result(row, logits=data))
        elif sampling.greedy and sampling.repetition_penalty == 1:
            results.append(Result(row, token=token))
        else:
            results.append(_choose_one(line, row, policy))
    return results


def _choose_one(line: Tensor, row: Row, policy: TailPolicy) -> Result:
    position = row.position + row.count  # of the token to come
    try:
        return Result(row, token=choose(line, policy.sampling, policy.history, position))
    except UsageError as error:
        return Result(row, error=error.cause)


def _sane(x: Tensor) -> bool:
    """Whether all elements are numbers that a model's residual stream may hold."""
    lowest, highest = x.aminmax()  # a NaN comes through and fails both comparisons
    return float(lowest) >= -MAX_ACTIVATION and float(highest) <= MAX_ACTIVATION


def _finite(x: Tensor) -> bool:
    """Whether all elements are: their sum tells, unless it overflows itself."""
    total = x.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(x.isfinite().all())


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
