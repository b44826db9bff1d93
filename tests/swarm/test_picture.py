"""The table of `hexswarm status`: one row a peer, load included, columns that line up."""

from __future__ import annotations

from dataclasses import replace

from hexswarm.groups import group_json, groups
from hexswarm.picture import WIDTH, swarm_table
from hexswarm.records import (
    Announcement,
    GroupMembership,
    GroupOffer,
    ModelSpec,
    PeerId,
    Span,
    Speed,
)
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


def group(view: list[Announcement]) -> list[str]:
    return swarm_table(SPEC, snapshot(view, {}, 0.0), ()).splitlines()


def test_a_group_is_one_line_and_counts_once() -> None:
    """A member's bar is stippled and its layers are its leader's."""
    told = GroupMembership("3f2a90c1d2e3f405", 0, 2, 4, (667, 333))
    leader = replace(peer("a", Span(0, 6)), group=told)
    member = replace(peer("b", Span(0, 6)), group=replace(told, rank=1))
    lines = group([member, leader])
    assert (
        "group 3f2a epoch 4: 2 members, cut 667:333, leader xxxxxxxx, layers 0:6, serving" in lines
    )
    rows = [line for line in lines if line.startswith("xxxxxxxx")]
    assert [("member" in row, "▒" in row) for row in rows] == [(False, False), (True, True)]
    assert lines[5].endswith("1" * WIDTH)


def test_a_group_that_is_not_whole_says_so() -> None:
    told = GroupMembership("3f2a", 0, 3, 4)
    leader = replace(peer("a", Span(0, 6)), group=told, state="joining")
    stale = replace(peer("b", Span(0, 6)), group=replace(told, rank=1, epoch=3))
    assert (
        "group 3f2a epoch 4: 3 members, 2 not announced, cut not told, leader xxxxxxxx, "
        "layers 0:6, not serving" in group([leader, stale])
    )


def test_who_waits_for_a_group_is_told_apart() -> None:
    offer = GroupOffer("lab", 1 << 30, "10.0.0.1", 4711, waiting=True)
    lines = group([replace(peer("a", Span(0, 6)), state="joining", offer=offer)])
    assert "waiting" in lines[3]
    assert "█" not in lines[3]
    assert lines[4].endswith("0" * WIDTH)


def test_a_group_takes_no_strangers_word() -> None:
    """Who claims a rank with another size, cut or span is not counted, nor the second of a rank."""
    told = GroupMembership("3f2a", 0, 2, 4, (500, 500))
    leader = replace(peer("a", Span(0, 6)), group=told)
    liars = [
        replace(peer("b", Span(0, 6)), group=GroupMembership("3f2a", 1, 3, 4)),
        replace(peer("c", Span(0, 3)), group=replace(told, rank=1)),
        replace(peer("d", Span(0, 6)), group=replace(told, rank=1, shares=(999, 1))),
    ]
    (found,) = groups([leader, *liars])
    assert (found.members, found.missing) == ((leader.peer,), 1)
    honest = [replace(peer(name, Span(0, 6)), group=replace(told, rank=1)) for name in "ef"]
    (found,) = groups([*honest, leader])
    assert found.members == (leader.peer, honest[0].peer)
    assert group_json(found) == {
        "group": "3f2a", "epoch": 4, "size": 2, "shares": [500, 500], "span": [0, 6],
        "leader": leader.peer, "members": [leader.peer, honest[0].peer], "serving": True,
    }  # fmt: skip


def test_layers_that_nobody_serves_are_named() -> None:
    view = snapshot([peer("a", Span(0, 3))], {}, 0.0)
    text = swarm_table(SPEC, view, (Span(3, 6),))
    assert text.endswith("no peer serves layers 3-5: the model cannot answer")
