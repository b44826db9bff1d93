"""Nothing of anybody's text, and no key, in what processes log or write to disk.

A text that occurs nowhere else goes through a swarm as prompt, chat and answer, well and badly
formed; then everything that the processes said and wrote is searched for it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hexswarm.blocking import Client
from hexswarm.demo import Process
from hexswarm.errors import HexswarmError
from tests.end_to_end.swarm import LocalSwarm

pytestmark = pytest.mark.end_to_end

CANARY = "zyxcanarywvu"
PROMPT = f"My secret word is {CANARY}. Repeat it: {CANARY}"


class Talkative(LocalSwarm):
    """Its nodes say all that they ever say: what they say by default is a part of it."""

    def _spawn(self, name: str, words: Sequence[str]) -> Process:
        return super()._spawn(name, ["-vv", *words])


@pytest.fixture(scope="module")
def said(tiny_model: Path) -> Iterator[dict[str, bytes]]:
    """Whatever a swarm of two peers and its clients left, by name; secret keys apart."""
    extra = ("--kv-tokens", "1024")
    with Talkative(("0:3", "3:6"), model=str(tiny_model), extra=extra) as local:
        found: dict[str, bytes] = {}
        done = local.hexswarm("generate", PROMPT, "--max-new-tokens", "4")
        assert done.returncode == 0, done.stderr
        found["generate"] = done.stderr.encode()
        long = local.hexswarm("generate", PROMPT * 500)
        assert long.returncode == 2
        found["generate too long"] = long.stderr.encode()
        with local.client() as client:
            ids, answer = _use(client)
        for node in local.processes:
            assert node.process.poll() is None, node.log_text
        for path in sorted(local.home.rglob("*")):
            if path.is_file() and not path.name.endswith(".key"):
                found[str(path.relative_to(local.home))] = path.read_bytes()
        seeds = [path.read_bytes()[4:36] for path in local.home.rglob("*.key")]
        assert len(seeds) >= 3
        found["secret"] = b"\n".join(
            form
            for seed in seeds
            for form in (seed, seed.hex().encode(), base64.b64encode(seed), repr(seed).encode())
        )
        found["ids"] = ids
        found["answer"] = answer
        yield found


def _use(client: Client) -> tuple[bytes, bytes]:
    """Ask well and badly; the prompt's ids as a list is printed, and the answer's text."""
    answer = client.generate(PROMPT, max_new_tokens=8)
    client.generate([{"role": "user", "content": PROMPT}], max_new_tokens=2)
    for wrong in ([{"role": CANARY, "content": None}], PROMPT * 500, [1 << 30]):
        with pytest.raises((HexswarmError, TypeError)):
            client.generate(wrong, max_new_tokens=8)
    with pytest.raises(HexswarmError):
        client.generate(PROMPT, max_new_tokens=1 << 20)
    ids = client._client.tokenizer.encode_prompt(PROMPT)
    return ", ".join(map(str, ids[4:10])).encode(), answer.text.encode()


def test_no_prompt_no_answer_and_no_key_is_logged_or_kept(said: dict[str, bytes]) -> None:
    secrets, ids, answer = said.pop("secret").split(b"\n"), said.pop("ids"), said.pop("answer")
    assert any(name.endswith("stderr.log") for name in said)
    for name, text in said.items():
        assert CANARY.encode() not in text, name
        assert ids not in text, name
        assert ids.replace(b" ", b"") not in text, name
        if len(answer) > 8:
            assert answer not in text, name
        for secret in secrets:
            assert len(secret) < 16 or secret not in text, name
