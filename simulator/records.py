"""What the world keeps of requests and sessions, and how it is set up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from hexswarm.errors import UsageError
from hexswarm.peer.scheduler import Policy as Scheduling
from hexswarm.peer.steps import SessionKey
from hexswarm.records import Span
from hexswarm.simulator.policy import Request, Visits

Item = tuple[SessionKey, int, int, bool, int]
"""What a message brings a stage: session, first position, tokens, whether a prompt or a step ends
with it, epoch of the session's route."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The world's constants; the policy's are its own."""

    announce_s: tuple[float, float] = (5.0, 30.0)
    """A peer announces again after a time drawn from this."""
    spread_s: float = 0.5
    """Until a word is in the directory."""
    refresh_s: float = 10.0
    """A client reads the directory this often."""
    expire_s: float = 90.0
    """Age at which a word is gone."""
    attempts: int = 6
    """Routes that a client tries before it waits."""
    detect_s: float = 1.0
    """Until a session notices that a stage of it is dead."""
    unreachable_s: float = 1.0
    """Lost on an attempt to open a dead stage."""
    patience_s: float = math.inf
    """A client gives up when its request could not even begin for so long."""
    handle_s: float = 0.0
    """Between a stage and the line, for each message: framing, threads, wake-ups. Of no concern
    beside the links of a cluster file; a ring on one machine knows it (`benchmarks/reality.py`)."""
    kv_share: float = 1.0
    """Of the profile's KV tokens that may be leased."""
    scheduling: Callable[[Scheduling], Scheduling] = field(default=lambda usual: usual)
    """Changes how peers compose batches; `scheduler.Policy` in, `scheduler.Policy` out."""

    def __post_init__(self) -> None:
        if not 0 < self.announce_s[0] <= self.announce_s[1] or self.refresh_s <= 0:
            raise UsageError("announcements and readings are apart by a positive time")
        if self.attempts < 1 or not 0 < self.kv_share <= 1:
            raise UsageError("there is at least one attempt, and 0 < kv_share <= 1")
        if min(self.detect_s, self.unreachable_s, self.spread_s, self.handle_s) < 0:
            raise UsageError("delays are not negative")


@dataclass(slots=True)
class Life:
    """One request from its arrival to its end, whatever routes it had."""

    request: Request
    begun_s: float = math.nan
    """When a route first took it."""
    first_s: float = math.nan
    """When its client had the first token."""
    last_s: float = math.nan
    """When its client had the newest token."""
    tokens: int = 0
    """That its client has."""
    ended_s: float = math.nan
    gave_up: bool = False
    refusals: int = 0
    repairs: int = 0
    """Routes mended or begun anew."""
    stages: int = 0
    """Of its first route."""

    @property
    def done(self) -> bool:
        return self.tokens == self.request.output_tokens

    def heard(self, now: float) -> float | None:
        """One more token; seconds since the one before, if there was one."""
        gap_s = now - self.last_s if self.tokens else None
        if not self.tokens:
            self.first_s = now
        self.last_s = now
        self.tokens += 1
        return gap_s


@dataclass(slots=True)
class Session:
    """A request on one route."""

    key: SessionKey
    life: Life
    request: Request
    """As the route was opened for it: of a request begun anew, the prompt has its tokens."""
    visits: Visits
    spans: tuple[Span | None, ...]
    """Of each stage; None: all that the unit holds."""
    stage_of: dict[int, int]
    """Place in the route of each unit."""
    made: int = 0
    """Tokens sampled on this route."""
    epoch: int = 0
    replay_to: int = -1
    """The last stage that is being filled with replayed tokens; -1: none."""
    lost: set[int] = field(default_factory=set)
    """Units of it that died, and were not replaced yet."""
    empty: set[int] = field(default_factory=set)
    """Units that came in for such, and lack the tokens that are known."""

    @property
    def known(self) -> int:
        """Tokens whose KV every stage holds, once a token was sampled."""
        return self.request.input_tokens + self.made - 1
