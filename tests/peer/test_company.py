"""What a session is told does not depend on who else is there: greedy tokens alone and among 31.

Float32 on a CPU. Where the layers run in C, decode steps are even equal bit for bit; in PyTorch a
sum's order may change with the size of a batch, and a token only if two are as good as tied.
"""

from __future__ import annotations

import random

import pytest
import torch

from hexswarm.kernels import native
from hexswarm.peer import shard
from hexswarm.peer.models.registry import architecture
from hexswarm.peer.runner import Runner
from hexswarm.peer.shard import Shard
from hexswarm.peer.steps import Batch, Row, TailPolicy
from hexswarm.records import Sampling, Span
from tests import tiny

torch.set_num_threads(1)
SESSIONS, BLOCK, EACH, ANSWER = 32, 4, 12, 8
BACKENDS = ["torch", *(["native"] if native.available() else [])]
GREEDY, LOGITS = TailPolicy(Sampling()), TailPolicy(Sampling(), logits=True)


class Ring:
    """Two stages; every session has its own blocks, in disorder."""

    def __init__(self, family, backend, seed):
        model = tiny.model(family)
        config, self.runners = architecture(model.config.to_dict()), []
        for span in (Span(0, 2), Span(2, tiny.LAYERS)):
            tensors = tiny.checkpoint(model)
            held = Shard(config, span, tiny.LAYERS, tensors, backend=backend)
            pool = held.make_pool(SESSIONS * EACH, BLOCK)
            pool.data.fill_(float("nan"))
            self.runners.append(Runner(held, pool))
        self.order = random.Random(seed).sample(range(SESSIONS * EACH), SESSIONS * EACH)

    def step(self, pieces, policy=GREEDY):
        """The result for each piece: number of a session, position, ids."""
        payloads = [ids for _, _, ids in pieces]
        for runner in self.runners:
            rows = tuple(
                Row(bytes([number]), position, len(ids), payload, True,
                    tuple(self.order[number * EACH : (number + 1) * EACH]), policy=policy)
                for (number, position, ids), payload in zip(pieces, payloads, strict=True)
            )  # fmt: skip
            results = runner.run(Batch(rows))
            assert [result.error for result in results] == [None] * len(rows)
            payloads = [result.activations for result in results]
        return results

    def alone(self, number, prompt):
        ids = list(prompt)
        for _ in range(ANSWER):
            position = len(ids) - 1 if len(ids) > len(prompt) else 0
            ids.append(self.step([(number, position, ids[position:])])[0].token)
        return ids[len(prompt) :]

    def together(self, prompts, rng):
        """Sessions come one after another, so prompts and decode steps meet; order by chance."""
        texts, starts = [list(prompt) for prompt in prompts], rng.choices(range(6), k=SESSIONS)
        turn = 0
        while any(len(text) < len(p) + ANSWER for text, p in zip(texts, prompts, strict=True)):
            pieces = []
            for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
                if starts[number] <= turn and len(text) < len(prompt) + ANSWER:
                    position = len(text) - 1 if len(text) > len(prompt) else 0
                    pieces.append((number, position, text[position:]))
            rng.shuffle(pieces)
            for (number, _, _), result in zip(pieces, self.step(pieces), strict=True):
                texts[number].append(result.token)
            turn += 1
        return [text[len(p) :] for text, p in zip(texts, prompts, strict=True)]


def prompts(rng, words=200):
    return [rng.choices(range(words), k=rng.randint(1, 40)) for _ in range(SESSIONS)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_the_same_alone_and_among_31_others(family, backend):
    rng = random.Random(f"{family} {backend}")
    texts = prompts(rng)
    together = Ring(family, backend, 1).together(texts, rng)
    for number in rng.sample(range(SESSIONS), 4):
        assert Ring(family, backend, 2).alone(number, texts[number]) == together[number]


@pytest.mark.skipif(not native.available(), reason="installed without a compiler")
@pytest.mark.parametrize("prompt_beside", [0, 1, 30])
@pytest.mark.parametrize("most", [shard.ROWS, 16])
def test_a_decode_step_in_c_has_the_same_bits_in_any_company(prompt_beside, most, monkeypatch):
    """Steps of 32 sessions, in one pass or more, and perhaps the prompt of another."""
    monkeypatch.setattr(shard, "ROWS", most)
    rng = random.Random(prompt_beside)
    ring, sessions = Ring("llama", "native", 3), SESSIONS - 1
    texts = [rng.choices(range(200), k=rng.randint(2, 30)) for _ in range(sessions)]
    for number, text in enumerate(texts):
        ring.step([(number, 0, text[:-1])])
    last = [(number, len(text) - 1, text[-1:]) for number, text in enumerate(texts)]
    beside = [(sessions, 0, rng.choices(range(200), k=prompt_beside))] if prompt_beside else []
    alone = [ring.step([piece], LOGITS)[0].logits for piece in last]
    pieces = [*last[:9], *beside, *last[9:]]
    together = ring.step(pieces, LOGITS)
    heard = {result.row.session[0]: result.logits for result in together}
    assert [heard[number] for number in range(sessions)] == alone
