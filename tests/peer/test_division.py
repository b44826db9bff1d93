"""Dividing a span over a machine's devices: by speed while memory allows, and never beyond it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hexswarm.degree import Degree
from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.cuts import Sizes, whole
from hexswarm.peer.division import Load, Places, Spans, divide, even, in_words, needs_bytes
from hexswarm.peer.slices import read_sizes
from hexswarm.records import Span

SIZES = Sizes(256, 16, 4, 16, 1024, 4096, dense_layers=4, word_matrices=1, weight_bytes=2)
ALL_BYTES = SIZES.part_bytes(whole(SIZES))
GPUS = ("cuda:0", "cuda:1")
CONFIG = {
    "model_type": "qwen3_moe", "num_hidden_layers": 5, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "mlp_only_layers": [1, 3], "decoder_sparse_step": 1, "tie_word_embeddings": False,
}  # fmt: skip


def gpus(*rooms: float, speeds: tuple[float, ...] | None = None) -> Places:
    """Of cards with room for so many times the whole span."""
    names = tuple(f"cuda:{n}" for n in range(len(rooms)))
    return Places(names, speeds or (1.0,) * len(rooms), tuple(int(r * ALL_BYTES) for r in rooms))


def test_speed_decides_while_memory_allows() -> None:
    cut = divide(SIZES, Degree(2), gpus(2.0, 2.0, speeds=(3.0, 1.0)), Load())
    assert cut.shares[0] == pytest.approx(0.75, abs=0.02)


def test_a_card_that_is_too_small_for_its_speed_gets_what_it_holds() -> None:
    cut = divide(SIZES, Degree(2), gpus(0.4, 2.0, speeds=(3.0, 1.0)), Load())
    assert 0.25 < cut.shares[0] <= 0.4


def test_given_shares_are_kept_or_refused() -> None:
    wide, narrow = gpus(0.9, 0.9), gpus(0.6, 0.9)
    assert divide(SIZES, Degree(2, (3, 1)), wide, Load()).shares[0] == pytest.approx(0.75, abs=0.02)
    with pytest.raises(OutOfMemory, match=r"rank 0 \(cuda:0\)"):
        divide(SIZES, Degree(2, (3, 1)), narrow, Load())


def test_kv_counts_where_its_heads_are() -> None:
    """Three KV heads over two ranks: two and one, whatever the shares of the weights."""
    sizes = Sizes(192, 9, 3, 64, 512, 1000, dense_layers=2)
    places = Places(GPUS, (1.0, 1.0), (10**9, 10**9))
    cut = divide(sizes, Degree(2), places, Load(kv_bytes=3000))
    bare = needs_bytes(cut, Load())
    assert [n - b for n, b in zip(needs_bytes(cut, Load(3000)), bare, strict=True)] == [2000, 1000]
    with pytest.raises(OutOfMemory):
        divide(sizes, Degree(2), places, Load(kv_bytes=16 * 10**8))


def test_ranks_of_one_cpu_share_its_memory() -> None:
    places = Places(("cpu", "cpu"), (1.0, 1.0), (int(1.1 * ALL_BYTES),))
    assert len(divide(SIZES, Degree(2, (9, 1)), places, Load())) == 2
    with pytest.raises(OutOfMemory, match="all ranks together"):
        divide(SIZES, Degree(2), places, Load(kv_bytes=ALL_BYTES))


def test_more_ranks_than_heads_are_refused_with_a_remedy() -> None:
    with pytest.raises(UsageError, match="at most --tensor-parallel 16"):
        divide(SIZES, Degree(17), gpus(*[1.0] * 17), Load())


def test_few_bits_make_room() -> None:
    small = gpus(0.2, 0.2)
    with pytest.raises(OutOfMemory):
        divide(SIZES, Degree(2), small, Load())
    assert len(divide(SIZES, Degree(2), small, Load(shrink=0.3))) == 2


def test_only_whole_groups_of_queries_are_even() -> None:
    sizes = Sizes(64, 8, 2, 8, 64, 100, dense_layers=1)

    def over(count: int) -> bool:
        places = Places(("cpu",) * count, (1.0,) * count, (10**9,))
        return even(divide(sizes, Degree(count), places, Load()))

    assert [over(2), over(3), over(4)] == [True, False, True]
    assert in_words(divide(SIZES, Degree(2, (3, 1)), gpus(2, 2), Load())).startswith("2 ranks, 7")


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.05, 2)), min_size=2, max_size=6),
    st.integers(0, 2 * ALL_BYTES),
    st.sampled_from([1.0, 0.55, 0.3]),
)
def test_no_rank_holds_more_than_it_has_room_for(
    cards: list[tuple[float, float]], kv_bytes: int, shrink: float
) -> None:
    """Whatever the cards: the cut fits each of them, or it is refused."""
    speeds, rooms = zip(*cards, strict=True)
    places, load = gpus(*rooms, speeds=speeds), Load(kv_bytes, shrink)
    try:
        cut = divide(SIZES, Degree(0), places, load)
    except OutOfMemory:
        return
    needed = needs_bytes(cut, load)
    assert all(n <= room for n, room in zip(needed, places.rooms_bytes, strict=True))
    assert sum(needed) >= shrink * ALL_BYTES + kv_bytes - 2 * len(cards)


@given(st.integers(0, 4), st.integers(1, 5))
def test_sizes_of_any_span_are_those_that_are_read(first: int, end: int) -> None:
    assume(first < end)
    span = Span(first, end)
    found, read = Spans(CONFIG, 5, 2).sizes(span), read_sizes(CONFIG, span, 2)
    assert found.part_bytes(whole(found)) == read.part_bytes(whole(read))
    assert (found.dense_layers, found.mixed_layers) == (read.dense_layers, read.mixed_layers)
    assert found.word_matrices == read.word_matrices
