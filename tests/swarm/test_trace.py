"""Traces: what they add up to, and how they are kept."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexswarm.errors import UsageError
from hexswarm.messages import Traced
from hexswarm.records import PeerId, Span
from hexswarm.trace import (
    KEEP,
    HopTrace,
    Place,
    Repair,
    SessionTrace,
    Shares,
    from_json,
    load,
    save,
)

A, B = PeerId("12D3KooWBmAwcd4PJNJvfV89HwE48nwkRmAgo8Vy3uQAAAAAAAA"), PeerId("peer-BBBBBBBB")


def trace(name: str = "0123abcd", **changes: Any) -> SessionTrace:
    """Two stages, predicted 2 x (10 + 1 + 4 + 0.5) ms, taken 33 ms."""
    predicted = Shares(0.010, 0.001, 0.004, 0.0005)
    hops = tuple(
        HopTrace(peer, Span(3 * i, 3 * i + 3), "measured", predicted)
        for i, peer in enumerate((A, B))
    )
    made = SessionTrace(
        session=name, model="M", when_s=1.7e9, prompt_tokens=8, new_tokens=20,
        predicted_ttft_s=0.1, predicted_tpot_s=0.031, predicted_tpot_p95_s=0.04, ttft_s=0.12,
        tpot_s=0.033, hops=hops,
    )  # fmt: skip
    return replace(made, **changes)


def traced(**changes: Any) -> Traced:
    told = Traced(
        session=bytes(16), epoch=0, steps=10, wait_s=0.01, compute_s=0.11, handle_s=0.005,
        prompt_wait_s=0.0, prompt_compute_s=0.1, rows=1.5, successor_rtt_s=0.008,
    )  # fmt: skip
    return replace(told, **changes)


def test_measured_shares_are_means_over_the_steps() -> None:
    told = trace().with_measured({A: traced(), B: traced(compute_s=0.12)})
    assert told.complete
    assert told.hops[0].measured == Shares(
        pytest.approx(0.011), pytest.approx(0.001), 0.004, pytest.approx(0.0005)
    )
    assert told.hops[1].rows == 1.5
    assert told.rest_s == pytest.approx(0.033 - 0.0165 - 0.0175)


def test_a_stage_that_does_not_tell_leaves_a_gap() -> None:
    for told in ({A: traced()}, {A: traced(), B: traced(steps=0)}):
        made = trace().with_measured(told)
        assert not made.complete
        assert made.rest_s is None
        assert made.hops[1].measured is None
    unknown = trace().with_measured({A: traced(), B: traced(successor_rtt_s=-1.0)})
    assert unknown.hops[1].measured is not None
    assert unknown.hops[1].measured.link_s is None
    assert trace(tpot_s=None).with_measured({A: traced(), B: traced()}).rest_s is None


amounts = st.floats(0, 10)
shares = st.builds(Shares, amounts, amounts, st.none() | amounts, amounts)


@given(shares, st.none() | shares, st.none() | amounts, amounts)
def test_a_trace_survives_json(
    predicted: Shares, measured: Shares | None, tpot_s: float | None, rows: float
) -> None:
    hops = (HopTrace(A, Span(0, 3), "announced", predicted, measured, rows),)
    made = trace(tpot_s=tpot_s, hops=hops)
    assert from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_trace_is_kept_for_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "traces"
    made = trace().with_measured({A: traced()})
    path = save(folder, made)
    assert path == folder / "0123abcd.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o077 == 0
    assert load(folder, "0123abcd") == load(folder, "01") == load(folder, "last") == made
    assert [item.name for item in folder.iterdir()] == ["0123abcd.json"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for number in range(KEEP + 5):
        path = save(tmp_path, trace(f"{number:08x}"))
        os.utime(path, (number, number))
    last = save(tmp_path, trace("ffffffff"))
    os.utime(last, (1e6, 1e6))
    names = sorted(path.stem for path in tmp_path.glob("*.json"))
    assert names == [*(f"{number:08x}" for number in range(6, KEEP + 5)), "ffffffff"]
    assert load(tmp_path, "last").session == "ffffffff"


@pytest.mark.parametrize("name", ["", "../secret", "LAST", "0g", "last ", "*"])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    save(tmp_path, trace())
    with pytest.raises(UsageError, match="names no session"):
        load(tmp_path, name)


def test_a_session_that_left_no_trace(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trace of session last"):
        load(tmp_path / "nowhere", "last")
    save(tmp_path, trace())
    with pytest.raises(UsageError, match="no trace of session 99"):
        load(tmp_path, "99")


def test_a_name_that_fits_several(tmp_path: Path) -> None:
    for name in ("01234567", "01239999"):
        save(tmp_path, trace(name))
    with pytest.raises(UsageError, match=r"2 sessions begin with 0123: 0123\d{4}, 0123\d{4}"):
        load(tmp_path, "0123")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"version": 2}', '{"version": 1}', "{"])
def test_a_damaged_trace(tmp_path: Path, text: str) -> None:
    (tmp_path / "0123abcd.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path, "last")


def test_repairs_are_kept_and_older_traces_have_none(tmp_path: Path) -> None:
    by = (Place(B, Span(0, 2)), Place(PeerId("c"), Span(2, 3)))
    repair = Repair((Place(A, Span(0, 3)),), by, 17, 1.4, "vanished")
    made = trace(repairs=(repair,))
    save(tmp_path, made)
    assert load(tmp_path, "last") == made
    document = trace().to_json()
    del document["repairs"]
    assert from_json(document) == trace()
