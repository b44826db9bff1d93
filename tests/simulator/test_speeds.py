"""What batches take, and what is announced of that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.peer.steps import Row
from hexswarm.records import Span
from hexswarm.simulator import speeds
from tests.simulator.small import LAYERS, MODEL, READ_S, ROW_S, TOKEN_S, profile

HELD = Span(2, 6)


def row(*, decode: bool, tokens: int = 1, span: Span | None = None) -> Row:
    position = 50 if decode else 0
    return Row(b"", position, 1 if decode else tokens, None, True, (), span=span)


def test_a_batch_pays_for_prompts_and_for_rows() -> None:
    seconds = speeds.BatchTime(profile(), HELD)
    rows = [row(decode=True), row(decode=True), row(decode=False, tokens=100)]
    assert seconds(rows[:2]) == pytest.approx(4 * (READ_S + 2 * ROW_S))
    assert seconds(rows[2:]) == pytest.approx(4 * 100 * TOKEN_S)
    assert seconds(rows) == pytest.approx(seconds(rows[:2]) + seconds(rows[2:]))


def test_the_head_is_read_once_by_those_who_sample_at_the_end() -> None:
    plain, headed = profile(), replace(profile(), head_s=0.5)
    seconds = speeds.BatchTime(headed, HELD)
    without = speeds.BatchTime(plain, HELD)
    unfinished = replace(row(decode=False, tokens=100), sample=False)
    elsewhere = row(decode=True, span=Span(2, 5))
    for rows, heads in (
        ([row(decode=True), row(decode=True)], 1),
        ([row(decode=True, span=Span(4, 6))], 1),
        ([unfinished, elsewhere], 0),
        ([unfinished, row(decode=True)], 1),
    ):
        assert seconds(rows) == pytest.approx(without(rows) + heads * 0.5)
    assert speeds.speed(headed).head_s == 0.5


def test_who_enters_late_pays_for_the_layers_that_it_passes() -> None:
    seconds = speeds.BatchTime(profile(), HELD)
    late = row(decode=True, span=Span(5, 6))
    assert seconds([late]) == pytest.approx(READ_S + ROW_S)
    both = seconds([row(decode=True), late])
    assert both == pytest.approx(3 * (READ_S + ROW_S) + READ_S + 2 * ROW_S)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(1, 300), st.integers(2, 5), st.integers(1, 4)),
        min_size=1,
        max_size=8,
    )
)
def test_any_batch_takes_the_sum_over_its_layers(
    drawn: list[tuple[bool, int, int, int]],
) -> None:
    rows = []
    for decode, tokens, first, count in drawn:
        span = Span(first, min(first + count, HELD.end))
        rows.append(row(decode=decode, tokens=tokens + 1, span=None if span == HELD else span))
    shape, total_s = profile(), 0.0
    for layer in range(HELD.first, HELD.end):
        here = [item for item in rows if layer in (item.span or HELD)]
        decodes = sum(item.decode for item in here)
        tokens = sum(item.count for item in here if not item.decode)
        total_s += shape.decode_layer_s(decodes) if decodes else 0.0
        total_s += shape.prefill_layer_s(tokens) if tokens else 0.0
    assert speeds.BatchTime(shape, HELD)(rows) == pytest.approx(total_s)


def test_a_peer_announces_what_it_would_measure() -> None:
    told = speeds.speed(profile())
    assert told.decode_layer_s == pytest.approx(READ_S + ROW_S)
    assert told.row_layer_s == pytest.approx(ROW_S)
    assert told.prefill_layer_s == pytest.approx(TOKEN_S)
    assert told.head_s == 0


def test_pieces_are_cut_as_peers_cut_them() -> None:
    """The piece of an accelerator is as long as its fixed cost wants, up to 2 MiB."""
    head = speeds.scheduling(profile(), MODEL, Span(0, 4))
    tail = speeds.scheduling(profile(), MODEL, Span(6, 8))
    assert (head.head, tail.head) == (True, False)
    assert (head.stages, tail.stages) == (LAYERS // 4, LAYERS // 2)
    assert head.gather_rows == 32
    assert head.efficient_tokens == 16  # nothing fixed: the least
    assert head.chunk_tokens == (256 << 10) // 1000 // 16 * 16
