"""The words of the swarm as frozen records: models, spans, announcements, links, routes, sampling.

Records hold facts and their invariants, nothing else; what they mean for a decision is computed in
`hexswarm.router` and `hexswarm.peer`. Units are in the field names. A violated invariant raises
`UsageError` here, at construction, so that no later code has to ask again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NewType

from hexswarm.errors import UsageError

PeerId = NewType("PeerId", str)
"""libp2p peer id in base58; for Ed25519 identities it contains the public key."""

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types allowed for weights, KV and activations, with their size in bytes."""

State = Literal["joining", "online", "draining"]


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A run of layers [first, end)."""

    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end:
            raise UsageError(
                f"span {self.first}:{self.end} is empty or negative",
                remedy="write FIRST:END with 0 <= FIRST < END, e.g. 0:10",
            )

    def __len__(self) -> int:
        return self.end - self.first

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.end

    def __str__(self) -> str:
        return f"{self.first}:{self.end}"

    def covers(self, other: Span) -> bool:
        return self.first <= other.first and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> Span:
        """Read "FIRST:END"."""
        try:
            first, end = (int(part) for part in text.split(":"))
        except ValueError:
            raise UsageError(
                f"{text!r} is not a span", remedy="write FIRST:END, e.g. 0:10"
            ) from None
        return cls(first, end)


def uncovered(spans: Iterable[Span], layers: int) -> list[Span]:
    """The maximal runs of [0, layers) that no span covers, in order."""
    holes, reached = [], 0
    for span in sorted(spans):
        if span.first > reached:
            holes.append(Span(reached, min(span.first, layers)))
        reached = max(reached, span.end)
        if reached >= layers:
            return holes
    return [*holes, Span(reached, layers)]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What everybody must know of a model to route it: no tensors, no tokenizer.

    `digest` (64 hex digits) names the exact weights: see `hexswarm.store`.
    """

    digest: str
    name: str
    architecture: str
    layers: int
    hidden: int
    vocabulary: int
    context: int
    kv_bytes_per_token_layer: int
    """KV bytes of one token in one layer at two bytes an element."""

    def __post_init__(self) -> None:
        if len(self.digest) != 64 or not set(self.digest) <= set("0123456789abcdef"):
            raise UsageError("a model digest has 64 hexadecimal digits")
        if min(self.layers, self.hidden, self.vocabulary, self.context) < 1:
            raise UsageError("a model has at least one layer, dimension, word and position")


@dataclass(frozen=True, slots=True)
class Speed:
    """What a peer measured of itself, for one layer, at batch 1.

    A stage of n layers then takes n x `decode_layer_s` a token, plus `head_s` at the tail.
    """

    decode_layer_s: float
    prefill_layer_s: float
    """Seconds per prompt token and layer, in a chunk of usual size."""
    head_s: float
    """Seconds for final norm, LM head and sampling of one token."""

    def __post_init__(self) -> None:
        for value in (self.decode_layer_s, self.prefill_layer_s, self.head_s):
            if not (math.isfinite(value) and 0 <= value < 1e4):
                raise UsageError("a measured speed is a finite, non-negative number of seconds")


@dataclass(frozen=True, slots=True)
class GroupMembership:
    """The tensor-parallel group that a peer belongs to; only the leader (rank 0) serves."""

    group: str
    rank: int
    size: int
    epoch: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size <= 64:
            raise UsageError("a group has 1 to 64 members, ranked from 0")


@dataclass(frozen=True, slots=True)
class Announcement:
    """A peer's own, signed word about itself; claims, to be blended with what is measured."""

    peer: PeerId
    model: str
    """Digest of the model served."""
    model_name: str
    layers: int
    """Number of layers of the whole model."""
    span: Span
    state: State
    dtype: str
    device: str
    speed: Speed
    free_kv_tokens: int
    """Tokens for which every layer of the span has room."""
    queue_s: float
    """Seconds of work that waits at this moment."""
    addresses: tuple[str, ...]
    """Multiaddresses without /p2p suffix, relays included."""
    neighbours: tuple[tuple[PeerId, float], ...] = ()
    """Round-trip seconds to at most 8 peers."""
    group: GroupMembership | None = None
    software: str = ""
    issued_s: float = 0.0
    """Unix time of issue."""
    sequence: int = 0

    def __post_init__(self) -> None:
        if self.span.end > self.layers:
            raise UsageError(f"span {self.span} reaches beyond layer {self.layers}")
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}")
        if self.state not in ("joining", "online", "draining"):
            raise UsageError(f"unknown state {self.state!r}")
        if self.free_kv_tokens < 0 or not (math.isfinite(self.queue_s) and self.queue_s >= 0):
            raise UsageError("free KV and queue delay are finite and not negative")
        if len(self.addresses) > 8 or len(self.neighbours) > 8:
            raise UsageError("an announcement lists at most 8 addresses and 8 neighbours")
        if self.sequence < 0 or not math.isfinite(self.issued_s):
            raise UsageError("sequence and issue time are finite and not negative")

    @property
    def serving(self) -> bool:
        return self.state == "online" and (self.group is None or self.group.rank == 0)


@dataclass(frozen=True, slots=True)
class Link:
    """What is known of the way between two peers."""

    rtt_s: float
    bytes_per_s: float = math.inf

    @property
    def one_way_s(self) -> float:
        return self.rtt_s / 2


@dataclass(frozen=True, slots=True)
class Stage:
    """A span as a route uses it: perhaps less than the peer holds."""

    peer: PeerId
    span: Span
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Stages that cover layers [0, layers) once, in order, with the predicted times."""

    stages: tuple[Stage, ...]
    ttft_s: float
    """Predicted seconds to the first token."""
    tpot_s: float
    """Predicted seconds per further token: the length of the ring."""
    spares: tuple[Route, ...] = ()

    def __post_init__(self) -> None:
        reached = 0
        for stage in self.stages:
            if stage.span.first != reached:
                raise UsageError("the stages of a route adjoin and start at layer 0")
            reached = stage.span.end
        if len({stage.peer for stage in self.stages}) != len(self.stages):
            raise UsageError("a peer serves one stage of a route")

    @property
    def head(self) -> Stage:
        return self.stages[0]

    @property
    def tail(self) -> Stage:
        return self.stages[-1]

    def __str__(self) -> str:
        return " -> ".join(f"{s.peer[-8:]} [{s.span}]" for s in self.stages)


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a route must offer.

    `ttft_s` and `tpot_s` are limits at the given percentile, None without limit.
    """

    model: str
    layers: int
    hidden_bytes: int
    """Bytes of one token's activations on the wire."""
    prompt_tokens: int
    new_tokens: int
    client: PeerId | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 50.0
    model_name: str = ""
    """What a person calls the model; for messages only."""
    deny: frozenset[PeerId] = frozenset()
    allow: frozenset[PeerId] | None = None

    @property
    def kv_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tail chooses a token: the standard filters, in Hugging Face's order.

    repetition penalty, temperature, top-k, top-p, min-p, then one draw that depends on (seed,
    position) only, so that an answer can be reproduced whichever peers computed it. Temperature 0
    is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch a filter off.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, value: float, low: float, high: float, *, open_low: bool) -> None:
            inside = math.isfinite(value) and value <= high
            if not inside or value < low or (open_low and value == low):
                bracket = "(" if open_low else "["
                raise UsageError(f"{name} = {value} is outside {bracket}{low:g}, {high:g}]")

        check("temperature", self.temperature, 0, 100, open_low=False)
        check("top_p", self.top_p, 0, 1, open_low=True)
        check("top_k", self.top_k, 0, 1 << 20, open_low=False)
        check("min_p", self.min_p, 0, 1, open_low=False)
        check("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        check("seed", self.seed, 0, (1 << 64) - 1, open_low=False)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Remembered:
    """A peer seen before, kept on disk to rejoin the swarm when every bootstrap is gone."""

    peer: PeerId
    addresses: tuple[str, ...]
    seen_s: float
