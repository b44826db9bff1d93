"""Which peers a request may use, and if they are too few, exactly why.

The conditions are applied in order of blame: what the swarm lacks, what is about to change (peers
that join or drain), what the request itself excludes, what is occupied. The first condition that
leaves layers uncovered is the reason that the person gets, with the layers and a remedy; once
the usable peers cover all layers there is a route, because a stage may be cut to fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hexswarm.errors import NoRoute, UsageError
from hexswarm.records import Announcement, RouteRequest, Span, uncovered
from hexswarm.router.network import Snapshot


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
    if request.percentile != 50.0:
        raise UsageError(
            f"limits at percentile {request.percentile:g} cannot be promised",
            remedy="only medians are predicted: use percentile 50",
        )


def usable(snapshot: Snapshot, request: RouteRequest) -> list[Announcement]:
    """The peers that this request may use; NoRoute if they do not cover all layers."""
    left = [item for item in snapshot.of_model(request.model) if item.layers == request.layers]
    if not left:
        raise _unknown(snapshot, request)
    name, tokens = left[0].model_name, request.kv_tokens
    for rule in _rules(request):
        before, left = left, [item for item in left if rule.keep(item)]
        missing = uncovered((item.span for item in left), request.layers)
        if missing:
            held = [item for item in before if any(_overlap(item.span, hole) for hole in missing)]
            raise NoRoute(
                rule.why(_layers(missing), name, held),
                missing=tuple((hole.first, hole.end) for hole in missing),
                remedy=rule.remedy.format(span=missing[0], tokens=tokens),
            )
    return left


@dataclass(frozen=True, slots=True)
class _Rule:
    """A condition on peers, and what to say when too few meet it."""

    keep: Callable[[Announcement], bool]
    why: Callable[[str, str, Sequence[Announcement]], str]
    """From the missing layers, the model's name and the peers that held some before."""
    remedy: str


def _rules(request: RouteRequest) -> Iterable[_Rule]:
    """In order of blame: what the swarm lacks, what the request forbids, what is occupied."""
    yield _Rule(
        lambda item: True,
        lambda layers, name, held: f"no peer serves {layers} of {name}",
        "start one with `hexswarm peer --span {span}`",
    )
    yield _Rule(
        lambda item: item.serving,
        lambda layers, name, held: (
            f"the only peers that hold {layers} of {name} are {_states(held)}"
        ),
        "wait for them or start another with `hexswarm peer --span {span}`",
    )
    yield _Rule(
        lambda item: (
            item.peer not in request.deny and (request.allow is None or item.peer in request.allow)
        ),
        lambda layers, name, held: (
            f"the request excludes every peer that serves {layers} of {name}"
        ),
        "deny fewer peers or allow more",
    )
    yield _Rule(
        lambda item: item.free_kv_tokens >= request.kv_tokens,
        lambda layers, name, held: (
            f"the peers that serve {layers} of {name} are full: they have room for at most "
            f"{max(item.free_kv_tokens for item in held)} tokens"
        ),
        "the request needs {tokens}: ask again later, or for fewer",
    )


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
    return " or ".join(
        sorted({item.state if item.state != "online" else "not leading" for item in held})
    )
