"""Which peers a request may use, and if they are too few, exactly why.

The conditions stand in order of blame: what the swarm lacks, what is about to change (peers that
join or drain), what the request itself excludes, what is occupied. The first condition that leaves
layers uncovered is the reason that the person gets, with the layers and a remedy; once the usable
peers cover all layers there is a route, because a stage may be cut to fit.

Each condition is one comparison of columns, 20 us for 10,000 peers; words are made only if it comes
to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexswarm.errors import NoRoute, UsageError
from hexswarm.records import Announcement, PeerId, RouteRequest, Span, uncovered
from hexswarm.router.columns import Columns
from hexswarm.router.network import Snapshot

Flags = NDArray[np.bool_]


def check(request: RouteRequest) -> None:
    """Raise UsageError for a request that no swarm could answer."""
    if min(request.layers, request.hidden_bytes) < 1:
        raise UsageError("a request is for at least one layer and one byte of activations")
    if request.prompt_tokens < 1 or request.new_tokens < 0:
        raise UsageError(
            f"{request.prompt_tokens} prompt tokens and {request.new_tokens} new ones",
            remedy="a prompt has at least one token, an answer none or more",
        )
    for name, limit in (("ttft_s", request.ttft_s), ("tpot_s", request.tpot_s)):
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"the limit {name} = {limit} is not a positive number of seconds")
    if not (math.isfinite(request.spread) and 0 <= request.spread <= 1):
        raise UsageError(f"a spread of {request.spread} is outside 0-1")
    if not (math.isfinite(request.min_bytes_per_s) and request.min_bytes_per_s >= 0):
        raise UsageError(f"a bandwidth of {request.min_bytes_per_s} bytes/s cannot be asked for")


def usable(
    snapshot: Snapshot,
    request: RouteRequest,
    hole: Span | None = None,
    lost: frozenset[PeerId] = frozenset(),
) -> NDArray[np.intp]:
    """Rows of the peers that this request may use; NoRoute if they do not cover all layers.

    With a `hole` only its layers have to be covered, and only peers that hold some of it count.
    Those that are `lost` are not there, whatever they announced.
    """
    columns = snapshot.columns(request.model)
    wanted = hole or Span(0, request.layers)
    held = columns.layers == request.layers
    held &= (columns.first < wanted.end) & (columns.end > wanted.first)
    if not held.any():
        raise _unknown(snapshot, request)
    name = columns.announcements[int(np.flatnonzero(held)[0])].model_name
    held &= ~_named(columns, lost)
    rules = list(_rules(request))
    keep = held.copy()
    for rule in rules:
        keep &= rule.keep(columns)
    rows = np.flatnonzero(keep)
    if _missing(columns, rows, wanted):
        raise _blame(columns, request, held, rules, wanted, name)
    return rows


def _missing(columns: Columns, rows: NDArray[np.intp], wanted: Span) -> list[Span]:
    """The runs of wanted layers that none of these peers holds."""
    layers = wanted.end
    steps = np.bincount(columns.first[rows], minlength=layers + 1)[: layers + 1].astype(np.int64)
    steps -= np.bincount(np.minimum(columns.end[rows], layers), minlength=layers + 1)[: layers + 1]
    holders = np.cumsum(steps)[wanted.first : layers]
    if holders.all():
        return []
    spans = [Span(int(columns.first[row]), int(columns.end[row])) for row in rows]
    return [
        Span(max(hole.first, wanted.first), hole.end)
        for hole in uncovered(spans, layers)
        if hole.end > wanted.first
    ]


@dataclass(frozen=True, slots=True)
class _Rule:
    """A condition on peers, and what to say when too few meet it."""

    binding: str
    keep: Callable[[Columns], Flags]
    why: Callable[[str, str, Sequence[Announcement]], str]
    """From the missing layers, the model's name and the peers that held some before."""
    remedy: str


def _named(columns: Columns, peers: frozenset[PeerId]) -> Flags:
    """Which rows are of these peers."""
    flags = np.zeros(len(columns.peers), dtype=np.bool_)
    flags[[columns.index[peer] for peer in peers if peer in columns.index]] = True
    return flags


def _rules(request: RouteRequest) -> Iterator[_Rule]:
    """In order of blame: what the swarm lacks, what the request forbids, what is occupied."""
    yield _Rule(
        "coverage",
        lambda columns: np.ones(len(columns.peers), dtype=np.bool_),
        lambda layers, name, held: f"no peer serves {layers} of {name}",
        "start one with `hexswarm peer --span {span}`",
    )
    yield _Rule(
        "state",
        lambda columns: columns.serving,
        lambda layers, name, held: (
            f"the only peers that hold {layers} of {name} are {_states(held)}"
        ),
        "wait for them or start another with `hexswarm peer --span {span}`",
    )
    if request.trusted is not None:
        trusted = request.trusted
        yield _Rule(
            "trust",
            lambda columns: _named(columns, trusted),
            lambda layers, name, held: f"no trusted peer serves {layers} of {name}",
            "trust more peers, or start one of your own with `hexswarm peer --span {span}`",
        )
    if request.deny or request.allow is not None:
        allow, deny = request.allow, request.deny
        yield _Rule(
            "peers",
            lambda columns: (
                ~_named(columns, deny) & (True if allow is None else _named(columns, allow))
            ),
            lambda layers, name, held: (
                f"the request excludes every peer that serves {layers} of {name}"
            ),
            "deny fewer peers or allow more",
        )
    if request.dtypes is None:
        yield _Rule(
            "dtype",
            lambda columns: ~columns.rounded,
            lambda layers, name, held: (
                f"the peers that serve {layers} of {name} have rounded its weights "
                f"({', '.join(sorted({item.dtype for item in held}))})"
            ),
            "ask for such peers with --dtype",
        )
    else:
        dtypes = request.dtypes
        yield _Rule(
            "dtype",
            lambda columns: np.array([item.dtype in dtypes for item in columns.announcements]),
            lambda layers, name, held: (
                f"the peers that serve {layers} of {name} have weights in "
                f"{', '.join(sorted({item.dtype for item in held}))}, not in "
                f"{' or '.join(sorted(dtypes))}"
            ),
            "allow more element types",
        )
    if request.min_bytes_per_s > 0:
        most = 1 / request.min_bytes_per_s
        yield _Rule(
            "bandwidth",
            lambda columns: (
                ((columns.up_s_per_byte > 0) & (columns.up_s_per_byte <= most))
                & ((columns.down_s_per_byte > 0) & (columns.down_s_per_byte <= most))
            ),
            lambda layers, name, held: (
                f"no peer that serves {layers} of {name} is known to send and receive "
                f"{request.min_bytes_per_s:g} bytes/s"
            ),
            "ask for less bandwidth, or wait until it is measured",
        )
    yield _Rule(
        "kv",
        lambda columns: columns.free_kv_tokens >= request.kv_tokens,
        lambda layers, name, held: (
            f"the peers that serve {layers} of {name} are full: they have room for at most "
            f"{max(item.free_kv_tokens for item in held)} tokens"
        ),
        "the request needs {tokens}: ask again later, or for fewer",
    )


def _blame(
    columns: Columns,
    request: RouteRequest,
    left: Flags,
    rules: Sequence[_Rule],
    wanted: Span,
    name: str,
) -> NoRoute:
    """The first rule that leaves layers uncovered."""
    for rule in rules:
        before, left = left, left & rule.keep(columns)
        missing = _missing(columns, np.flatnonzero(left), wanted)
        if missing:
            items = [columns.announcements[row] for row in np.flatnonzero(before)]
            held = [item for item in items if any(_overlap(item.span, hole) for hole in missing)]
            return NoRoute(
                rule.why(_layers(missing), name, held),
                missing=tuple((hole.first, hole.end) for hole in missing),
                remedy=rule.remedy.format(span=missing[0], tokens=request.kv_tokens),
                binding=rule.binding,
            )
    raise AssertionError("the rules together leave layers uncovered, so one of them does")


def _unknown(snapshot: Snapshot, request: RouteRequest) -> NoRoute:
    served = sorted({item.model_name for item in snapshot.announcements if item.serving})
    remedy = f"served here: {', '.join(served[:8])}" if served else "no peer serves anything here"
    name = request.model_name or "the model"
    return NoRoute(
        f"no peer serves {name} (weights {request.model[:12]}, {request.layers} layers)",
        missing=((0, request.layers),),
        remedy=remedy,
    )


def _overlap(a: Span, b: Span) -> bool:
    return a.first < b.end and b.first < a.end


def _layers(spans: Sequence[Span]) -> str:
    """Spans for a reader, who counts the last layer in: "layers 3, 12-20"."""
    runs = [f"{span.first}-{span.end - 1}" if len(span) > 1 else str(span.first) for span in spans]
    many = len(runs) > 1 or len(spans[0]) > 1
    return f"{'layers' if many else 'layer'} {', '.join(runs)}"


def _states(held: Sequence[Announcement]) -> str:
    """Why peers that hold layers do not serve: their states, or another member leads."""
    return " or ".join(sorted({_state(item) for item in held}))


def _state(item: Announcement) -> str:
    if item.offer is not None and item.offer.waiting:
        return "waiting for a group"
    return item.state if item.state != "online" else "not leading"
