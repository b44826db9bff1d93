"""Real peers know what a client has said before, compute only the rest, and say the same."""

from __future__ import annotations

import pytest

from hexswarm.blocking import Client
from tests.end_to_end.swarm import LocalSwarm

pytestmark = pytest.mark.end_to_end

SYSTEM = {
    "role": "system",
    "content": "You are a patient guide to a small museum of ships, maps and clocks. You answer in "
    "short sentences, you never invent dates, you name the room in which a thing stands, and if "
    "somebody asks for a thing that the museum does not have, you say so and name the nearest one.",
}


def ask(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_system_prompt_is_computed_once_and_a_talk_goes_on_in_a_new_session(
    swarm: LocalSwarm, client: Client
) -> None:
    talks = [[SYSTEM, ask("Where are the maps?")], [SYSTEM, ask("Is there a submarine?")]]
    with swarm.client() as other:  # its secret is another one: it finds nothing of the first's
        told = []
        for talk in talks:
            mine, theirs = (one.generate(talk, max_new_tokens=24) for one in (client, other))
            assert mine.ids == theirs.ids
            told.append(mine)
        found = [answer.reused_tokens for answer in told]
        assert found[0] == 0
        assert found[1] >= 64
        assert found[1] % 16 == 0
    going_on = [*talks[1], {"role": "assistant", "content": told[1].text}, ask("Which is nearest?")]
    with swarm.client() as other:
        other._client._runtime.secret = b""
        alone = other.generate(going_on, max_new_tokens=24)
    goes_on = client.generate(going_on, max_new_tokens=24)
    assert goes_on.reused_tokens > found[1]
    assert (goes_on.ids, alone.reused_tokens) == (alone.ids, 0)
