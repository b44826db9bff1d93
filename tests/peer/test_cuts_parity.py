"""A cut model is the model: any cut of any family, at any degree, gives the logits of the whole.

Ranks are threads. Whatever they compute, all of them hand on the same bits.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexswarm.errors import CorruptWeights, MemberLost, UsageError
from hexswarm.peer.cuts import Cut, Member, Part, Sizes, cut_by_heads, plan_cut
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.slices import read_sizes
from hexswarm.peer.steps import Batch, Row, TailPolicy
from hexswarm.peer.sums import thread_sums
from hexswarm.records import Sampling, Span
from tests.peer.ranks import ThreadStage, take_slices
from tests.peer.test_models import LAYERS, MODELS, reference, tokens
from tests.tiny import checkpoint

torch.set_num_threads(1)
LOGITS = TailPolicy(Sampling(), logits=True)
BLOCKS = {b"a": (3, 4, 5, 6, 7, 8, 9, 10), b"b": (40, 2, 31, 30, 12, 20, 1, 22)}
_WHOLE: dict[str, Runner] = {}


def config(name):
    return reference(name).config.to_dict()


def whole(name):
    """The model in one shard."""
    if name not in _WHOLE:
        tensors = checkpoint(reference(name))
        shard = Shard(architecture(config(name)), Span(0, LAYERS), LAYERS, tensors, backend="torch")
        _WHOLE[name] = Runner(shard, shard.make_pool(64, 4))
    return _WHOLE[name]


def stage(name, span, cut, dtype="float32", **options):
    made = (architecture(config(name)), config(name), span, cut, checkpoint(reference(name)))
    return ThreadStage(*made, dtype=dtype, **options)


def run(stages, pieces):
    """Logits of each step; a piece is a list of (session, position, ids) that run together."""
    found = []
    for together in pieces:
        payloads = [ids for _, _, ids in together]
        for one in stages:
            rows = [
                Row(session, position, len(ids), payload, True, BLOCKS[session], policy=LOGITS)
                for (session, position, ids), payload in zip(together, payloads, strict=True)
            ]
            results = one.run(Batch(tuple(rows)))
            assert [result.error for result in results] == [None] * len(rows)
            payloads = [result.activations for result in results]
        found += [torch.frombuffer(bytearray(r.logits), dtype=torch.float32) for r in results]
    return torch.stack(found)


def assert_close(got, expected, relative=1e-5):
    assert (got - expected).abs().max() <= relative * expected.abs().max()


IDS = tokens(32)
PIECES = [
    [(b"a", 0, IDS[:9])],
    [(b"a", 9, IDS[9:10]), (b"b", 0, IDS[3:8])],
    [(b"a", 10, IDS[10:11]), (b"b", 5, IDS[8:9])],
    [(b"b", 6, IDS[9:13])],
    [(b"a", 11, IDS[11:12]), (b"b", 10, IDS[13:14])],
]
"""Prompts whole and in pieces, decode steps alone and beside prompts."""


@st.composite
def runs(draw: st.DrawFn, count: int, ranks: int) -> list[range]:
    """Any way to deal out `count` things in order."""
    inner = draw(st.sets(st.integers(1, count - 1), min_size=ranks - 1, max_size=ranks - 1))
    return [range(a, b) for a, b in itertools.pairwise([0, *sorted(inner), count])]


@st.composite
def any_cut(draw: st.DrawFn, sizes: Sizes) -> Cut:
    """Heads, columns, words and experts each in proportions of their own."""
    ranks = draw(st.integers(1, 4 if sizes.mixed_layers else sizes.heads))
    none = [range(0)] * ranks
    heads, words = draw(runs(sizes.heads, ranks)), draw(runs(sizes.vocabulary, ranks))
    columns = draw(runs(sizes.columns, ranks)) if sizes.dense_layers else none
    experts, widths = [range(sizes.experts)] * ranks, [range(sizes.expert_columns)] * ranks
    if sizes.mixed_layers and draw(st.booleans()):
        experts = draw(runs(sizes.experts, ranks))
    elif sizes.mixed_layers:
        widths = draw(runs(sizes.expert_columns, ranks))
    parts = [
        Part(
            *(rank, ranks, heads[rank], range(h.start // sizes.group, -(-h.stop // sizes.group))),
            *(columns[rank], words[rank], experts[rank], widths[rank]),
        )
        for rank, h in enumerate(heads)
    ]
    return Cut(sizes, tuple(parts))


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_any_cut_gives_the_logits_of_the_whole(name, data):
    """A route of one or two stages, each cut in its own way."""
    expected = run([whole(name)], PIECES)
    border = data.draw(st.sampled_from([LAYERS, 1, 3]))
    spans = [Span(0, border), *([Span(border, LAYERS)] if border < LAYERS else [])]
    stages = []
    try:
        for span in spans:
            cut = data.draw(any_cut(read_sizes(config(name), span)))
            stages.append(stage(name, span, cut))
        assert_close(run(stages, PIECES), expected)
    finally:
        for one in stages:
            one.__exit__()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-moe"])
def test_a_route_of_degrees_one_two_and_three(name):
    """Planned cuts, one of them with heads that part from their KV head."""
    sizes = [read_sizes(config(name), span) for span in (Span(0, 1), Span(1, 2), Span(2, LAYERS))]
    cuts = [
        plan_cut(sizes[0], [Member()]),
        plan_cut(sizes[1], [Member(2.0), Member(1.0)]),
        cut_by_heads(sizes[2], [3, 2, 1]),
    ]
    with (
        stage(name, Span(0, 1), cuts[0]) as one,
        stage(name, Span(1, 2), cuts[1]) as two,
        stage(name, Span(2, LAYERS), cuts[2]) as three,
    ):
        assert_close(run([one, two, three], PIECES), run([whole(name)], PIECES))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """Ranks agree to the last bit in these, too (`ThreadStage.run`)."""
    cut = cut_by_heads(read_sizes(config("llama"), Span(0, LAYERS)), [2, 3, 1])
    with stage("llama", Span(0, LAYERS), cut, dtype) as cut_in_three:
        got = run([cut_in_three], PIECES)
    assert_close(got, run([whole("llama")], PIECES), 0.1)


def test_rounded_weights_are_rounded_slice_by_slice():
    name, span = "llama", Span(0, LAYERS)
    cut = plan_cut(read_sizes(config(name), span), [Member(), Member()])
    with stage(name, span, cut, quant="int8") as halves:
        got = run([halves], PIECES)
    expected = run([whole(name)], PIECES)
    assert 1e-4 < (got - expected).abs().max() / expected.abs().max() < 0.05


def test_a_part_holds_what_was_planned_and_fewer_heads_of_kv():
    name, span = "llama", Span(0, LAYERS)
    sizes = read_sizes(config(name), span)
    cut = plan_cut(sizes, [Member(3.0), Member(1.0)])
    with stage(name, span, cut, blocks=8) as made:
        for part, runner in zip(cut.parts, made.runners, strict=True):
            last_norm = 4 * sizes.hidden
            assert runner.shard.weight_bytes == sizes.part_bytes(part) + last_norm
            assert runner.pool.data.shape[3] == len(part.kv_heads) == 1


def test_a_rank_that_fails_fails_the_others():
    """At once, and with the name of who did not come."""
    name, span = "llama", Span(0, LAYERS)
    cut = plan_cut(read_sizes(config(name), span), [Member(), Member()])
    with stage(name, span, cut) as made:
        with torch.inference_mode():
            made.runners[1].shard.layers[2].o.resize_(0, 0)
        jobs = [made._threads.submit(made._one, rank, batch_of(IDS[:4])) for rank in (0, 1)]
        with pytest.raises(MemberLost, match="rank 1"):
            jobs[0].result(30)
        with pytest.raises(RuntimeError):
            jobs[1].result(30)


def batch_of(ids):
    return Batch((Row(b"a", 0, len(ids), ids, True, BLOCKS[b"a"], policy=LOGITS),))


def test_parts_need_their_own_slices_and_their_sums():
    name, span = "llama", Span(0, LAYERS)
    config_, tensors = config(name), checkpoint(reference(name))
    cut = plan_cut(read_sizes(config_, span), [Member(), Member()])
    made, sums = architecture(config_), thread_sums(2)[0]
    own = take_slices(config_, span, cut.parts[0], tensors)
    with pytest.raises(UsageError, match="sums"):
        Shard(made, span, LAYERS, dict(own), part=cut.parts[0])
    with pytest.raises(UsageError, match="sums"):
        Shard(made, span, LAYERS, dict(tensors), sums=sums)
    with pytest.raises(CorruptWeights, match="shape"):
        Shard(made, span, LAYERS, dict(tensors), part=cut.parts[0], sums=sums)
