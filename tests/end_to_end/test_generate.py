"""What a user gets from `generate`, `Client` and `AsyncClient` over a ring of real peers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hexswarm
from hexswarm.blocking import Client, Stream
from hexswarm.client import AsyncClient
from hexswarm.errors import SessionClosed, UsageError
from hexswarm.prefix import BLOCK_TOKENS
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import (
    LocalSwarm,
    patient,
    pool_is_announced_free,
    until,
    whole_pool_is_free,
)

pytestmark = pytest.mark.end_to_end

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences how bread is baked.",
    "Write a haiku about the sea.",
    "Name three rivers and the countries they flow through.",
)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Plain:
    """transformers as its users run it: float32, one thread."""

    def __init__(self, folder: Any) -> None:
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: str | list[dict[str, str]], tokens: int, **more: Any) -> list[int]:
        text = prompt if isinstance(prompt, str) else self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )  # fmt: skip
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **more)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def plain(default_folder: Any) -> Plain:
    return Plain(default_folder)


# --- the same tokens as plain transformers ------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_tokens_are_those_of_transformers(
    client: Client, plain: Plain, question: str
) -> None:
    answer = client.generate(chat(question), max_new_tokens=32)
    assert list(answer.ids) == plain.greedy(chat(question), 32)
    assert len(answer.route.stages) == 3


def test_repetition_penalty_is_that_of_transformers(client: Client, plain: Plain) -> None:
    answer = client.generate(chat(QUESTIONS[3]), max_new_tokens=24, repetition_penalty=1.3)
    assert list(answer.ids) == plain.greedy(chat(QUESTIONS[3]), 24, repetition_penalty=1.3)


def test_a_plain_prompt_is_continued(client: Client, plain: Plain) -> None:
    text = "The three primary colours are"
    answer = client.generate(text, max_new_tokens=12)
    assert list(answer.ids) == plain.greedy(text, 12)


def test_token_ids_are_a_prompt_too(client: Client, plain: Plain) -> None:
    text = "The three primary colours are"
    ids = plain.tokenizer(text)["input_ids"]
    by_ids = client.generate(ids, max_new_tokens=8)
    assert by_ids.ids == client.generate(text, max_new_tokens=8).ids
    assert by_ids.prompt_tokens == len(ids)


# --- what comes out and when it ends ------------------------------------------------------------


def test_the_pieces_of_a_stream_are_the_text(client: Client) -> None:
    with client.generate(chat(QUESTIONS[0]), stream=True, max_new_tokens=16) as stream:
        pieces = list(stream)
    whole = client.generate(chat(QUESTIONS[0]), max_new_tokens=16)
    assert "".join(pieces) == stream.completion.text == whole.text
    assert "Paris" in whole.text
    assert len(pieces) > 1
    assert stream.completion.ids == whole.ids
    assert whole.finish == "stop"
    assert whole.ttft_s > 0
    assert whole.tokens_per_s > 0


def test_max_new_tokens_ends_an_answer(client: Client) -> None:
    short = client.generate(chat(QUESTIONS[1]), max_new_tokens=5)
    assert (len(short.ids), short.finish) == (5, "length")
    assert client.generate(chat(QUESTIONS[1]), max_new_tokens=1).ids == short.ids[:1]


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(client: Client) -> None:
    whole = client.generate(chat(QUESTIONS[3]), max_new_tokens=32).text
    stop = whole[20:24]
    cut = client.generate(chat(QUESTIONS[3]), max_new_tokens=32, stop=["never said", stop])
    assert (cut.text, cut.finish) == (whole[: whole.index(stop)], "stop")
    with client.generate(chat(QUESTIONS[3]), max_new_tokens=32, stop=stop, stream=True) as stream:
        assert "".join(stream) == cut.text


def test_an_answer_that_is_not_complete_has_no_completion(tiny_client: Client) -> None:
    with tiny_client.generate("a b", stream=True, max_new_tokens=4) as stream:
        next(stream)
        with pytest.raises(SessionClosed):
            _ = stream.completion


# --- sampling -----------------------------------------------------------------------------------


def test_a_seed_makes_an_answer_repeatable(tiny_client: Client) -> None:
    def ids(**options: Any) -> tuple[int, ...]:
        options = {"temperature": 1.0, "max_new_tokens": 16, **options}
        return tiny_client.generate("one two three", **options).ids

    assert ids(seed=1) == ids(seed=1)
    assert ids(seed=1) != ids(seed=2)
    assert ids() != ids()  # no seed means a fresh one


def test_filters_that_leave_one_token_are_greedy(tiny_client: Client) -> None:
    def ids(**options: Any) -> tuple[int, ...]:
        return tiny_client.generate("one two three", max_new_tokens=16, **options).ids

    greedy = ids()
    assert ids(temperature=3.0, top_k=1) == greedy
    assert ids(temperature=3.0, top_p=1e-9) == greedy
    assert ids(temperature=3.0, min_p=1.0) == greedy
    assert ids(temperature=3.0, seed=3) != greedy


# --- the client chooses -------------------------------------------------------------------------


def test_logits_by_default_follow_the_greedy_answer(client: Client) -> None:
    greedy = client.generate(chat(QUESTIONS[0]), max_new_tokens=6).ids
    rows = list(client.logits(chat(QUESTIONS[0]), max_new_tokens=6))
    assert tuple(int(row.argmax()) for row in rows) == greedy
    assert rows[0].shape == (client.spec.vocabulary,)


def test_a_token_that_is_sent_is_the_one_that_counts(client: Client, plain: Plain) -> None:
    ids = plain.tokenizer("The capital of")["input_ids"]
    spain = plain.tokenizer(" Spain")["input_ids"][0]
    source = client.logits(ids, max_new_tokens=3)
    next(source)
    after = source.send(spain)
    source.close()
    with torch.inference_mode():
        expected = plain.model(torch.tensor([[*ids, spain]])).logits[0, -1]
    assert int(after.argmax()) == int(expected.argmax())
    assert torch.allclose(torch.tensor(after), expected, atol=2e-3)


def test_generate_of_the_package_knows_both_loops(swarm: LocalSwarm) -> None:
    options: dict[str, Any] = {"bootstrap": swarm.bootstrap, "home": swarm.home / "package"}
    whole = hexswarm.generate("The capital of France is", max_new_tokens=4, **options)
    pieces = hexswarm.generate("The capital of France is", max_new_tokens=4, stream=True, **options)
    assert "".join(pieces) == str(whole)
    rows = hexswarm.generate("The capital of France is", max_new_tokens=4, loop="client", **options)
    assert tuple(int(row.argmax()) for row in rows) == whole.ids
    with pytest.raises(UsageError):
        hexswarm.generate("x", loop="square", **options)


# --- many at once -------------------------------------------------------------------------------


def test_eight_threads_get_the_answers_that_each_gets_alone(client: Client) -> None:
    prompts = [chat(f"{question} {n}") for n in (1, 2) for question in QUESTIONS]
    alone = [client.generate(prompt, max_new_tokens=8).ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = pool.map(lambda prompt: client.generate(prompt, max_new_tokens=8).ids, prompts)
        assert list(together) == alone


def test_eight_tasks_get_the_answers_that_each_gets_alone(tiny_swarm: LocalSwarm) -> None:
    async def main() -> None:
        async with AsyncClient(
            tiny_swarm.bootstrap, model=tiny_swarm.model, home=tiny_swarm.home / "async"
        ) as client:
            prompts = [f"number {n} of eight" * (n + 1) for n in range(8)]
            options = {"max_new_tokens": 24, "temperature": 0.8, "seed": 11}
            alone = [(await client.generate(prompt, **options)).ids for prompt in prompts]
            together = await asyncio.gather(*(client.generate(p, **options) for p in prompts))
            assert [answer.ids for answer in together] == alone

    asyncio.run(main())


# --- conversations ------------------------------------------------------------------------------


def test_a_conversation_reuses_its_kv_and_answers_like_a_fresh_session(client: Client) -> None:
    messages: list[dict[str, str]] = []
    reused = []
    with client.conversation() as talk:
        for text in ("My name is Ada. Say hello.", "What is my name?", "Spell it backwards."):
            messages.append({"role": "user", "content": text})
            answer = talk.generate(messages, max_new_tokens=16)
            fresh = client.generate(messages, max_new_tokens=16)
            assert answer.ids == fresh.ids
            assert fresh.reused_tokens % BLOCK_TOKENS == 0  # what sessions share are whole blocks
            reused.append(answer.reused_tokens)
            messages.append({"role": "assistant", "content": answer.text})
    assert reused[0] % BLOCK_TOKENS == 0  # the template's beginning may have been said before
    assert reused[0] < reused[1] < reused[2]


def test_a_conversation_may_change_its_past(tiny_client: Client) -> None:
    with tiny_client.conversation() as talk:
        talk.generate([10, 11, 12, 13, 14, 15], max_new_tokens=4)
        changed = talk.generate([10, 11, 12, 99, 14, 15, 16], max_new_tokens=4)
        assert changed.reused_tokens == 3
    assert changed.ids == tiny_client.generate([10, 11, 12, 99, 14, 15, 16], max_new_tokens=4).ids


def test_a_conversation_goes_on_after_a_turn_that_was_broken_off(tiny_client: Client) -> None:
    with tiny_client.conversation() as talk:
        with talk.generate([10, 11, 12], stream=True, max_new_tokens=200) as stream:
            next(stream)
        again = talk.generate([10, 11, 12, 13], max_new_tokens=8)
        assert again.reused_tokens == 3
    assert again.ids == tiny_client.generate([10, 11, 12, 13], max_new_tokens=8).ids


def test_a_busy_conversation_says_so(tiny_client: Client) -> None:
    with tiny_client.conversation() as talk:
        with talk.generate([10, 11, 12], stream=True, max_new_tokens=200) as stream:
            next(stream)
            with pytest.raises(SessionClosed, match="busy"):
                talk.generate([10, 11, 12, 13], max_new_tokens=8)
        assert talk.generate([10, 11, 12, 13], max_new_tokens=8).ids


# --- who leaves early frees the peers -----------------------------------------------------------


@pytest.fixture
def room(tiny_client: Client) -> Iterator[Client]:
    """A client that has the tiny swarm for itself, before and after.

    A peer that announced while its pool was in use says so for five seconds at least.
    """
    until(lambda: whole_pool_is_free(tiny_client, POOL), 20, "all KV is free before the test")
    until(lambda: pool_is_announced_free(tiny_client, POOL), 20, "all peers say so")
    yield tiny_client
    until(lambda: whole_pool_is_free(tiny_client, POOL), 20, "all KV is free after the test")


def begun(client: Client) -> Stream:
    """A long answer of which a piece has come."""

    def begin() -> Stream:
        stream = client.generate([10, 11], stream=True, max_new_tokens=2000)
        next(stream)
        return stream

    return patient(begin)


def test_breaking_out_of_a_stream_frees_the_peers(room: Client) -> None:
    stream = begun(room)
    stream.close()
    for _ in begun(room):
        break
    stream = begun(room)
    del stream


def test_an_abandoned_logits_loop_frees_the_peers(room: Client) -> None:
    def begin() -> Any:
        source = room.logits([10, 11], max_new_tokens=2000)
        next(source)
        return source

    source = patient(begin)
    source.close()


def test_cancelling_a_task_frees_the_peers(room: Client, tiny_swarm: LocalSwarm) -> None:
    async def main() -> None:
        async with AsyncClient(
            tiny_swarm.bootstrap, model=tiny_swarm.model, home=tiny_swarm.home / "cancel"
        ) as client:
            first = asyncio.Event()

            async def read() -> None:
                async for _ in client.stream([10, 11], max_new_tokens=3000):
                    first.set()

            task = asyncio.create_task(read())
            async with asyncio.timeout(30):
                await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            whole = asyncio.create_task(client.generate([10, 11], max_new_tokens=3000))
            await asyncio.sleep(0)  # it has begun
            whole.cancel()
            await asyncio.gather(whole, return_exceptions=True)
            # The same links and peers go on to serve.
            assert (await client.generate([10, 11], max_new_tokens=4)).ids

    asyncio.run(main())


def test_closing_a_client_frees_the_peers_and_ends_its_requests(
    room: Client, tiny_swarm: LocalSwarm
) -> None:
    client = tiny_swarm.client("closing")
    stream = begun(client)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            for _ in stream:
                continue
        except BaseException as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    client.close()
    reader.join(10)
    assert not reader.is_alive()
    assert isinstance(failed[0], SessionClosed), failed
    with pytest.raises(SessionClosed):
        client.generate([10, 11])
