"""Honest sessions on real stages in memory, amid hostile frames: what the fuzzer must not harm.

Three stages, an honest client, a guest who has a session of his own, and strangers. Hostile frames
are said to the stages under names of sessions that are not the speaker's; afterwards the honest
client asks something and the answer is compared with the exact one. The stages are those of
`tests/loopback.py`.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from fuzz_mutations import mutate_tree
from fuzz_targets import HEADERS, Call

from hexswarm.errors import RemoteProtocolError
from hexswarm.messages import Message, Open, decode
from hexswarm.records import PeerId


def _loopback() -> ModuleType:
    """The test double, by its path: with the root on the path our `kernels/` would hide another."""
    name = "fuzz_loopback"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "tests" / "loopback.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


double = _loopback()

STRANGERS = tuple(map(PeerId, ("stranger", "other", "p1", "p9")))
"""Who says hostile things: p1 is a stage of the honest session."""


class Harmed(Exception):
    """An honest session is not what it would have been."""


class Control:
    """Real stages with an honest client's session and a stranger's, all in memory."""

    def __init__(self, seed: int) -> None:
        self.swarm = double.Loopback((0, 2), (2, 4), (4, 6), blocks=64)
        self.rng = random.Random(seed)
        self.session, self.told = self.swarm.opened(64)
        self.guest, _ = self.swarm.open(32, who=PeerId("other"))
        self.swarm.run()
        self.talk: list[int] = [3]

    def make(self, rng: random.Random) -> tuple[Call, bytes]:
        """A hostile frame for one of the stages."""
        header = (
            mutate_tree(rng.choice(HEADERS), rng) if rng.random() < 0.7 else rng.choice(HEADERS)
        )
        payload = rng.randbytes(rng.choice((0, 4, 8, 3, 64)))
        who, host = rng.choice(STRANGERS), rng.choice(sorted(self.swarm.hosts))
        key = rng.choice((self.session.key, self.session.key, self.guest.key, rng.randbytes(16)))
        return (lambda: self._say(who, host, header, payload, key)), header

    def _say(self, who: PeerId, host: PeerId, header: bytes, payload: bytes, key: bytes) -> bool:
        try:
            message = decode(header)
        except RemoteProtocolError:
            return False
        if hasattr(message, "session"):
            message = replace(message, session=key)  # type: ignore[call-arg]
        if isinstance(message, Open):
            message = replace(message, digest=double.MODEL)
        if who == host or (who == "p1" and self._could_be_right(message)):
            return False
        self.swarm.say(who, host, message, payload)
        return True

    def _could_be_right(self, message: Message) -> bool:
        """What a stage of the session may say to its neighbours: then it is itself who lies."""
        return getattr(message, "session", None) == self.session.key

    def look(self) -> None:
        """Have the honest client say something; raise Harmed if the answer is not exact."""
        swarm = self.swarm
        swarm.ask(self.session, self.talk, 4)
        swarm.run(self.rng)
        expected = double.answer(self.talk, 4, 6)
        if self.told.error is not None or self.told.tokens != expected:
            raise Harmed(f"{self.told.tokens} instead of {expected} ({self.told.error})")
        self.talk = [*self.talk, *expected[:3]][-20:]
        for host in swarm.hosts.values():
            tables = host.ledger.tables
            leased = sum(len(tables.blocks(key)) for key in tables.sessions)
            if host.kv_in_use != leased or len(tables.sessions) != len(host.table):
                raise Harmed("KV in use is not that of the sessions")
