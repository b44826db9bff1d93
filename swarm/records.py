"""The words of the swarm as frozen records: models, spans, announcements, links, routes, sampling.

Records hold facts and their invariants, nothing else; what they mean for a decision is computed in
`hexswarm.router` and `hexswarm.peer`. Units are in the field names. A violated invariant raises
`UsageError` here, at construction, so that no later code has to ask again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, NewType

from hexswarm.errors import UsageError

PeerId = NewType("PeerId", str)
"""libp2p peer id in base58; for Ed25519 identities it contains the public key."""

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types allowed for weights, KV and activations, with their size in bytes."""

ROUNDINGS = ("int8", "int4")
"""How a peer may have rounded the weights of its layers."""

NUMERICS = (*DTYPES, *(f"{dtype}+{rounding}" for dtype in DTYPES for rounding in ROUNDINGS))
"""With which numbers a peer computes: an element type, and how its weights are rounded."""

State = Literal["joining", "online", "draining"]

SHARES_SUM = 1000
"""Shares of a group's cut are told in thousandths."""


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
    row_layer_s: float = 0.0
    """Seconds per layer that each further row of a decode batch adds to `decode_layer_s`."""

    def __post_init__(self) -> None:
        for value in (self.decode_layer_s, self.prefill_layer_s, self.head_s, self.row_layer_s):
            if not (math.isfinite(value) and 0 <= value < 1e4):
                raise UsageError("a measured speed is a finite, non-negative number of seconds")


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a peer is at one moment; announced, and told with every lease granted or refused."""

    queue_s: float = 0.0
    """Mean seconds that a decode step waits before it is computed."""
    rows: float = 0.0
    """Mean number of sessions in a decode batch, over all time: 0 when idle."""
    busy: float = 0.0
    """Share of the peer's throughput that is in use, 0 to 1. A session alone in a fast ring keeps a
    device awake, yet uses little of it: a batch would serve others beside it."""
    free_kv_tokens: int = 0
    """Tokens for which every layer of the span has room."""

    def __post_init__(self) -> None:
        for value in (self.queue_s, self.rows, self.busy):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError("load is told in finite numbers, not negative")
        if self.busy > 1 or self.free_kv_tokens < 0:
            raise UsageError("a peer is at most wholly busy, and free KV is not negative")


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a peer is in the delay space (Vivaldi, Dabek et al. 2004): see `router.vivaldi`.

    The round trip between two peers is about the distance of their positions plus both heights.
    """

    position_s: tuple[float, float, float]
    height_s: float
    """What every way from here pays first: the access line, a relay."""
    error: float
    """Relative error of estimates made with it, as far as its owner can tell: 0.1 is 10 %."""

    def __post_init__(self) -> None:
        values = (*self.position_s, self.height_s, self.error)
        if len(values) != 5 or not all(math.isfinite(value) for value in values):
            raise UsageError("coordinates are five finite numbers")
        if self.height_s < 0 or self.error < 0 or max(map(abs, values)) > 1e4:
            raise UsageError("coordinates lie within hours, height and error are not negative")


@dataclass(frozen=True, slots=True)
class GroupMembership:
    """The tensor-parallel group that a peer belongs to; only the leader (rank 0) serves."""

    group: str
    rank: int
    size: int
    epoch: int
    shares: tuple[int, ...] = ()
    """The cut: of the weights each rank's part in thousandths, by rank; empty if not told."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size <= 64:
            raise UsageError("a group has 1 to 64 members, ranked from 0")
        if self.shares:
            check_shares(self.shares, self.size)


def check_shares(shares: tuple[int, ...], size: int) -> None:
    """Raise UsageError unless these are parts of a thousand for so many members."""
    if len(shares) != size or min(shares) < 1 or sum(shares) != SHARES_SUM:
        raise UsageError(
            f"a cut gives each of {size} members at least 1 of {SHARES_SUM}, and all of them away"
        )


@dataclass(frozen=True, slots=True)
class GroupOffer:
    """A peer would be part of a group with others of its LAN."""

    name: str
    """`auto`, or what those call themselves who are to be together."""
    free_bytes: int
    """For weights and KV, if the peer gave up what it holds now."""
    host: str
    """Where its direct streams come in: address and port."""
    port: int
    leads: bool = False
    """Its owner gave it the layers that it announces: it would rather lead than follow."""
    waiting: bool = False
    """It holds nothing, and loads nothing of its own: the layers announced are no claim."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 32 or not self.name.isprintable():
            raise UsageError("a group has a printable name of 1 to 32 characters")
        if not 1 <= len(self.host) <= 64 or not 0 < self.port < 1 << 16:
            raise UsageError("who offers itself for groups can be reached somewhere")
        if self.free_bytes < 0:
            raise UsageError("free memory is not negative")


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
    """One of `NUMERICS`."""
    device: str
    speed: Speed
    free_kv_tokens: int
    """Tokens for which every layer of the span has room."""
    queue_s: float
    """Mean seconds that a decode step waits before it is computed."""
    addresses: tuple[str, ...]
    """Multiaddresses without /p2p suffix, relays included."""
    neighbours: tuple[tuple[PeerId, float], ...] = ()
    """Round-trip seconds to at most 8 peers."""
    group: GroupMembership | None = None
    software: str = ""
    issued_s: float = 0.0
    """Unix time of issue."""
    sequence: int = 0
    rows: float = 0.0
    """As in `Load`."""
    busy: float = 0.0
    """As in `Load`."""
    kv_tokens: int = 0
    """Tokens of the whole KV pool; 0 if not told."""
    coordinates: Coordinates | None = None
    """None until the first round trip was measured."""
    up_bytes_per_s: float | None = None
    """Fastest that it was seen to send; None if not measured."""
    down_bytes_per_s: float | None = None
    """Fastest that it was seen to receive; None if not measured."""
    most_layers: int = 0
    """Most layers that it can hold, wherever they begin; 0: it stays where it is."""
    offer: GroupOffer | None = None
    """None: it is not to be had for groups with others."""

    def __post_init__(self) -> None:
        if not 0 <= self.most_layers <= self.layers:
            raise UsageError("a peer holds no more layers than the model has")
        if self.span.end > self.layers:
            raise UsageError(f"span {self.span} reaches beyond layer {self.layers}")
        if self.dtype not in NUMERICS:
            raise UsageError(f"unknown dtype {self.dtype!r}")
        if self.state not in ("joining", "online", "draining"):
            raise UsageError(f"unknown state {self.state!r}")
        if self.kv_tokens < 0:
            raise UsageError("a KV pool is not negative")
        Load(self.queue_s, self.rows, self.busy, self.free_kv_tokens)  # checks
        for speed in (self.up_bytes_per_s, self.down_bytes_per_s):
            if speed is not None and not (math.isfinite(speed) and speed > 0):
                raise UsageError("a measured bandwidth is finite and positive")
        if len(self.addresses) > 8 or len(self.neighbours) > 8:
            raise UsageError("an announcement lists at most 8 addresses and 8 neighbours")
        if self.sequence < 0 or not math.isfinite(self.issued_s):
            raise UsageError("sequence and issue time are finite and not negative")

    @property
    def stands(self) -> bool:
        """It speaks for the layers that it announces: whole, or as the leader of a group.

        Members' layers are their leader's, and who waits for a group has none.
        """
        waiting = self.offer is not None and self.offer.waiting
        return not waiting and (self.group is None or self.group.rank == 0)

    @property
    def serving(self) -> bool:
        return self.state == "online" and self.stands

    @property
    def relayed(self) -> bool:
        """It is reached through relays alone."""
        return bool(self.addresses) and all("/p2p-circuit" in item for item in self.addresses)

    @property
    def load(self) -> Load:
        return Load(self.queue_s, self.rows, self.busy, self.free_kv_tokens)

    def with_load(self, load: Load) -> Announcement:
        """The same peer as somebody heard of it later."""
        return replace(
            self,
            queue_s=load.queue_s,
            rows=load.rows,
            busy=load.busy,
            free_kv_tokens=load.free_kv_tokens,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """What is known of the way between two peers."""

    rtt_s: float
    """Median."""
    bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    """How much longer than the median the 95th percentile of the way one way is."""
    relayed: bool = False
    """The way leads through a relay."""

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
    """Predicted seconds to the first token, median."""
    tpot_s: float
    """Predicted seconds per further token, median: the length of the ring."""
    spares: tuple[Route, ...] = ()
    """Further routes within the limits, which share as few peers as possible."""
    ttft_p95_s: float = 0.0
    tpot_p95_s: float = 0.0
    price: float = 0.0
    """What the route takes from others, in layers of an idle peer: see `router.cost`."""
    unmeasured: tuple[tuple[PeerId, PeerId], ...] = ()
    """Ways of the ring that nobody has measured, counted as no time at all: the predictions are
    bounds until they are measured, which a client does before it uses the route."""

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

    `ttft_s` and `tpot_s` are limits at the given percentile, None without limit. With a limit the
    cheapest route within it is wanted, without any the fastest.
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
    trusted: frozenset[PeerId] | None = None
    """If given, no other peer may see the request's activations."""
    dtypes: frozenset[str] | None = None
    """If given, peers of these `NUMERICS` only; otherwise those whose weights are not rounded."""
    min_bytes_per_s: float = 0.0
    """Peers must be known to send and receive at least as fast."""
    warm: frozenset[PeerId] = frozenset()
    """Peers that the client has a link to: nothing needs to be dialled."""
    spread: float = 0.0
    """Relative difference in cost below which two routes are near-equal; of near-equal ones the
    less busy of two drawn at random is taken, so that clients with the same view do not all take
    the same. 0: always the best."""
    previous: Route | None = None
    """The route of this client's last request: kept unless another is better by more than
    `router.routing.HYSTERESIS`, which keeps load from swinging."""

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
