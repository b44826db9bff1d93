"""What a serving system decides, apart from the world in which it is tried.

A *policy* says which units a request visits, and how machines execute: the rest (links, step times,
KV, arrivals, deaths) is the same world for everybody, so that only decisions are compared. Ours is
`ours.py`, those of others are the files `rival_*.py`.

The world asks `route` when a request arrives, and again (`View.refused` tells who said no) when a
stage refused it. None means that nobody is to be asked now: the request waits at its client and
asks again after `Execution.retry_s`, or, where one coordinator decides for all, as soon as any
request ends. A unit that a policy names must hold the layers it is asked for; the world checks.

What a policy learns is what its clients could learn: announcements, as stale as the directory
(`View.announced`), the loads that stages told when they were asked (`opened`, `refused`), the ends
of its own requests, deaths that were noticed, and, for systems whose workers report to a scheduler,
every batch (`computed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from hexswarm.records import Announcement, Load, Span


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its answer, the lengths of both known to the world alone in advance."""

    id: int
    arrives_s: float
    input_tokens: int
    output_tokens: int
    client: str
    """Where it comes from: the coordinator, or the machine beside which its user sits."""

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Visit:
    """One stage of a route."""

    unit: int
    """By its place in the plan."""
    span: Span
    """Perhaps less than the unit holds."""
    step_s: float = 0.0
    """What the stage shall promise for a decode step; 0: nothing."""


Visits = tuple[Visit, ...]


@dataclass(frozen=True, slots=True)
class Execution:
    """How machines and data plane of a system work."""

    chunked: bool = True
    """Prompts are cut and go beside decodes as `hexswarm.peer.scheduler` does it; else whole
    prompts share batches with all decode rows (`whole.py`)."""
    ring: bool = True
    """The tail sends its token to the head; else over the client, which is the coordinator."""
    lanes: bool = True
    """A token does not wait on a link behind prompts: they have streams of their own. Else every
    link is first come, first served."""
    opens: bool = True
    """Stages are opened, which takes a round trip before the prompt may leave; else a prompt just
    comes."""
    central: bool = False
    """One coordinator decides for all and hears of every end: who waits is tried then."""
    retry_s: float = 1.0
    """A client whose request was refused everywhere asks again after this."""


@dataclass(frozen=True, slots=True)
class View:
    """What a client sees at the moment of a choice."""

    announced: tuple[Announcement | None, ...]
    """Of each unit the last word in the directory when the client last read it; None: there is
    none, it idles, or the word expired."""
    reading: tuple[str, int]
    """Client and number of the reading: equal readings are equal words."""
    refused: frozenset[int] = frozenset()
    """Units that refused this request a moment ago."""


@dataclass(frozen=True, slots=True)
class Computed:
    """One batch of one unit."""

    unit: int
    decode_rows: int
    prompt_tokens: int
    elapsed_s: float
    waiting: int
    """Steps that wait there when it ends."""


class Policy(Protocol):
    """How requests are routed; all times are virtual seconds."""

    @property
    def name(self) -> str: ...

    @property
    def execution(self) -> Execution: ...

    def route(self, now: float, request: Request, view: View) -> Visits | None:
        """The stages in order, which cover all layers once; None: wait."""

    def repair(
        self,
        now: float,
        request: Request,
        visits: Visits,
        dead: frozenset[int],
        known: int,
        view: View,
    ) -> Visits | None:
        """The route of a session that lost units and has `known` tokens to replay, with all
        visits before and behind the hole as they were; None: begin anew with `route`."""

    def opened(
        self, now: float, request: Request, visits: Visits, loads: Mapping[int, Load]
    ) -> None:
        """All stages took the request, and told their loads."""

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        """Some stages refused; those that answered told their loads."""

    def ended(self, now: float, request: Request, visits: Visits) -> None:
        """The request has its last token, or left the route."""

    def lost(self, now: float, unit: int) -> None:
        """Somebody noticed that a unit is dead."""

    def computed(self, now: float, work: Computed) -> None:
        """A batch ended."""


class Plain:
    """What a policy is that begins lost requests anew and learns nothing from feedback."""

    name = "plain"
    execution = Execution()

    def repair(
        self,
        now: float,
        request: Request,
        visits: Visits,
        dead: frozenset[int],
        known: int,
        view: View,
    ) -> Visits | None:
        return None

    def opened(
        self, now: float, request: Request, visits: Visits, loads: Mapping[int, Load]
    ) -> None:
        pass

    def refused(
        self, now: float, request: Request, refusing: frozenset[int], loads: Mapping[int, Load]
    ) -> None:
        pass

    def ended(self, now: float, request: Request, visits: Visits) -> None:
        pass

    def lost(self, now: float, unit: int) -> None:
        pass

    def computed(self, now: float, work: Computed) -> None:
        pass
