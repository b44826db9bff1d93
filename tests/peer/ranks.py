"""A stage whose ranks are threads, as a test double: real shards and runners, in-process sums."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hexswarm.peer.cuts import Cut, Part
from hexswarm.peer.models.architecture import Architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import part_slices
from hexswarm.peer.steps import Batch, Result
from hexswarm.peer.sums import ThreadSums, thread_sums
from hexswarm.records import Span


def take_slices(
    config: dict[str, Any], span: Span, part: Part, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What `part` has of a checkpoint in memory."""
    found = {}
    for name, own in part_slices(config, span, part).items():
        rows = tensors[name][own.rows.start : own.rows.stop]
        columns = own.columns
        found[name] = rows if columns is None else rows[:, columns.start : columns.stop]
    return found


class ThreadStage:
    """The ranks of one span; a context manager that ends its threads."""

    def __init__(
        self,
        architecture: Architecture,
        config: dict[str, Any],
        span: Span,
        cut: Cut,
        tensors: Mapping[str, torch.Tensor],
        *,
        blocks: int = 64,
        block: int = 4,
        **options: Any,
    ) -> None:
        self.sums: list[ThreadSums] = thread_sums(len(cut))
        self.runners = []
        for part, sums in zip(cut.parts, self.sums, strict=True):
            own = take_slices(config, span, part, tensors)
            shard = Shard(architecture, span, architecture.layers, own, part=part,
                          sums=None if part.whole else sums, **options)  # fmt: skip
            assert not own
            pool = shard.make_pool(blocks, block)
            pool.data.fill_(float("nan"))  # a slot that nobody wrote shows at once
            self.runners.append(Runner(shard, pool))
        self._threads = ThreadPoolExecutor(len(cut))

    def __enter__(self) -> ThreadStage:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def run(self, batch: Batch) -> list[Result]:
        """The results of rank 0; every other rank has the same, bit for bit."""
        jobs = [self._threads.submit(self._one, rank, batch) for rank in range(len(self.runners))]
        first, *others = [job.result(30) for job in jobs]
        assert all(other == first for other in others)
        return first

    def _one(self, rank: int, batch: Batch) -> list[Result]:
        try:
            return self.runners[rank].run(batch)
        except BaseException:
            self.sums[rank].leave()
            raise
