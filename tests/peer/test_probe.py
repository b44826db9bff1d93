"""The self-test at start: what it runs is legal, what it finds is finite, and it is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hexswarm.errors import UnsupportedModel
from hexswarm.peer import probe
from hexswarm.peer.probe import (
    MOST_EFFICIENT,
    SHORT_TOKENS,
    Measured,
    _efficient_tokens,
    again,
    cached,
    measure,
    rehearse,
)
from hexswarm.peer.steps import Activations, Batch, Result
from hexswarm.records import Span, Speed

FOUND = Measured(Speed(0.001, 0.0001, 0.01, 0.0002), 77)


SPANS = [Span(0, 2), Span(2, 4), Span(4, 6), Span(0, 6)]


def checked(span: Span, seen: list[Batch]) -> Callable[[Batch], list[Result]]:
    """A runner of 6 layers and 8 dimensions that notes batches and takes none that it may not."""

    def run(batch: Batch) -> list[Result]:
        for row in batch.rows:
            assert row.position + row.count <= 16 * len(row.blocks)
            if span.first == 0:
                assert len(row.payload) == row.count
            else:
                assert isinstance(row.payload, Activations)
                assert len(row.payload.data) == row.count * 8 * 4
            assert row.sample <= (span.end == 6), "only a tail samples"
            assert (row.policy is not None) == (span.end == 6)
        assert len({row.session for row in batch.rows}) == len(batch.rows)
        assert len({row.position for row in batch.rows}) == len(batch.rows)
        seen.append(batch)
        return [Result(row) for row in batch.rows]

    return run


@pytest.mark.parametrize("span", SPANS)
def test_it_runs_legal_rows_only(span: Span) -> None:
    seen: list[Batch] = []
    found = measure(checked(span, seen), span, layers=6, hidden=8, dtype="float32")
    assert len({tuple(row.count for row in batch.rows) for batch in seen}) == 4
    assert found.speed.decode_layer_s >= 0
    assert (found.speed.head_s == 0) or span.end == 6
    assert SHORT_TOKENS <= found.efficient_tokens <= MOST_EFFICIENT


@pytest.mark.parametrize("span", SPANS)
def test_the_rehearsal_has_all_kinds_of_pieces(span: Span) -> None:
    seen: list[Batch] = []
    rehearse(checked(span, seen), span, layers=6, hidden=8, dtype="float32")
    rows = [batch.rows for batch in seen]
    assert any(len(r) == 1 and r[0].position == 0 and r[0].count > 64 for r in rows), "a prompt"
    assert any(len(r) == 1 and r[0].position and r[0].count > 16 for r in rows), "a later piece"
    assert any(r[0].position and 1 < r[0].count < 16 for r in rows), "the rest of one"
    assert any(len(r) > 1 and all(row.count > 1 for row in r) for r in rows), "several at once"
    assert any({row.count == 1 for row in r} == {True, False} for r in rows), "beside a decode"
    policies = [row.policy for r in rows for row in r if row.policy]
    drawn = any(policy.sampling.temperature > 0 for policy in policies)
    assert drawn == (span.end == 6), "a token that is drawn"


@pytest.mark.parametrize("act", [measure, rehearse])
def test_a_row_that_is_refused_is_no_fast_one(act: Callable[..., object]) -> None:
    def run(batch: Batch) -> list[Result]:
        return [Result(row, error="a block is outside 0..3") for row in batch.rows]

    with pytest.raises(UnsupportedModel, match="a block is outside"):
        act(run, Span(0, 2), layers=6, hidden=8, dtype="float32")


def test_a_row_more_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose batches take 8 ms and 1 ms a token more, on a clock of its own."""
    now = [0.0]

    def run(batch: Batch) -> list[Result]:
        now[0] += 0.008 + 0.001 * batch.tokens
        return []

    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    speed = measure(run, Span(0, 2), layers=6, hidden=8, dtype="float32").speed
    assert speed.decode_layer_s == pytest.approx(0.0045)
    assert speed.row_layer_s == pytest.approx(0.0005)


def test_efficient_tokens_are_fixed_cost_over_cost_per_token() -> None:
    assert _efficient_tokens(0.016 + 0.100, 0.128 + 0.100) == 100
    assert _efficient_tokens(0.016, 0.128) == SHORT_TOKENS, "no fixed cost"
    assert _efficient_tokens(0.1, 0.1) == MOST_EFFICIENT, "tokens for nothing"
    assert _efficient_tokens(0.2, 0.1) == MOST_EFFICIENT, "noise"


def test_a_measurement_is_kept_for_what_it_was_made_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "speed.json"
    calls = []

    def probe() -> Measured:
        calls.append(1)
        return FOUND

    assert cached(path, ("a", 1), probe) == FOUND
    assert cached(path, ("a", 1), probe) == FOUND
    assert len(calls) == 1
    cached(path, ("b", 1), probe)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "speed.json"
    path.write_text(damage)
    assert cached(path, ("a",), lambda: FOUND) == FOUND


def test_figures_of_an_older_version_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    cached(path, ("a",), lambda: FOUND)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: [0.5, 0.5, 0.5, 33]}))
    assert cached(path, ("a",), lambda: FOUND) == FOUND


@pytest.mark.parametrize("span", [Span(0, 4), Span(4, 8), Span(8, 12)])
def test_a_step_at_rest_is_one_legal_row(span: Span) -> None:
    seen: list[Batch] = []

    def run(batch: Batch) -> list[Result]:
        seen.append(batch)
        return [Result(row) for row in batch.rows]

    assert again(run, span, 12, 8, "float32") >= 0
    ((row,),) = [batch.rows for batch in seen]
    assert row.count == 1
    assert not row.sample
    assert isinstance(row.payload, list) == (span.first == 0)
