"""Cuts: every head, column and word has one place, and weights follow the members' shares."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hexswarm.architecture import span_shapes
from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.cuts import (
    Cut,
    Member,
    Sizes,
    attention_runs,
    cut_by_heads,
    member_shares,
    plan_cut,
    whole,
)
from hexswarm.peer.shares import apportion, in_order
from hexswarm.peer.slices import part_slices, read_sizes
from hexswarm.records import Span

SMOL = Sizes(576, 9, 3, 64, 1536, 49_152, 30, word_matrices=1)
LLAMA_70B = Sizes(8192, 64, 8, 128, 28_672, 128_256, 16, weight_bytes=2)
QWEN_MOE = Sizes(2048, 32, 4, 128, 6144, 151_936, 0, 48, 128, 768, 2, 2)
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 80,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 90,
    "max_position_embeddings": 64, "attention_bias": True, "mlp_bias": True,
}  # fmt: skip
MOE = {
    **{key: value for key, value in CONFIG.items() if key != "mlp_bias"},
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}

speeds = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0])


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    kv = draw(st.integers(1, 6))
    mixed = draw(st.integers(0, 3))
    return Sizes(
        hidden=draw(st.integers(1, 64)),
        heads=kv * draw(st.integers(1, 4)),
        kv_heads=kv,
        head_dim=draw(st.integers(1, 16)),
        columns=draw(st.integers(12, 300)),
        vocabulary=draw(st.integers(12, 500)),
        dense_layers=draw(st.integers(0 if mixed else 1, 4)),
        mixed_layers=mixed,
        experts=draw(st.integers(12, 20)) if mixed else 0,
        expert_columns=draw(st.integers(12, 40)) if mixed else 0,
        word_matrices=draw(st.integers(0, 2)),
    )


def joined(ranges: list[range]) -> list[int]:
    return [number for one in ranges for number in one]


@given(
    any_sizes(), st.lists(speeds, min_size=1, max_size=12), st.sampled_from(["columns", "experts"])
)
def test_each_head_column_expert_and_word_has_one_place(sizes, given_speeds, mixing):
    """Whatever the model and the members; and the same members get the same cut."""
    members = [Member(speed) for speed in given_speeds]
    if len(members) > sizes.heads:
        with pytest.raises(UsageError):
            plan_cut(sizes, members, mixing)
        return
    cut = plan_cut(sizes, members, mixing)
    parts = cut.parts
    assert cut == plan_cut(sizes, members, mixing)
    assert joined([part.heads for part in parts]) == list(range(sizes.heads))
    assert joined([part.words for part in parts]) == list(range(sizes.vocabulary))
    if sizes.dense_layers:
        assert joined([part.columns for part in parts]) == list(range(sizes.columns))
    if sizes.mixed_layers:
        cells = [(e, c) for p in parts for e in p.experts for c in p.expert_columns]
        assert len(cells) == len(set(cells)) == sizes.experts * sizes.expert_columns
    for part in parts:
        assert {head // sizes.group for head in part.heads} == set(part.kv_heads)
        if len(members) <= sizes.kv_heads:
            assert len(part.heads) == len(part.kv_heads) * sizes.group
    if len(members) <= sizes.kv_heads:
        assert joined([part.kv_heads for part in parts]) == list(range(sizes.kv_heads))


@settings(max_examples=60)
@given(
    st.sampled_from([SMOL, LLAMA_70B, QWEN_MOE, replace(SMOL, word_matrices=0)]),
    st.lists(speeds, min_size=1, max_size=8),
)
def test_weights_follow_the_shares(sizes, given_speeds):
    """Unless a member's least heads alone are more than its share, nobody is 2 % above it."""
    assume(len(given_speeds) <= sizes.kv_heads)
    members = [Member(speed) for speed in given_speeds]
    shares = member_shares(sizes, members)
    assume(min(shares) > Fraction(1, 20))  # of less, one column may be too much
    cut = plan_cut(sizes, members)
    total = sizes.part_bytes(whole(sizes))
    held = [sizes.part_bytes(part) for part in cut.parts]
    assert sum(held) == total + (len(members) - 1) * sizes.kept * sizes.weight_bytes
    attention = [sizes.attention(part) * sizes.weight_bytes for part in cut.parts]
    assume(all(a < 0.9 * s * total for a, s in zip(attention, shares, strict=True)))
    assert all(h <= 1.02 * s * total for h, s in zip(held, shares, strict=True))


@settings(max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8))
def test_replicated_kv_heads_are_a_loss_that_all_bear(weights):
    """Beyond the KV heads: what is held twice is shared like the rest."""
    members = [Member(weight) for weight in weights]
    cut, shares = plan_cut(SMOL, members), member_shares(SMOL, members)
    assume(min(shares) > Fraction(1, 20))
    for got, wanted in zip(cut.shares, shares, strict=True):
        assert got <= 1.02 * wanted


def test_a_member_is_held_to_its_memory():
    total = SMOL.part_bytes(whole(SMOL))
    fast = Member(speed=9.0, memory_bytes=total // 2)
    slow = Member(speed=1.0, memory_bytes=total)
    cut = plan_cut(SMOL, [fast, slow])
    assert total * 0.495 < SMOL.part_bytes(cut.parts[0]) <= total // 2
    with pytest.raises(OutOfMemory, match="together"):
        plan_cut(SMOL, [fast, replace(slow, memory_bytes=total // 3)])
    with pytest.raises(OutOfMemory, match="rank 1"):  # its least heads are too much already
        plan_cut(SMOL, [Member(), replace(fast, memory_bytes=total // 60)])


@settings(max_examples=40)
@given(st.lists(st.tuples(speeds, st.integers(20, 200)), min_size=1, max_size=3))
def test_who_has_room_is_never_overfilled(given_members):
    total = SMOL.part_bytes(whole(SMOL))
    members = [Member(speed, total * room // 100) for speed, room in given_members]
    try:
        cut = plan_cut(SMOL, members)
    except OutOfMemory:
        assert sum(room for _, room in given_members) < 104  # some is left for rounding
        return
    for part, member in zip(cut.parts, members, strict=True):
        assert SMOL.part_bytes(part) <= (member.memory_bytes or 0)


def test_shares_are_the_smaller_of_memory_and_speed():
    big = 10 * SMOL.part_bytes(whole(SMOL))
    shares = member_shares(SMOL, [Member(3.0, big), Member(1.0, big), Member(1.0, 2 * big)])
    assert shares == [Fraction(1, 4) / Fraction(13, 20), *[Fraction(1, 5) / Fraction(13, 20)] * 2]
    assert member_shares(SMOL, [Member(3.0), Member(1.0)]) == [Fraction(3, 4), Fraction(1, 4)]


def test_equal_members_of_a_large_model_get_equal_tiles():
    parts = plan_cut(LLAMA_70B, [Member(), Member()]).parts
    assert [len(part.columns) for part in parts] == [14_336] * 2
    assert [len(part.kv_heads) for part in parts] == [4, 4]
    uneven = plan_cut(LLAMA_70B, [Member(2.0), Member(1.0)]).parts
    assert [len(part.kv_heads) for part in uneven] == [5, 3]
    assert len(uneven[0].columns) % 64 == 0


def test_heads_may_be_given():
    parts = cut_by_heads(SMOL, [5, 3, 1]).parts
    assert [part.kv_heads for part in parts] == [range(2), range(1, 3), range(2, 3)]
    for wrong in ([], [5, 4, 1], [9, 0], [-1, 10]):
        with pytest.raises(UsageError, match="heads"):
            cut_by_heads(SMOL, wrong)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_runs_of_attention_are_its_heads(kv, group, data):
    """Taken apart again, the runs say for each KV head how many of the heads read it."""
    first = data.draw(st.integers(0, kv * group - 1))
    heads = range(first, data.draw(st.integers(first + 1, kv * group)))
    runs = attention_runs(heads, group)
    counts = [queries for many, queries in runs for _ in range(many)]
    readers = [head // group for head in heads]
    assert counts == [readers.count(k) for k in dict.fromkeys(readers)]


@given(
    st.integers(0, 400),
    st.lists(st.fractions(0, 1), min_size=1, max_size=9),
    st.sampled_from([1, 2, 16]),
)
def test_apportioned_things_are_all_there(count, shares, grain):
    """Within a grain of the exact share, unless somebody has the least."""
    if -(-count // grain) < len(shares):
        with pytest.raises(UsageError):
            apportion(count, shares, grain)
        return
    counts = apportion(count, shares, grain)
    assert sum(counts) == count
    assert min(counts) >= 1
    if grain == 1 and sum(shares) and all(count * s / sum(shares) >= 1 for s in shares):
        exact = [count * share / sum(shares) for share in shares]
        assert all(abs(got - wanted) < 1 for got, wanted in zip(counts, exact, strict=True))


def test_cuts_that_leave_gaps_are_refused():
    cut = plan_cut(SMOL, [Member(), Member()])
    first, second = cut.parts
    for wrong in (
        (first,),
        (second, first),
        (first, replace(second, heads=range(7, 9))),
        (first, replace(second, columns=range(second.columns.start, 1535))),
        (first, replace(second, words=range(second.words.start + 1, 49_152))),
        (first, replace(second, kv_heads=range(3))),
    ):
        with pytest.raises(UsageError):
            Cut(SMOL, wrong)
    mixed = plan_cut(QWEN_MOE, [Member(), Member()])
    with pytest.raises(UsageError, match="both"):
        Cut(QWEN_MOE, (mixed.parts[0], replace(mixed.parts[1], experts=range(64, 128))))


@pytest.mark.parametrize("span", [Span(0, 4), Span(0, 1), Span(1, 3), Span(3, 4)], ids=str)
@pytest.mark.parametrize("config", [CONFIG, MOE, {**CONFIG, "tie_word_embeddings": True}])
@pytest.mark.parametrize("mixing", ["columns", "experts"])
def test_slices_of_all_parts_are_the_checkpoint(config, span, mixing):
    """Each cell of a matrix lies with exactly one rank, those of KV heads with at least one."""
    sizes = read_sizes(config, span)
    for weights in ([1], [2, 1], [1, 1, 1, 1], [1, 3, 1]):
        cut = plan_cut(sizes, [Member(weight) for weight in weights], mixing)
        slices = [part_slices(config, span, part) for part in cut.parts]
        for name, shape in span_shapes(config, span).items():
            own = [one[name] for one in slices if name in one]
            assert all(piece.whole == shape for piece in own)
            if (len(shape) == 1 and "proj" not in name) or name.endswith("mlp.gate.weight"):
                assert [piece.shape for piece in own] == [shape] * len(cut)
            elif "k_proj" in name or "v_proj" in name:
                assert {row for piece in own for row in piece.rows} == set(range(shape[0]))
            else:
                assert sum(piece.elements for piece in own) == math.prod(shape)
        for part, pieces in zip(cut.parts, slices, strict=True):
            planned = sizes.part_bytes(part) // sizes.weight_bytes
            matrices = {
                n: s for n, s in pieces.items() if len(s.whole) == 2 or n.endswith("norm.weight")
            }
            heads = [
                n for n in matrices if "q_norm" in n or "k_norm" in n or n == "model.norm.weight"
            ]
            assert planned == sum(s.elements for n, s in matrices.items() if n not in heads)


def test_runs_in_order():
    assert in_order([2, 0, 3]) == [range(2), range(2, 2), range(2, 5)]
