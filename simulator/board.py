"""The directory: what units announced, and how old it is when a client reads it.

Units announce when they come up and then again and again after a time drawn at random; a word is in
the directory `spread_s` later and gone when it is `expire_s` old. A client reads all of it every
`refresh_s`, each client at a moment of its own, and chooses by what it read. So what a choice knows
of a unit that it never talked to is up to announcement period + reading period old.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right

from hexswarm.peer.cache import BLOCK_TOKENS
from hexswarm.records import Announcement, PeerId
from hexswarm.router.placement.cluster import Model
from hexswarm.simulator.policy import View
from hexswarm.simulator.records import Settings
from hexswarm.simulator.stage import Stage

_PREFIX = "unit"


def peer_of(unit: int) -> PeerId:
    """The name under which a unit announces itself; in order of units."""
    return PeerId(f"{_PREFIX}{unit:06d}")


def unit_of(peer: PeerId) -> int:
    """The reverse of `peer_of`."""
    return int(peer[len(_PREFIX) :])


class Board:
    """All words ever said, by unit."""

    def __init__(self, units: int, model: Model, settings: Settings, rng: random.Random) -> None:
        self._model, self._settings, self._rng = model, settings, rng
        self._words: list[list[tuple[float, Announcement]]] = [[] for _ in range(units)]
        """(when it is in the directory, word)."""
        self._phases: dict[str, float] = {}
        self._views: dict[str, View] = {}

    def announce(self, stage: Stage, now: float, *, at_once: bool = False) -> float:
        """A unit says how it is; when it will again. `at_once`: it said so long ago."""
        told = self._words[stage.number]
        since_s = -math.inf if at_once else now + self._settings.spread_s
        told.append((since_s, self._word(stage, now, len(told))))
        return now + self._rng.uniform(*self._settings.announce_s)

    def first_s(self, now: float) -> float:
        """When a unit that is up already will announce again."""
        return now + self._rng.uniform(0.0, self._settings.announce_s[1])

    def view(self, client: str, now: float, refused: frozenset[int] = frozenset()) -> View:
        """What the client knows."""
        if client not in self._phases:
            self._phases[client] = self._rng.uniform(0.0, self._settings.refresh_s)
        phase, period = self._phases[client], self._settings.refresh_s
        number = math.floor((now - phase) / period)
        held = self._views.get(client)
        if held is None or held.reading[1] != number:
            words = tuple(self._read(unit, number * period + phase) for unit in self._units())
            held = self._views[client] = View(words, (client, number))
        return View(held.announced, held.reading, refused) if refused else held

    def _units(self) -> range:
        return range(len(self._words))

    def _read(self, unit: int, when: float) -> Announcement | None:
        told = self._words[unit]
        place = bisect_right(told, when, key=lambda entry: entry[0])
        if place == 0:
            return None
        word = told[place - 1][1]
        return word if when - word.issued_s <= self._settings.expire_s else None

    def _word(self, stage: Stage, now: float, sequence: int) -> Announcement:
        model, load = self._model, stage.load(now)
        return Announcement(
            peer=peer_of(stage.number),
            model=model.name,
            model_name=model.name,
            layers=model.layers,
            span=stage.span,
            state="online",
            dtype="bfloat16",
            device="cuda",
            speed=stage.speed,
            free_kv_tokens=load.free_kv_tokens,
            queue_s=load.queue_s,
            addresses=("/ip4/10.0.0.1/tcp/1",),
            issued_s=now,
            sequence=sequence,
            rows=load.rows,
            busy=load.busy,
            kv_tokens=stage.tables.total_blocks * BLOCK_TOKENS,
        )
