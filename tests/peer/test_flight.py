"""Batches that are launched before the last has landed give what they give one by one.

On a CPU launching computes, so that here the payloads and their order are at stake; on a GPU also
what the device is told in which order.
"""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hexswarm.peer.flight import Chosen
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.steps import Activations, Batch, Row, TailPolicy
from hexswarm.records import Sampling, Span

torch.set_num_threads(1)
LAYERS, BLOCK, WORDS = 3, 16, 61
CONFIG = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.3,
)
GREEDY = TailPolicy(Sampling())
DRAWN = TailPolicy(Sampling(temperature=1.0, seed=5))
PENALISED = TailPolicy(Sampling(repetition_penalty=1.5))
PROMPTS = [[1, 2, 3], [9], [4, 4, 4, 4, 4], [60, 0]]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(params=DEVICES)
def make(request, weights):
    def make(first=0, end=LAYERS):
        config = architecture(CONFIG.to_dict())
        shard = Shard(*(config, Span(first, end), LAYERS, dict(weights)), device=request.param)
        return Runner(shard, shard.make_pool(64, BLOCK))

    return make


def row(session, position, payload, count=None, policy=GREEDY):
    blocks = tuple(range(8 * session, 8 * session + 8))
    count = len(payload) if count is None else count
    return Row(bytes([session]), position, count, payload, True, blocks, policy=policy)


def begin(runner, policy=GREEDY):
    flight = runner.launch(
        Batch(tuple(row(n, 0, ids, policy=policy) for n, ids in enumerate(PROMPTS)))
    )
    return flight, [len(ids) for ids in PROMPTS]


def one_by_one(runner, steps):
    """Each step after the tokens of the last were read."""
    flight, positions = begin(runner)
    answers = [[result.token] for result in flight.results()]
    for _ in range(steps):
        rows = [row(n, at, answers[n][-1:]) for n, at in enumerate(positions)]
        for answer, result in zip(answers, runner.run(Batch(tuple(rows))), strict=True):
            answer.append(result.token)
        positions = [at + 1 for at in positions]
    return answers


def test_tokens_that_nobody_has_read_go_on(make):
    expected = one_by_one(make(), 12)
    runner = make()
    flight, positions = begin(runner)
    answers = [[] for _ in PROMPTS]
    for _ in range(12):
        rows = [row(n, at, flight.chosen[n], 1) for n, at in enumerate(positions)]
        following = runner.launch(Batch(tuple(rows)))
        for answer, result in zip(answers, flight.results(), strict=True):
            answer.append(result.token)
        flight, positions = following, [at + 1 for at in positions]
    for answer, result in zip(answers, flight.results(), strict=True):
        answer.append(result.token)
    assert answers == expected


def test_read_and_unread_tokens_of_several_batches_in_one(make):
    """Every other session goes on with what it has read; a third came in a batch of its own."""
    expected = one_by_one(make(), 1)
    runner = make()
    flight, positions = begin(runner)
    late = runner.launch(Batch((row(7, 0, PROMPTS[1]),)))
    read = [result.token for result in flight.results()]
    rows = [
        row(n, at, [read[n]] if n % 2 else flight.chosen[n], 1) for n, at in enumerate(positions)
    ]
    rows.insert(2, row(7, 1, late.chosen[0], 1))
    tokens = [result.token for result in runner.run(Batch(tuple(rows)))]
    assert tokens.pop(2) == expected[1][1]
    assert tokens == [answer[1] for answer in expected]
    assert late.results()[0].token == expected[1][0]


def test_only_what_the_device_chose_goes_on_unread(make):
    """Penalties need the host's history; logits are the client's; a part is not a ring of one."""
    runner = make()
    drawn, _ = begin(runner, DRAWN)
    assert list(drawn.chosen) == [0, 1, 2, 3]
    logits, _ = begin(runner, TailPolicy(Sampling(), logits=True))
    assert logits.chosen == {}
    penalised, _ = begin(runner, PENALISED)
    assert penalised.chosen == {}
    batch = (row(0, 0, [1, 2, 3], policy=PENALISED), row(1, 0, [9]), row(2, 0, [WORDS]))
    both = runner.launch(Batch(batch))
    assert list(both.chosen) == [1]
    assert isinstance(both.chosen[1], Chosen)
    assert [result.error is None for result in both.results()] == [True, True, False]
    tail = make(1)
    x = torch.zeros(1, 64).view(torch.uint8).numpy().tobytes()
    assert tail.launch(Batch((row(0, 0, Activations(x, "float32"), 1),))).chosen == {}


def test_what_must_not_come_in_fails_alone_while_others_are_under_way(make):
    """On a GPU the check ends after the layers began: the row is blank, its neighbours the same."""
    good = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    lines = [line[None].view(torch.uint8).numpy().tobytes() for line in good]
    rows = [row(n, 0, Activations(line, "float32"), 1) for n, line in enumerate(lines)]
    expected = make(1).run(Batch(tuple(rows)))
    good[2, 5] = math.nan
    spoilt = good[2][None].view(torch.uint8).numpy().tobytes()
    rows[2] = row(2, 0, Activations(spoilt, "float32"), 1)
    runner = make(1)
    flights = [runner.launch(Batch(tuple(rows))) for _ in range(2)]
    for flight in flights:
        results = flight.results()
        assert "incoming" in results.pop(2).error
        assert [result.token for result in results] == [
            result.token for n, result in enumerate(expected) if n != 2
        ]
