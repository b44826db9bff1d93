"""The table of `hexswarm status`: one row a peer, load included, columns that line up."""

from __future__ import annotations

from dataclasses import replace

from hexswarm.picture import WIDTH, swarm_table
from hexswarm.records import Announcement, ModelSpec, PeerId, Span, Speed
from hexswarm.router.network import snapshot

SPEC = ModelSpec("d" * 64, "tiny", "llama", 6, 64, 200, 4096, 64)


def peer(name: str, span: Span) -> Announcement:
    return Announcement(
        peer=PeerId(f"12D3KooW{name:x<44}"),
        model=SPEC.digest,
        model_name=SPEC.name,
        layers=SPEC.layers,
        span=span,
        state="online",
        dtype="float32",
        device="cpu",
        speed=Speed(0.002, 0.001, 0.0),
        free_kv_tokens=512,
        queue_s=0.0125,
        addresses=(),
        busy=0.426,
    )


def test_a_row_says_how_fast_and_how_busy_a_peer_is() -> None:
    half, rest = peer("a", Span(0, 3)), peer("b", Span(3, 6))
    view = snapshot([half, replace(rest, state="draining")], {}, 0.0)
    _, _, head, *rows = swarm_table(SPEC, view, ()).splitlines()
    for title, text in (("ms/token", "6.0"), ("queue ms", "12.5"), ("busy", "43%"),
                        ("free KV", "512")):  # fmt: skip
        end = head.index(title) + len(title)
        assert [row[:end].split()[-1] for row in rows[:2]] == [text, text]
    start = head.index("0  ")
    bars = [row[start:] for row in rows[:2]]
    assert bars == [
        "█" * (WIDTH // 2) + "·" * (WIDTH // 2),
        "·" * (WIDTH // 2) + "█" * (WIDTH // 2),
    ]
    assert len(rows[2]) == start + WIDTH
    assert set(rows[2][:start]) == {" "}


def test_layers_that_nobody_serves_are_named() -> None:
    view = snapshot([peer("a", Span(0, 3))], {}, 0.0)
    text = swarm_table(SPEC, view, (Span(3, 6),))
    assert text.endswith("no peer serves layers 3-5: the model cannot answer")
