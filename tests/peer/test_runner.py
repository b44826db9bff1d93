"""A row that fails, fails alone: its neighbours' results stay bit for bit what they were."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from hexswarm.errors import OutOfMemory, UsageError
from hexswarm.peer.kv import KvPool, kv_bytes_per_token
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import MAX_ACTIVATION, Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.steps import Activations, Batch, Row, TailPolicy
from hexswarm.records import Sampling, Span

torch.set_num_threads(1)
VOCABULARY, HIDDEN, LAYERS, BLOCK = 50, 16, 3, 4
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=40,
    initializer_range=0.3,
)
GREEDY = TailPolicy(Sampling())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def make(model):
    def make(first, end, dtype="float32", policies=None):
        tensors = {name: value.detach() for name, value in model.state_dict().items()}
        config = architecture(CONFIG.to_dict())
        shard = Shard(config, Span(first, end), LAYERS, tensors, dtype)
        return Runner(shard, shard.make_pool(30, BLOCK), policies)

    return make


def row(session, payload, position=0, *, sample=True, blocks=None, count=None, policy=GREEDY, **kw):
    if count is None:
        count = len(payload)
    if blocks is None:
        blocks = tuple(range(10 * session, 10 * session + 10))
    return Row(bytes([session]), position, count, payload, sample, blocks, policy=policy, **kw)


def hidden(seed, count=3, dtype=torch.float32):
    x = torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    return Activations(x.view(torch.uint8).numpy().tobytes(), name)


def with_value(payload, value):
    x = torch.frombuffer(bytearray(payload.data), dtype=torch.float32)
    x[HIDDEN + 3] = value
    return Activations(memoryview(x.numpy().tobytes()), "float32")


def test_what_each_stage_gives(make):
    ids = [1, 2, 3, 4]
    (head,) = make(0, 1).run(Batch((row(0, ids),)))
    assert (head.token, head.logits, head.error) == (None, None, None)
    assert head.activations.dtype == "float32"
    assert len(head.activations.data) == 4 * HIDDEN * 4
    tail = make(1, LAYERS)
    (silent,) = tail.run(Batch((row(0, head.activations, count=4, sample=False),)))
    assert silent == type(silent)(silent.row)
    logits = TailPolicy(Sampling(), logits=True)
    token, raw = tail.run(
        Batch(
            (
                row(0, head.activations, count=4),
                row(1, head.activations, count=4, policy=logits),
            )
        )
    )
    values = torch.frombuffer(bytearray(raw.logits), dtype=torch.float32)
    assert token.token == int(values.argmax())
    assert (raw.token, token.logits) == (None, None)


def test_results_keep_the_order_of_rows(make):
    rows = [row(0, [1]), row(1, [99]), row(2, [5, 6]), row(0, [7], 1, span=Span(0, 1))]
    results = make(0, 2).run(Batch(tuple(rows)))
    assert [result.row for result in results] == rows
    assert [result.error is None for result in results] == [True, False, True, True]


BAD_HEAD_ROWS = {
    "id too large": row(2, [1, VOCABULARY]),
    "id negative": row(2, [-1]),
    "id not a number": row(2, ["1"]),
    "no ids": row(2, None, count=1),
    "fewer ids than tokens": row(2, [1, 2], count=3),
    "no tokens": row(2, []),
    "activations at the head": row(2, hidden(1), count=3),
    "negative position": row(2, [1], -1),
    "beyond the context": row(2, [1], 40, blocks=tuple(range(20))),
    "too few blocks": row(2, [1, 2, 3, 4, 5], blocks=(20,)),
    "no blocks": row(2, [1], blocks=()),
    "block outside the pool": row(2, [1], blocks=(30,)),
    "negative block": row(2, [1], blocks=(-1,)),
    "span outside": row(2, [1], span=Span(0, 3)),
}


@pytest.mark.parametrize("bad", BAD_HEAD_ROWS.values(), ids=BAD_HEAD_ROWS)
def test_a_bad_row_at_the_head_fails_alone(make, bad):
    good = (row(0, [1, 2, 3]), row(1, [4]))
    expected = make(0, 2).run(Batch(good))
    runner = make(0, 2)
    runner.pool.data.zero_()
    first, failed, second = runner.run(Batch((good[0], bad, good[1])))
    assert [first, second] == expected
    assert failed.error
    assert failed.activations is None
    assert runner.pool.data[:, 20 * BLOCK :].eq(0).all()  # its KV was not touched


BAD_LATER_ROWS = {
    "NaN": row(2, with_value(hidden(1), float("nan")), count=3),
    "infinity": row(2, with_value(hidden(1), float("inf")), count=3),
    "minus infinity": row(2, with_value(hidden(1), float("-inf")), count=3),
    "NaN in bfloat16": row(2, Activations(b"\xc0\x7f" * HIDDEN, "bfloat16"), count=1),
    "too short": row(2, Activations(hidden(1).data[:-4], "float32"), count=3),
    "unknown dtype": row(2, Activations(b"\0" * HIDDEN, "int8"), count=1),
    "token ids": row(2, [1, 2, 3]),
    "no policy": row(2, hidden(1), count=3, policy=None),
}


@pytest.mark.parametrize("bad", BAD_LATER_ROWS.values(), ids=BAD_LATER_ROWS)
def test_a_bad_row_at_the_tail_fails_alone(make, bad):
    good = (row(0, hidden(5), count=3), row(1, hidden(6, 1), count=1))
    expected = make(1, LAYERS).run(Batch(good))
    runner = make(1, LAYERS)
    runner.pool.data.zero_()
    first, failed, second = runner.run(Batch((good[0], bad, good[1])))
    assert [first, second] == expected
    assert failed.error
    assert failed.token is None
    assert runner.pool.data[:, 20 * BLOCK :].eq(0).all()


@pytest.mark.parametrize("end", [2, LAYERS])
def test_a_row_that_overflows_inside_fails_alone(make, end):
    """In float16 a large but finite input becomes infinite; its neighbour stays as it was."""
    big = torch.full((2, HIDDEN), 60000.0, dtype=torch.float16)
    big[:, ::2] = -60000.0
    overflow = Activations(big.view(torch.uint8).numpy().tobytes(), "float16")
    good = row(0, hidden(3), count=3)
    runner = make(1, end, "float16")
    with torch.inference_mode():
        runner.shard.layers[0].o.mul_(3000)
    (alone,) = runner.run(Batch((good,)))
    failed, fine = runner.run(Batch((row(2, overflow, count=2), good)))
    assert alone.error is None
    assert (fine.activations, fine.token) == (alone.activations, alone.token)
    assert "not finite" in failed.error


@pytest.mark.parametrize("value", [MAX_ACTIVATION, -MAX_ACTIVATION])
def test_large_values_pass_and_absurd_ones_fail(make, value):
    """Also those whose sum overflows: the check must not be fooled by it."""
    good = row(0, hidden(3), count=3)
    for size, fine in ((value, True), (1.01 * value, False), (1e38 * (value / 1e9), False)):
        payload = with_value(hidden(1), size)
        taken, other = make(1, 2).run(Batch((row(1, payload, count=3), good)))
        assert (taken.error is None) == fine
        assert other == make(1, 2).run(Batch((good,)))[0]


def test_a_row_that_grows_beyond_reason_fails_alone(make):
    runner = make(1, 2)
    with torch.inference_mode():
        runner.shard.layers[0].o.mul_(1e12)
        runner.shard.layers[0].o[:, ::2] = 0
    zeros = Activations(bytes(3 * HIDDEN * 4), "float32")
    failed, fine = runner.run(Batch((row(1, hidden(2), count=3), row(0, zeros, count=3))))
    assert "above 1e+09" in failed.error
    assert fine.error is None


POISON = {
    "nan": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "absurd": 1e30,
    "beyond float16": 7e4,
    "just permitted": 6e4,
}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from(sorted(POISON)),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.booleans(),
)
def test_nobody_is_harmed_by_a_neighbours_numbers(make, good, at, kind, dtype, tail):
    """Whatever one row brings: the others' results are bit for bit what they are beside a good one,
    or, if it was not let in, without it.
    """
    end = LAYERS if tail else 2
    rows = [row(n + 1, hidden(seed, count), count=count) for n, (seed, count) in enumerate(good)]
    rows = [replace(one, blocks=tuple(range(6 * n, 6 * n + 6))) for n, one in enumerate(rows)]
    at = min(at, len(rows))
    mine = tuple(range(24, 30))
    bad = row(9, with_value(hidden(7), POISON[kind]), count=3, blocks=mine)
    fine = row(9, with_value(hidden(7), 1.0), count=3, blocks=mine)
    results = make(1, end, dtype).run(Batch((*rows[:at], bad, *rows[at:])))
    outcome = results.pop(at)
    if outcome.error is not None and "incoming" in outcome.error:
        assert results == make(1, end, dtype).run(Batch(tuple(rows)))
    else:
        beside = make(1, end, dtype).run(Batch((*rows[:at], fine, *rows[at:])))
        beside.pop(at)
        assert results == beside
    assert all(result.error is None for result in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_session_left_in_the_store_shows_nowhere(make, dtype):
    """A store full of NaN gives the same bits as one full of zeros: no slot is read unwritten.

    Prompts in pieces, decode steps, a crop and scattered blocks, alone and in one batch.
    """
    scattered = (29, 3, 17, 4, 11, 2, 25, 8, 20, 1)
    steps = [
        [row(0, hidden(1, 5), count=5), row(1, hidden(2, 9), count=9, blocks=scattered)],
        [row(0, hidden(3, 3), 5, count=3), row(1, hidden(4, 1), 9, count=1, blocks=scattered)],
        [row(0, hidden(5, 1), 8, count=1)],
        [row(0, hidden(6, 2), 2, count=2), row(1, hidden(7, 1), 10, count=1, blocks=scattered)],
        [row(0, hidden(8, 1), 4, count=1), row(1, hidden(9, 1), 11, count=1, blocks=scattered)],
    ]
    clean, dirty = make(1, 2, dtype), make(1, 2, dtype)
    dirty.pool.data.fill_(math.nan)
    for batch in steps:
        expected, results = clean.run(Batch(tuple(batch))), dirty.run(Batch(tuple(batch)))
        assert results == expected
        assert all(result.error is None for result in results)


def test_blocks_are_cleared_and_no_others(make):
    runner = make(0, 2)
    pool = runner.pool
    for gone in ((), (0,), (29,), (3, 4, 5, 9, 10, 29), (7, 6, 7)):
        pool.data.fill_(1.0)
        runner.forget(gone)
        for block in range(30):
            slots = pool.data[:, block * BLOCK : (block + 1) * BLOCK]
            assert slots.eq(0.0 if block in gone else 1.0).all(), (gone, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_another_dtype_are_converted(make, dtype):
    payload = hidden(4, dtype=dtype)
    x = torch.frombuffer(bytearray(payload.data), dtype=dtype).float()
    same = Activations(x.numpy().tobytes(), "float32")
    (a,) = make(1, 2).run(Batch((row(0, payload, count=3),)))
    (b,) = make(1, 2).run(Batch((row(0, same, count=3),)))
    assert a.activations == b.activations
    (c,) = make(1, 2, str(dtype).removeprefix("torch.")).run(Batch((row(0, payload, count=3),)))
    assert len(c.activations.data) == 3 * HIDDEN * 2


def test_policies_by_session_stand_in_for_those_of_rows(make):
    plain = row(0, hidden(1), count=3, policy=None)
    (expected,) = make(1, LAYERS).run(Batch((row(0, hidden(1), count=3),)))
    live = {}
    runner = make(1, LAYERS, policies=live)
    assert runner.run(Batch((plain,)))[0].error
    live[bytes([0])] = GREEDY
    assert runner.run(Batch((plain,)))[0].token == expected.token
    assert runner.run(Batch((plain,)), {bytes([0]): GREEDY})[0].token == expected.token
    assert runner.run(Batch((plain,)), {})[0].error


def test_tokens_do_not_depend_on_batch_mates(make):
    """Greedy, sampled and penalised sessions alone and together."""
    rng = random.Random(0)
    policies = [
        GREEDY,
        TailPolicy(Sampling(temperature=1.5, seed=3)),
        TailPolicy(Sampling(temperature=0.9, top_p=0.9, seed=4), history=[1, 2, 3]),
        TailPolicy(Sampling(repetition_penalty=1.9), history=list(range(25))),
    ]
    for _ in range(5):
        rows = []
        for policy in rng.sample(policies, 3):
            count = rng.randint(1, 6)
            payload = hidden(rng.randrange(99), count)
            rows.append(row(len(rows), payload, count=count, policy=policy))
        together = make(1, LAYERS).run(Batch(tuple(rows)))
        for one, result in zip(rows, together, strict=True):
            (alone,) = make(1, LAYERS).run(Batch((one,)))
            assert alone.token == result.token


def test_a_history_outside_the_vocabulary_fails_its_row_only(make):
    bad = TailPolicy(Sampling(repetition_penalty=2.0), history=[VOCABULARY])
    rows = (row(0, hidden(1), count=3, policy=bad), row(1, hidden(2), count=3))
    failed, fine = make(1, LAYERS).run(Batch(rows))
    assert failed.error
    assert fine.token is not None


def test_running_out_of_memory_is_typed(make, monkeypatch):
    runner = make(0, 2)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner.shard, "forward", exhausted)
    with pytest.raises(OutOfMemory, match="3 tokens"):
        runner.run(Batch((row(0, [1, 2, 3]),)))


def test_a_pool_that_does_not_fit_is_typed():
    with pytest.raises(OutOfMemory):
        KvPool(64, 1 << 30, kv_heads=8, head_dim=128, dtype=torch.float32)
    with pytest.raises(UsageError):
        KvPool(1, 0, kv_heads=8, head_dim=128, dtype=torch.float32)


def test_pool_accounting(make):
    runner = make(0, 2)
    pool = runner.pool
    assert pool.tokens == 30 * BLOCK
    assert pool.bytes_per_token == kv_bytes_per_token(2, 2, 4, torch.float32) == 2 * 2 * 2 * 4 * 4
    assert pool.data.nbytes == pool.bytes_per_token * pool.tokens
    assert [pool.blocks_for(n) for n in (1, 4, 5)] == [1, 1, 2]
    with pytest.raises(UsageError):
        Runner(make(0, 1).shard, pool)
