"""Routes, decisions and traces as text for a terminal; pure functions of records.

Times are milliseconds per token unless a heading says otherwise. All three tables put a stage in a
row and the parts of its time in columns, because L = compute + queue + links is read that way: a
column that stands out is a cause, a row that stands out is a peer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from hexswarm.errors import NoRoute
from hexswarm.records import PeerId, Route, RouteRequest
from hexswarm.router.explain import Budget, Explanation
from hexswarm.trace import HopTrace, Place, Repair, SessionTrace, Shares

PARTS = ("compute", "queue", "link", "serialise")
SIGNIFICANT = 0.05
"""A difference below this share of the time per token has no cause worth naming."""

Rows = Iterable[Sequence[str]]


# --- a route --------------------------------------------------------------------------------


def route_text(budget: Budget) -> str:
    """The ring as a table, and what is predicted of it."""
    lines = [*_table(_HOPS, (_hop_row(hop) for hop in budget.hops)), "", *_promises(budget.route)]
    for number, spare in enumerate(budget.route.spares, 1):
        lines.append(f"spare {number}      {spare}  ({_ms(spare.tpot_s)} ms a token)")
    if budget.route.unmeasured:
        ways = ", ".join(f"{_short(a)}-{_short(b)}" for a, b in budget.route.unmeasured)
        lines.append(f"not measured: {ways}; the times are bounds")
    return "\n".join(lines)


def route_json(budget: Budget) -> dict[str, Any]:
    """The same as plain values."""
    route = budget.route
    return {
        "ttft_s": route.ttft_s,
        "tpot_s": route.tpot_s,
        "ttft_p95_s": route.ttft_p95_s,
        "tpot_p95_s": route.tpot_p95_s,
        "price": route.price,
        "open_s": budget.open_s,
        "client_s": budget.client_s,
        "hops": [{**asdict(hop), "span": [hop.span.first, hop.span.end]} for hop in budget.hops],
        "spares": [stages_json(spare) for spare in route.spares],
        "unmeasured": [list(pair) for pair in route.unmeasured],
    }


def stages_json(route: Route) -> dict[str, Any]:
    """A route without its parts."""
    return {
        "stages": [
            {"peer": stage.peer, "span": [stage.span.first, stage.span.end]}
            for stage in route.stages
        ],
        "ttft_s": route.ttft_s,
        "tpot_s": route.tpot_s,
        "price": route.price,
    }


_HOPS = ("peer", "layers", *PARTS, "sum", "round trip", "known from", "price")


def _hop_row(hop: Any) -> list[str]:
    times = [hop.compute_s, hop.queue_s, hop.link_s, hop.serialise_s]
    return [
        _short(hop.peer),
        str(hop.span),
        *(_ms(time) for time in (*times, sum(times), hop.rtt_s)),
        hop.origin,
        f"{hop.price:.2f}",
    ]


def _promises(route: Route) -> list[str]:
    return [
        f"time per token {_ms(route.tpot_s)} ms median, {_ms(route.tpot_p95_s)} ms p95",
        f"first token    {_ms(route.ttft_s)} ms median, {_ms(route.ttft_p95_s)} ms p95",
        f"price          {route.price:.2f} layers of an idle peer",
    ]


# --- a decision -----------------------------------------------------------------------------


def why_text(explanation: Explanation) -> str:
    """What was asked, what was chosen, what was not, and what decided."""
    lines = [f"asked: {_asked(explanation.request)}", ""]
    if explanation.chosen is not None:
        lines += ["chosen:", *_indented(route_text(explanation.chosen))]
    else:
        lines += ["no route", *_indented("\n".join(_impossible(explanation.error)))]
    if explanation.rejected:
        lines += ["", "not chosen:"]
        for other in explanation.rejected:
            lines += _indented(f"{other.route}  ({_ms(other.route.tpot_s)} ms a token)")
            lines += _indented(f"  {other.why}")
    return "\n".join([*lines, "", f"decided by {explanation.binding}: {explanation.sentence}"])


def why_json(explanation: Explanation) -> dict[str, Any]:
    """The same as plain values."""
    error = explanation.error
    request = explanation.request
    return {
        "request": {
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
            "tpot_s": request.tpot_s,
            "ttft_s": request.ttft_s,
            "percentile": request.percentile,
        },
        "chosen": None if explanation.chosen is None else route_json(explanation.chosen),
        "rejected": [
            {**stages_json(other.route), "why": other.why} for other in explanation.rejected
        ],
        "binding": explanation.binding,
        "sentence": explanation.sentence,
        "error": None if error is None else str(error),
        "missing": [] if error is None else [list(span) for span in error.missing],
        "achievable": {} if error is None else error.achievable,
    }


def _asked(request: RouteRequest) -> str:
    words = [f"{request.prompt_tokens} tokens in, {request.new_tokens} out"]
    for name, limit in (("a token", request.tpot_s), ("to the first token", request.ttft_s)):
        if limit is not None:
            words.append(f"at most {_ms(limit)} ms {name} (p{request.percentile:g})")
    for name in ("allow", "deny", "trusted"):
        peers = getattr(request, name)
        if peers:
            words.append(f"{name} {', '.join(sorted(map(_short, peers)))}")
    if request.dtypes is not None:
        words.append(f"dtype {', '.join(sorted(request.dtypes))}")
    if request.min_bytes_per_s:
        words.append(f"at least {request.min_bytes_per_s / 1e6:g} MB/s")
    return "; ".join(words)


def _impossible(error: NoRoute | None) -> list[str]:
    if error is None:
        return []
    lines = [str(error)]
    if error.missing:
        layers = ", ".join(f"{first}-{end - 1}" for first, end in error.missing)
        lines.append(f"no peer for layers {layers}")
    for name, what in (("tpot_s", "time per token"), ("ttft_s", "time to first token")):
        if name in error.achievable:
            lines.append(f"best achievable {what}: {_ms(error.achievable[name])} ms")
    return lines


# --- a trace --------------------------------------------------------------------------------


def trace_text(trace: SessionTrace) -> str:
    """Predicted against measured for each stage, and on which side of the law the time went."""
    head = ("peer", "layers", *PARTS, "rows")
    rows = [
        [_short(hop.peer), str(hop.span), *_pairs(hop), f"{hop.rows:.1f}" if hop.measured else "?"]
        for hop in trace.hops
    ]
    return "\n".join(
        [
            f"session {trace.session}, {trace.model}: {trace.prompt_tokens} tokens in, "
            f"{trace.new_tokens} out",
            "",
            "ms per token, predicted > measured",
            *_table(head, rows),
            "",
            *_law(trace),
            f"first token {_ms(trace.predicted_ttft_s)} > {_ms(trace.ttft_s)} ms",
            verdict(trace),
            *map(repair_text, trace.repairs),
        ]
    )


def repair_text(repair: Repair) -> str:
    """Who was lost and who took over, in one line."""

    def places(items: Sequence[Place], what: str) -> str:
        named = (f"{_short(p.peer)} (layers {p.span.first}-{p.span.end - 1})" for p in items)
        return f"{what}{'s' if len(items) > 1 else ''} {', '.join(named)}"

    return (
        f"{places(repair.lost, 'peer')}: {repair.why}; {places(repair.by, 'peer')} took over "
        f"after {repair.stall_s:.1f} s"
    )


def trace_json(trace: SessionTrace) -> dict[str, Any]:
    """The record with the sums of the law and the verdict."""
    predicted, measured = sums(trace)
    return {
        **trace.to_json(),
        "predicted": predicted,
        "measured": measured,
        "verdict": verdict(trace),
    }


def sums(trace: SessionTrace) -> tuple[dict[str, float], dict[str, float] | None]:
    """Seconds per token of each part over the whole ring; None if not all stages told."""
    predicted = _sum(hop.predicted for hop in trace.hops)
    if not trace.complete:
        return predicted, None
    return predicted, _sum(hop.measured for hop in trace.hops if hop.measured)


def verdict(trace: SessionTrace) -> str:
    """One sentence: was the prediction kept, and if not, which part and whose."""
    if trace.tpot_s is None:
        return "the answer was too short, or taken too slowly, to tell the ring's time per token"
    _, measured = sums(trace)
    late_s = trace.tpot_s - trace.predicted_tpot_s
    change = f"{_ms(trace.tpot_s)} ms a token, {_ms(trace.predicted_tpot_s)} predicted"
    if abs(late_s) <= SIGNIFICANT * trace.tpot_s:
        return f"as predicted: {change}"
    how = "slower" if late_s > 0 else "faster"
    if measured is None:
        silent = [_short(hop.peer) for hop in trace.hops if hop.measured is None]
        return f"{how} than predicted: {change}; {', '.join(silent)} did not tell"
    sign = math.copysign(1.0, late_s)
    causes = [*_causes(trace), (trace.rest_s or 0.0, "the rest, which no stage accounts for")]
    most_s, what = max(causes, key=lambda cause: sign * cause[0])
    return f"{how} than predicted: {change}; {most_s * 1e3:+.1f} ms of it in {what}"


def _causes(trace: SessionTrace) -> list[tuple[float, str]]:
    causes = []
    for hop in trace.hops:
        assert hop.measured is not None
        for part in PARTS:
            was_s, is_s = _part(hop.predicted, part), _part(hop.measured, part)
            if was_s is not None and is_s is not None:
                name = "the link onward" if part == "link" else f"the {part}"
                causes.append((is_s - was_s, f"{name} of {_short(hop.peer)}"))
    return causes


def _law(trace: SessionTrace) -> list[str]:
    predicted, measured = sums(trace)
    lines = [f"predicted  L = {_equation(predicted)} = {_ms(trace.predicted_tpot_s)} ms"]
    if trace.tpot_s is None:
        return lines
    if measured is None or trace.rest_s is None:
        return [*lines, f"measured   L = {_ms(trace.tpot_s)} ms"]
    rest = f" {'+' if trace.rest_s >= 0 else '-'} {_ms(abs(trace.rest_s))} rest"
    return [*lines, f"measured   L = {_equation(measured)}{rest} = {_ms(trace.tpot_s)} ms"]


def _equation(parts: dict[str, float]) -> str:
    return " + ".join(f"{_ms(parts[f'{name}_s'])} {name}" for name in PARTS)


def _sum(shares: Iterable[Shares]) -> dict[str, float]:
    listed = list(shares)
    return {f"{part}_s": sum(_part(item, part) or 0.0 for item in listed) for part in PARTS}


def _pairs(hop: HopTrace) -> list[str]:
    pairs = []
    for part in PARTS:
        was_s = _part(hop.predicted, part)
        is_s = None if hop.measured is None else _part(hop.measured, part)
        pairs.append(f"{_ms(was_s)} > {_ms(is_s)}")
    return pairs


def _part(shares: Shares, part: str) -> float | None:
    value: float | None = getattr(shares, f"{part}_s")
    return value


# --- tables ---------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Rows) -> list[str]:
    """Columns as wide as they need, texts to the left, numbers to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {0, *(index for index, name in enumerate(head) if name == "known from")}
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _indented(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _ms(time_s: float | None) -> str:
    """Milliseconds with as many digits as one can use."""
    if time_s is None:
        return "?"
    return f"{time_s * 1e3:.2f}" if abs(time_s) < 0.01 else f"{time_s * 1e3:.1f}"


def _short(peer: PeerId) -> str:
    return peer[-8:]
