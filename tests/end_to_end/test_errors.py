"""Bad input and bad luck: one line for the person, a typed error in Python, and nothing lost.

The mistakes at the command line are made all at once, two at a time, by one fixture; each test
looks at one of them. The swarm of this module has a hole (layers 2-3 of the tiny model) that some
tests fill and then tear open again.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from hexswarm.blocking import Client
from hexswarm.config import ClientConfig
from hexswarm.demo import Process
from hexswarm.directory import INDEX, directory_key
from hexswarm.errors import (
    BootstrapUnreachable,
    ContextTooLong,
    HexswarmError,
    NoRoute,
    PeerLost,
    Refused,
    UnknownModel,
    UsageError,
)
from hexswarm.manifest import HashCache, write_manifest
from tests import tiny
from tests.end_to_end.conftest import POOL
from tests.end_to_end.swarm import (
    NOBODY,
    TINY_CONTEXT,
    LivingSwarm,
    LocalSwarm,
    all_of,
    complaint,
    damaged,
    hexswarm,
    patient,
    refresh,
    until,
)

pytestmark = pytest.mark.end_to_end

PATIENCE_S = 10.0
"""Within which the loss of a peer is told."""
MIDDLE_POOL = 1024
VOWELS = list("aeiou")
"""Stop strings that end any answer soon, although the session has room for a long one."""


@pytest.fixture(scope="module")
def holed(tiny_model: Path) -> Iterator[LivingSwarm]:
    """The tiny model without its middle; the ends have more room than a middle will have."""
    extra = ("--kv-tokens", str(POOL))
    with LivingSwarm(("0:2", "4:6"), model=str(tiny_model), extra=extra) as local:
        yield local


# --- mistakes at the command line ---------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """What somebody does wrong; `says` are parts of the one line that answers."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    status: int = 1


Make = Callable[[LivingSwarm, Path, Path], Mistake]
MISTAKES: dict[str, Make] = {}


def mistake(make: Make) -> Make:
    MISTAKES[make.__name__] = make
    return make


def peer(model: Path | str, home: Path, *more: str) -> tuple[str, ...]:
    return ("peer", "--model", str(model), "--home", str(home), "--kv-tokens", "64", *more)


@mistake
def span_that_is_no_span(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(peer(model, home, "--span", "ten"), ("'ten'", "write FIRST:END"), 2)


@mistake
def span_of_nothing(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(peer(model, home, "--span", "5:2"), ("span 5:2 is empty or negative",), 2)


@mistake
def span_beyond_the_model(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    words = peer(model, home, "--span", "4:7")
    return Mistake(words, ("4:7 reaches beyond the model's 6 layers", "inside 0:6"), 2)


@mistake
def unknown_flag(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(("status", "--colour"), ("--colour", "see hexswarm"), 2)


@mistake
def unknown_folder(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(peer("./nothing-here", home), ("no folder or file './nothing-here'",))


@mistake
def port_in_use(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    port = swarm.bootstrap[0].split("/")[4]
    words = ("bootstrap", "--port", port, "--home", str(home))
    return Mistake(words, (f"port {port} is in use", "choose another with --port"))


@mistake
def port_out_of_range(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(peer(model, home, "--port", "70000"), ("port 70000 is outside",), 2)


@mistake
def identity_in_use(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    key = swarm.home / "peer-0" / "identity" / "peer.key"
    return Mistake(peer(model, home, "--identity", str(key)), ("in use by another process",), 2)


@mistake
def unreachable_bootstrap(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    words = peer(model, home, "--bootstrap", NOBODY)
    return Mistake(words, ("none of the 1 bootstrap address(es) answered", "check the address"))


@mistake
def malformed_bootstrap(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    words = ("status", "--model", str(model), "--bootstrap", "127.0.0.1:31337")
    return Mistake(words, ("'127.0.0.1:31337' is not the address of a node", "it looks like"), 2)


@mistake
def too_much_kv(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    words = peer(model, home, "--kv-tokens", "9000000000", "--span", "0:2")
    return Mistake(words, ("no room for", "GB of KV", "lower"))


@mistake
def pickled_weights(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    folder = damaged(model, home / "pickled")
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return Mistake(peer(folder, home), ("pickles, which can run code", "safetensors"))


@mistake
def corrupt_weights(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    """One bit of a file whose hash is known."""
    folder = damaged(model, home / "corrupt")
    files = sorted(folder.glob("*.safetensors"))
    cache = HashCache(home)
    write_manifest(folder, {path.name: cache.identify(path) for path in files})
    data = bytearray(files[-1].read_bytes())
    data[-100] ^= 1
    files[-1].write_bytes(data)
    return Mistake(peer(folder, home, "--span", "0:6"), (files[-1].name, "expected SHA-256"))


@mistake
def truncated_weights(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    folder = damaged(model, home / "truncated")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    return Mistake(peer(folder, home, "--span", "0:6"), (last.name, "it is truncated"))


@mistake
def truncated_gguf(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    path = tiny.save_gguf(home / "tiny.gguf", tiny.model("llama"))
    path.write_bytes(path.read_bytes()[:-1000])
    return Mistake(peer(path, home), ("tiny.gguf", "truncated"))


@mistake
def missing_layers(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    words = ("generate", "Hi", "--bootstrap", swarm.bootstrap[0], "--home", str(home))
    says = ("no peer serves layers 2-3 of tiny", "hexswarm peer --span 2:4")
    return Mistake((*words, "--model", str(model)), says)


@mistake
def sampling_out_of_range(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(("generate", "Hi", "--top-p", "1.5"), ("top_p", "1.5"), 2)


@mistake
def sampling_that_is_no_number(swarm: LivingSwarm, model: Path, home: Path) -> Mistake:
    return Mistake(("generate", "Hi", "--temperature", "hot"), ("--temperature", "'hot'"), 2)


@pytest.fixture(scope="module")
def answers(
    holed: LivingSwarm, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Mistake, Any]]:
    made = {
        name: make(holed, tiny_model, tmp_path_factory.mktemp(name))
        for name, make in MISTAKES.items()
    }
    calls = {name: lambda words=it.words: hexswarm(*words) for name, it in made.items()}
    done = all_of({**calls, "status": lambda: holed.hexswarm("status")})
    return {name: (made.get(name, Mistake((), ())), done[name]) for name in done}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_clear_line(answers: dict[str, tuple[Mistake, Any]], name: str) -> None:
    made, done = answers[name]
    line = complaint(done)
    for text in made.says:
        assert text in line
    assert done.returncode == made.status
    assert done.stdout == ""


def test_a_hole_is_seen_in_the_status(answers: dict[str, tuple[Mistake, Any]]) -> None:
    _, done = answers["status"]
    assert (done.returncode, done.stderr) == (1, "")
    assert "no peer serves layers 2-3: the model cannot answer" in done.stdout


# --- the same in Python -------------------------------------------------------------------------


def test_errors_of_joining_have_types(holed: LivingSwarm, tmp_path: Path) -> None:
    model = holed.model
    with pytest.raises(UnknownModel):
        Client(holed.bootstrap, model="./nothing-here", home=tmp_path).start()
    with pytest.raises(BootstrapUnreachable):
        Client([NOBODY], model=model, home=tmp_path).start()
    with pytest.raises(UsageError, match="is not the address of a node"):
        Client(["127.0.0.1:1"], model=model, home=tmp_path).start()
    with pytest.raises(UsageError, match="no bootstrap address is known"):
        Client([], model=model, home=tmp_path).start()
    with pytest.raises(UsageError, match="not one text"):
        Client(NOBODY, model=model, home=tmp_path)


def test_missing_layers_are_named(holed: LivingSwarm) -> None:
    with holed.client("missing") as client:
        with pytest.raises(NoRoute, match="no peer serves layers 2-3 of tiny") as caught:
            client.generate("Hi")
        assert caught.value.missing == ((2, 4),)
        assert {str(item.span) for item in refresh(client)} == {"0:2", "4:6"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
        {"seed": 1 << 64},
        {"max_new_tokens": 0},
        {"max_new_tokens": -5},
        {"max_new_tokens": 2.5},
        {"top_k": 1.5},
        {"seed": "x"},
        {"stop": 5},
        {"stop": ""},
        {"stop": ["a", ""]},
    ],
    ids=str,
)
def test_values_out_of_range(tiny_client: Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        tiny_client.generate("Hi", **wrong)


@pytest.mark.parametrize("tokens", [0, -1, 2.5])
def test_logits_check_how_many_too(tiny_client: Client, tokens: Any) -> None:
    with pytest.raises(UsageError):
        next(tiny_client.logits("Hi", tokens))


@pytest.mark.parametrize("prompt", ["", [], [{"role": "user"}], [-1], [49152], [{"a": "b"}], [1.5]])
def test_prompts_that_are_none(tiny_client: Client, prompt: Any) -> None:
    with pytest.raises(UsageError):
        tiny_client.generate(prompt)


def test_a_prompt_longer_than_the_context(tiny_client: Client) -> None:
    with pytest.raises(ContextTooLong) as caught:
        tiny_client.generate([7] * (TINY_CONTEXT - 3), max_new_tokens=4)
    error = caught.value
    assert (error.prompt_tokens, error.new_tokens) == (TINY_CONTEXT - 3, 4)
    assert error.limit == TINY_CONTEXT
    assert error.exit_status == 2
    # One token less fits, to the last position.
    answer = patient(lambda: tiny_client.generate([7] * (TINY_CONTEXT - 4), max_new_tokens=4))
    assert len(answer.ids) == 4


# --- strangers ----------------------------------------------------------------------------------


def test_a_foreign_record_is_refused_and_hides_nobody(tiny_client: Client) -> None:
    member = tiny_client._client._member
    node, digest = member.dht._node, tiny_client.spec.digest
    expires_s = time.time() + 60

    async def store() -> list[bool]:
        return [
            bool(await node.store(directory_key(key, 0, 1), value, expires_s, subkey=subkey))
            for key in (digest, INDEX)
            for value in (b"junk", {"peer": "x"}, [[[[[[[[[[]]]]]]]]]])
            for subkey in (str(member.transport.local), "x", None)
        ]

    assert not any(tiny_client._wait(store()))
    assert len(refresh(tiny_client)) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 4096,
        (1 << 31).to_bytes(4, "big") * 4,
        msgpack.packb({"a": 1}) * 100,
    ],
    ids=["http", "ones", "big", "msgpack"],
)
def test_a_stream_of_nonsense_is_hung_up_on(tiny_client: Client, data: bytes) -> None:
    """Frames that lie about their size included; whoever sends them hurts nobody else."""
    transport = tiny_client._client._member.transport
    announcement = refresh(tiny_client)[0]

    async def talk() -> bytes:
        stream = await transport.dial(announcement.peer, announcement.addresses)
        try:
            stream.write([data])
            async with asyncio.timeout(15):
                return await stream.read(1 << 16)
        finally:
            stream.close()

    assert tiny_client._wait(talk()) == b""
    # The prompt that filled the pool before may be in the directory for a few seconds more.
    assert patient(lambda: tiny_client.generate([5, 6], max_new_tokens=3)).ids


# --- peers that vanish, hang and refuse ---------------------------------------------------------


@pytest.fixture
def middles(holed: LivingSwarm) -> Iterator[list[Process]]:
    """Two living peers for the hole."""
    ends = holed.peers[:2]
    living = [node for node in holed.peers[2:] if node.process.poll() is None]
    fresh = [
        holed.spawn_peer("2:4", "--kv-tokens", str(MIDDLE_POOL)) for _ in range(2 - len(living))
    ]
    for node in fresh:
        node.wait_for("address", 60)
    yield [*living, *fresh]
    for node in holed.peers:
        node.send(signal.SIGCONT)
    assert all(node.process.poll() is None for node in ends)


@pytest.fixture(scope="module")
def filled(holed: LivingSwarm) -> Iterator[Client]:
    """A client of the swarm whose hole is filled; what it cannot have now it does not wait for."""
    config = ClientConfig(
        tuple(holed.bootstrap), holed.home / "filled", model=holed.model, patience_s=0
    )
    with Client(config=config) as client:
        yield client


def covered(client: Client, middles: int) -> None:
    """Wait until the client knows so many peers for layers 2-3."""

    def known() -> bool:
        serving = [item for item in refresh(client) if item.serving]
        return sum(item.span.first == 2 for item in serving) >= middles

    until(known, 30, f"{middles} peers serve layers 2-3")


def test_a_full_peer_is_passed_over_and_full_peers_refuse(
    holed: LivingSwarm, filled: Client, middles: list[Process]
) -> None:
    covered(filled, 2)
    room = MIDDLE_POOL - 100  # more than half of a middle's pool
    with filled.conversation() as one, filled.conversation() as two:
        first = one.generate([5, 6], max_new_tokens=room, stop=VOWELS)
        second = two.generate([5, 6], max_new_tokens=room, stop=VOWELS)
        assert first.route.stages[1].peer != second.route.stages[1].peer
        with pytest.raises((Refused, NoRoute), match="full"):
            filled.generate([5, 6], max_new_tokens=room)
    answer = patient(lambda: filled.generate([5, 6], max_new_tokens=room, stop=VOWELS))
    assert answer.ids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_peer_that_vanishes_is_named_and_replaced_within_ten_seconds(
    holed: LivingSwarm, filled: Client, middles: list[Process], number: signal.Signals
) -> None:
    """And the next request goes by the replica."""
    covered(filled, 2)
    with filled.conversation() as talk:
        first = patient(lambda: talk.generate([5, 6], max_new_tokens=2))
        victim = first.route.stages[1].peer
        stream = patient(lambda: _begun(talk, MIDDLE_POOL - 100))
        process = holed.peer_of(victim)
        process.send(number)
        list(stream)
        (repair,) = stream.completion.mends
        assert [(place.peer, str(place.span)) for place in repair.lost] == [(victim, "2:4")]
        assert repair.stall_s < PATIENCE_S
        assert len(stream.completion.ids) == MIDDLE_POOL - 100
    again = patient(lambda: filled.generate([5, 6], max_new_tokens=4))
    assert again.route.stages[1].peer != victim
    assert again.ids[:2] == first.ids

    # Somebody who has not met it yet tries it, and does without it, too.
    home = holed.home / f"newcomer-{number.name}"
    config = ClientConfig(tuple(holed.bootstrap), home, model=holed.model, connect_s=2)
    with Client(config=config) as newcomer:
        began_s = time.monotonic()
        answer = patient(lambda: newcomer.generate([5, 6], max_new_tokens=4))
        assert answer.ids == again.ids
        assert time.monotonic() - began_s < PATIENCE_S
    process.end(signal.SIGKILL)


def _begun(talk: Any, tokens: int) -> Any:
    stream = talk.generate([5, 6, 7], stream=True, max_new_tokens=tokens)
    next(stream)
    return stream


def test_the_last_of_its_layers_gone_is_said(
    holed: LivingSwarm, filled: Client, middles: list[Process]
) -> None:
    covered(filled, 2)
    for node in middles:
        node.end(signal.SIGKILL)
    began_s = time.monotonic()
    with pytest.raises((PeerLost, NoRoute)):
        filled.generate([5, 6], max_new_tokens=4)
    with pytest.raises((PeerLost, NoRoute)):
        filled.generate([5, 6], max_new_tokens=4)
    assert time.monotonic() - began_s < 2 * PATIENCE_S


def test_errors_are_ours(tiny_swarm: LocalSwarm) -> None:
    """A request after the client was closed, not some asyncio error."""
    client = tiny_swarm.client("closed")
    client.start()
    client.close()
    client.close()
    with pytest.raises(HexswarmError):
        client.generate("Hi")
    with pytest.raises(HexswarmError):
        client.snapshot()
