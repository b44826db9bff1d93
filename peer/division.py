"""How a machine divides a span over its own devices: shares, memory, and how long a span may be.

Speed decides while memory allows: ranks wait for each other twice a layer, so the best cut is the
one with which all need the same time. If that does not fit somewhere, shares are limited by memory
(`hexswarm.peer.cuts.plan_cut`). Shares that the user gave are taken as they are, or refused.

Ranks that are processes on one CPU have its memory in common; GPUs have each their own. KV lies
where its heads lie, and heads come whole: of SmolLM2's three KV heads two ranks have two and one,
whatever their shares. So what fits is asked of the cut itself, rank by rank, and a group's memory
is the sum of its members' only as far as it can be filled. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hexswarm.architecture import EMBEDDING, LM_HEAD, end_shapes
from hexswarm.degree import Degree
from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.cuts import Cut, Member, Sizes, attention_runs, plan_cut
from hexswarm.peer.slices import read_sizes
from hexswarm.records import Span


@dataclass(frozen=True, slots=True)
class Places:
    """The devices of a machine's ranks, in the order of ranks."""

    devices: tuple[str, ...]
    speeds: tuple[float, ...]
    """In any unit that they have in common."""
    rooms_bytes: tuple[int, ...]
    """For weights and KV on each device; a single number: in memory that all have in common."""

    def __post_init__(self) -> None:
        if len(self.speeds) != len(self.devices):
            raise UsageError("each device of a machine has a speed")
        if len(self.rooms_bytes) not in (1, len(self.devices)) or min(self.rooms_bytes) < 0:
            raise UsageError("devices have memory each, or in common")

    def share(self, share: float, most: int | None = None) -> Places:
        """With no more than that share of the memory, and `most` bytes in all."""
        rooms = [int(room * share) for room in self.rooms_bytes]
        if most is not None and most < sum(rooms):
            rooms = [most * room // sum(rooms) for room in rooms]
        return replace(self, rooms_bytes=tuple(rooms))

    @property
    def common(self) -> bool:
        return len(self.rooms_bytes) == 1


@dataclass(frozen=True, slots=True)
class Load:
    """What a span needs beside its shapes."""

    kv_bytes: int = 0
    """Of all ranks together, each KV head counted once."""
    shrink: float = 1.0
    """Bytes of weights as they are kept over those of their dtype: less than 1 with few bits."""


def divide(sizes: Sizes, degree: Degree, places: Places, load: Load) -> Cut:
    """The cut of a span over `places`. Raises UsageError, or OutOfMemory if it does not fit."""
    count = len(places.devices)
    if count > sizes.heads:
        raise UsageError(
            f"--tensor-parallel {degree} makes {count} ranks of {sizes.heads} heads",
            remedy=f"at most --tensor-parallel {sizes.heads}",
        )
    speeds = [float(share) for share in degree.shares] or list(places.speeds)
    cut = plan_cut(sizes, [Member(speed) for speed in speeds])
    short = _short(cut, places, load)
    if short is None:
        return cut
    if degree.shares or places.common:
        raise short
    kv_share = load.kv_bytes / max(sum(places.rooms_bytes), 1)
    rooms = [room * (1 - kv_share) / load.shrink for room in places.rooms_bytes]
    members = [Member(speed, max(int(room), 1)) for speed, room in zip(speeds, rooms, strict=True)]
    cut = plan_cut(sizes, members)
    short = _short(cut, places, load)
    if short is not None:
        raise short
    return cut


def needs_bytes(cut: Cut, load: Load) -> list[int]:
    """What each rank holds."""
    kv_heads = cut.sizes.kv_heads
    return [
        int(
            cut.sizes.part_bytes(part) * load.shrink + load.kv_bytes * len(part.kv_heads) / kv_heads
        )
        for part in cut.parts
    ]


def _short(cut: Cut, places: Places, load: Load) -> OutOfMemory | None:
    """Why it does not fit, None if it does."""
    needed = needs_bytes(cut, load)
    if places.common:
        needed = [sum(needed)]
    for rank, (want, room) in enumerate(zip(needed, places.rooms_bytes, strict=True)):
        if want > room:
            who = "all ranks together" if places.common else f"rank {rank} ({places.devices[rank]})"
            return OutOfMemory(
                f"{who} would hold {want / 1e9:.2f} GB, with room for {room / 1e9:.2f}",
                remedy="choose a shorter span, lower --kv-tokens, or other shares",
            )
    return None


def even(cut: Cut) -> bool:
    """Whether each rank's KV heads have equally many queries: only then one graph holds a step."""
    return all(len(attention_runs(part.heads, cut.sizes.group)) < 2 for part in cut.parts)


def in_words(cut: Cut) -> str:
    """ "3 ranks, 56:33:11": the percent of the weights that each holds."""
    return f"{len(cut)} ranks, " + ":".join(f"{100 * share:.0f}" for share in cut.shares)


class Spans:
    """The sizes of any span of a model, quickly: hundreds are tried to find the longest."""

    def __init__(self, config: Mapping[str, Any], layers: int, weight_bytes: int) -> None:
        self._config = dict(config)
        self._whole = read_sizes(config, Span(0, layers), weight_bytes)
        self._mixed = [0]
        for index in range(layers):
            one = read_sizes(config, Span(index, index + 1), weight_bytes)
            self._mixed.append(self._mixed[-1] + one.mixed_layers)

    def sizes(self, span: Span) -> Sizes:
        mixed = self._mixed[span.end] - self._mixed[span.first]
        ends = end_shapes(self._config, span)
        return replace(
            self._whole,
            dense_layers=len(span) - mixed,
            mixed_layers=mixed,
            word_matrices=sum(name in (EMBEDDING, LM_HEAD) for name in ends),
        )

    def fits(self, span: Span, degree: Degree, places: Places, load: Load) -> bool:
        """Whether `span` can be divided so. Raises UsageError if no span can."""
        try:
            divide(self.sizes(span), degree, places, load)
        except OutOfMemory:
            return False
        return True
