"""Hypothesis strategies for the records: whatever the constructors accept, small on purpose.

Numbers are round (milliseconds), so that equal costs, the hard case for an order, really occur.
"""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from hexswarm.records import (
    DTYPES,
    Announcement,
    Coordinates,
    GroupMembership,
    GroupOffer,
    Link,
    ModelSpec,
    PeerId,
    RouteRequest,
    Sampling,
    Span,
    Speed,
    State,
)
from hexswarm.router.network import Snapshot, snapshot

MODEL = "ab" * 32
OTHER_MODEL = "cd" * 32
CLIENT = PeerId("12D3KooWClient")
NAME = "SmolLM2-135M-Instruct"

STATES: tuple[State, ...] = ("joining", "online", "draining")


def peer_id(index: int) -> PeerId:
    return PeerId(f"12D3KooWPeer{index:04d}")


def milliseconds(most: int) -> st.SearchStrategy[float]:
    return st.integers(0, most).map(lambda value: value / 1000)


@st.composite
def spans(draw: st.DrawFn, layers: int = 12) -> Span:
    first = draw(st.integers(0, layers - 1))
    return Span(first, draw(st.integers(first + 1, layers)))


speeds = st.builds(
    Speed,
    decode_layer_s=milliseconds(5),
    prefill_layer_s=milliseconds(2),
    head_s=milliseconds(3),
    row_layer_s=milliseconds(1),
)

coordinates = st.builds(
    Coordinates,
    position_s=st.tuples(milliseconds(60), milliseconds(60), milliseconds(60)),
    height_s=milliseconds(20),
    error=st.sampled_from([0.0, 0.1, 1.0]),
)


@st.composite
def groups(draw: st.DrawFn) -> GroupMembership:
    size = draw(st.integers(1, 4))
    rank, epoch = draw(st.integers(0, size - 1)), draw(st.integers(0, 9))
    ends = sorted(draw(st.sets(st.integers(1, 999), min_size=size - 1, max_size=size - 1)))
    shares = tuple(b - a for a, b in itertools.pairwise([0, *ends, 1000]))
    return GroupMembership("group", rank, size, epoch, draw(st.sampled_from([(), shares])))


offers = st.builds(
    GroupOffer,
    name=st.sampled_from(["auto", "lab"]),
    free_bytes=st.sampled_from([0, 1 << 30]),
    host=st.just("10.0.0.1"),
    port=st.integers(1, (1 << 16) - 1),
    leads=st.booleans(),
    waiting=st.booleans(),
)


links = st.builds(
    Link,
    rtt_s=milliseconds(60),
    bytes_per_s=st.sampled_from([1e6, 12.5e6, float("inf")]),
    jitter_s=milliseconds(9),
    relayed=st.booleans(),
)


@st.composite
def announcements(
    draw: st.DrawFn,
    index: int | None = None,
    layers: int = 12,
    *,
    span: Span | None = None,
    usable: bool = False,
    others: int = 8,
) -> Announcement:
    """One peer's word; with `usable` it serves `MODEL` and has room."""
    number = draw(st.integers(0, others - 1)) if index is None else index
    known = draw(st.lists(st.integers(0, others - 1), max_size=3, unique=True))
    hosts = draw(st.lists(st.integers(1, 3), max_size=2, unique=True))
    return Announcement(
        peer=peer_id(number),
        model=MODEL if usable else draw(st.sampled_from([MODEL, MODEL, OTHER_MODEL])),
        model_name=NAME,
        layers=layers,
        span=span or draw(spans(layers)),
        state="online" if usable else draw(st.sampled_from([*STATES, "online", "online"])),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        device="cpu",
        speed=draw(speeds),
        free_kv_tokens=4096 if usable else draw(st.sampled_from([0, 64, 4096])),
        queue_s=draw(milliseconds(4)),
        addresses=tuple(f"/ip4/10.0.0.{host}/tcp/{4000 + number}" for host in hosts),
        neighbours=tuple((peer_id(other), draw(milliseconds(60))) for other in known),
        group=None if usable else draw(st.none() | groups()),
        software="hexswarm/0.1.0",
        issued_s=draw(st.integers(0, 100)),
        sequence=draw(st.integers(0, 3)),
        rows=draw(st.sampled_from([0.0, 1.0, 3.5])),
        busy=draw(st.sampled_from([0.0, 0.5, 0.9])),
        kv_tokens=4096,
        coordinates=draw(st.none() | coordinates),
        up_bytes_per_s=draw(st.sampled_from([None, 2.5e6, 125e6])),
        down_bytes_per_s=draw(st.sampled_from([None, 12.5e6, 125e6])),
        most_layers=draw(st.sampled_from([0, 1, layers])),
        offer=None if usable else draw(st.none() | offers),
    )


@st.composite
def chains(draw: st.DrawFn, count: int, layers: int) -> list[Span]:
    """At most `count` spans that cover all layers in order, overlapping or not."""
    inner = st.sets(st.integers(1, layers - 1), max_size=min(count, layers) - 1)
    cuts = [0, *sorted(draw(inner)), layers]
    more = st.integers(0, 4)
    return [
        Span(max(0, first - draw(more)), min(layers, end + draw(more)))
        for first, end in itertools.pairwise(cuts)
    ]


@st.composite
def snapshots(
    draw: st.DrawFn, most: int = 7, layers: int = 12, *, usable: bool = False
) -> Snapshot:
    """A swarm of at most `most` peers, some of its links measured by the client.

    Three of four contain a chain that covers all layers (chance alone would give one of eight), and
    unless all are to be `usable`, one peer of eight is anything.
    """
    count = draw(st.integers(1, most))
    chained = draw(chains(count, layers)) if draw(st.integers(0, 3)) else []
    told = []
    for index in range(count):
        span = chained[index] if index < len(chained) else None
        good = usable or draw(st.integers(0, 7)) > 0
        told.append(draw(announcements(index, layers, span=span, usable=good, others=count)))
    ends = [CLIENT, *(peer_id(index) for index in range(count))]
    pairs = [(a, b) for a in ends for b in ends if a < b]
    measured = draw(st.dictionaries(st.sampled_from(pairs), links, max_size=len(pairs)))
    return snapshot(told, measured, now=100.0)


@st.composite
def requests(draw: st.DrawFn, layers: int = 12) -> RouteRequest:
    """A request without limits."""
    return RouteRequest(
        model=MODEL,
        layers=layers,
        hidden_bytes=draw(st.sampled_from([1152, 8192, 65536])),
        prompt_tokens=draw(st.integers(1, 60)),
        new_tokens=draw(st.integers(0, 4)),
        client=draw(st.sampled_from([None, CLIENT])),
    )


samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 100),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 2, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)

model_specs = st.builds(
    ModelSpec,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    name=st.just(NAME),
    architecture=st.sampled_from(["LlamaForCausalLM", "Qwen2ForCausalLM"]),
    layers=st.integers(1, 100),
    hidden=st.integers(1, 8192),
    vocabulary=st.integers(1, 150_000),
    context=st.integers(1, 131_072),
    kv_bytes_per_token_layer=st.integers(1, 65_536),
)
