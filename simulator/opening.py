"""Stages are asked to take a session: all or none.

A stage refuses for want of KV, or because it could not promise the step time that is asked, or one
that it has promised already; a dead one does not answer. What was granted beside a refusal is given
back in the same breath (peers hold it for the length of a message; left out). Opening takes the
longest of the round trips from the client to a stage and from there to the next, over warm links;
an attempt on a dead stage costs `Settings.unreachable_s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from hexswarm.errors import UsageError
from hexswarm.records import Load, Span
from hexswarm.simulator.board import Board
from hexswarm.simulator.policy import Request, Visits
from hexswarm.simulator.records import Life, Session
from hexswarm.simulator.stage import Stage
from hexswarm.simulator.swarm import Swarm


class Opening:
    """Makes sessions, and asks stages to take them."""

    def __init__(self, swarm: Swarm, board: Board) -> None:
        self.swarm, self.board, self.policy = swarm, board, swarm.policy
        self._keys = count()

    def session(self, life: Life, request: Request, visits: Visits) -> Session:
        """A new one, which nobody has taken yet."""
        self.check(visits)
        key = next(self._keys).to_bytes(16, "big")
        return Session(key, life, request, visits, self.spans(visits), places(visits))

    def check(self, visits: Visits) -> None:
        """A policy's mistake is not the world's."""
        spans, layers = self.swarm.plan.spans, self.swarm.model.layers
        reached = 0
        for visit in visits:
            held = spans[visit.unit]
            if held is None or visit.span.first != reached or not held.covers(visit.span):
                break
            reached = visit.span.end
        if reached != layers or len({visit.unit for visit in visits}) != len(visits):
            raise UsageError(
                f"policy {self.policy.name} made a route that is none: {visits}",
                remedy="the spans of its stages adjoin, and their units hold them",
            )

    def spans(self, visits: Visits) -> tuple[Span | None, ...]:
        """Of each stage, None where it is all that the unit holds."""
        held = self.swarm.plan.spans
        return tuple(None if held[v.unit] == v.span else v.span for v in visits)

    def ask(
        self, now: float, session: Session, asked: Sequence[int]
    ) -> tuple[frozenset[int], float]:
        """Lease and promise at those places of the route: who refuses, and seconds it takes."""
        stages = [self.swarm.stages[session.visits[place].unit] for place in asked]
        refusing = {
            session.visits[place].unit
            for place, stage in zip(asked, stages, strict=True)
            if stage is None or self._judged(now, session, place, stage)
        }
        if not refusing:
            for place, stage in zip(asked, stages, strict=True):
                assert stage is not None, "it did not refuse"
                stage.open(session.key, session.request.tokens, *_terms(session, place), now)
        dead = [session.visits[p].unit for p, s in zip(asked, stages, strict=True) if s is None]
        for unit in dead:
            self.policy.lost(now, unit)
        self._tell(now, session, asked, frozenset(refusing))
        return frozenset(refusing), self._takes_s(session, asked, bool(dead))

    def _judged(self, now: float, session: Session, place: int, stage: Stage) -> bool:
        why = stage.judge(session.key, session.request.tokens, *_terms(session, place), now)
        return why is not None

    def _tell(
        self, now: float, session: Session, asked: Sequence[int], refusing: frozenset[int]
    ) -> None:
        """Loads come with grants and refusals, where stages are asked over the network."""
        loads: dict[int, Load] = {}
        for place in asked if self.swarm.execution.opens else ():
            visit = session.visits[place]
            if (stage := self.swarm.stages[visit.unit]) is not None:
                loads[visit.unit] = stage.foreseen(session.key, len(visit.span), now)
        if refusing:
            self.policy.refused(now, session.request, refusing, loads)
        else:
            self.policy.opened(now, session.request, session.visits, loads)

    def _takes_s(self, session: Session, asked: Sequence[int], dead: bool) -> float:
        if not self.swarm.execution.opens:
            return self.swarm.settings.unreachable_s if dead else 0.0
        nodes = [self.swarm.nodes[visit.unit] for visit in session.visits]
        client, links = session.request.client, self.swarm.links
        longest_s = self.swarm.settings.unreachable_s if dead else 0.0
        for place in asked:
            there_s = links.one_way_s(client, nodes[place]) + links.one_way_s(nodes[place], client)
            if place + 1 < len(nodes):
                pair = nodes[place], nodes[place + 1]
                there_s += links.one_way_s(*pair) + links.one_way_s(*pair[::-1])
            longest_s = max(longest_s, there_s)
        return longest_s


def places(visits: Visits) -> dict[int, int]:
    """The place in the route of each unit."""
    return {visit.unit: place for place, visit in enumerate(visits)}


def _terms(session: Session, place: int) -> tuple[int, bool, float]:
    """What a stage is asked for: layers, whether it is the tail, the promise of a step."""
    visit = session.visits[place]
    return len(visit.span), place + 1 == len(session.visits), visit.step_s
