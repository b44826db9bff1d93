"""The machines at work: messages come, batches run, rows go on to the next stage.

One event for each message and each batch, never one for each row: the rows of a batch that go the
same way travel as one message, which is what our peers do with the steps of a batch. Tokens for
decoding and prompt pieces are different messages, for they may have different lanes.

*Ring or coordinator.* The tail sends a token to the client, and the next step either itself to the
head (ring) or the client does when it has the token. *Prompts* go as token ids to the head; pieces
follow each other as the head's scheduler cut them.

*A row of the past* (its session ended, or has another route by now: the epoch differs) is dropped
where it is noticed. A dead stage drops everything; sessions are told by `clients.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hexswarm.peer.steps import Batch, Row, SessionKey
from hexswarm.router.placement.cluster import Model
from hexswarm.router.placement.plan import Plan
from hexswarm.simulator.events import Agenda
from hexswarm.simulator.links import Links
from hexswarm.simulator.policy import Policy
from hexswarm.simulator.records import Item, Session, Settings
from hexswarm.simulator.stage import Stage, Tally

_Message = tuple[bool, list[Item]]
"""Whether it is urgent, and what it brings."""


class Audience(Protocol):
    """Who hears of tokens."""

    def heard(self, now: float, session: Session) -> None:
        """The client has a token, at a moment that may be to come."""

    def replayed(self, now: float, session: Session) -> None:
        """The stages of a mended route have caught up."""


class Swarm:
    """All stages of a plan, and what is under way between them."""

    def __init__(
        self,
        agenda: Agenda,
        links: Links,
        model: Model,
        plan: Plan,
        policy: Policy,
        settings: Settings,
    ) -> None:
        self.agenda, self.links, self.model, self.plan = agenda, links, model, plan
        self.policy, self.execution, self.settings = policy, policy.execution, settings
        self.nodes = [unit.node for unit in plan.units]
        self.stages: list[Stage | None] = [None] * len(plan.units)
        self.sessions: dict[SessionKey, Session] = {}
        self.audience: Audience
        self.tallies = [Tally() for _ in plan.units]
        self.gone_s = [0.0] * len(plan.units)
        """Seconds that dead predecessors of a stage had computed."""

    # --- life and death ------------------------------------------------------------------------

    def come(self, now: float, number: int) -> Stage:
        """A unit is up, with nothing in it."""
        unit, span = self.plan.units[number], self.plan.spans[number]
        assert span is not None, "an idle unit serves nothing"
        tally = self.tallies[number]
        stage = Stage(number, unit, span, self.model, self.execution, self.settings, tally, now)
        self.stages[number] = stage
        return stage

    def go(self, now: float, number: int) -> list[Session]:
        """A unit dies; the sessions that it served."""
        stage = self.stages[number]
        if stage is None:
            return []
        stage.alive = False
        self.gone_s[number] += stage.busy_s(now)
        self.stages[number] = None
        return [self.sessions[key] for key in stage.tables.sessions]

    def busy_s(self, now: float) -> list[float]:
        """Seconds that each unit computed so far."""
        return [
            gone_s + (stage.busy_s(now) if stage else 0.0)
            for gone_s, stage in zip(self.gone_s, self.stages, strict=True)
        ]

    # --- what a client sends -------------------------------------------------------------------

    def send_prompt(self, now: float, session: Session) -> None:
        """From the client to the head, all of it."""
        tokens = session.request.input_tokens
        item = (session.key, 0, tokens, True, session.epoch)
        self._from_client(now, session, [item], tokens, urgent=False)

    def send_step(self, now: float, session: Session) -> None:
        """The newest token, from the client to the head."""
        item = (session.key, session.known, 1, True, session.epoch)
        self._from_client(now, session, [item], 1, urgent=True)

    def send_replay(self, now: float, session: Session, stage: int) -> None:
        """All known tokens to a stage that has none of them: from the journal of the one before
        it, or from the client to the head."""
        known = session.known
        item = (session.key, 0, known, False, session.epoch)
        if stage == 0:
            self._from_client(now, session, [item], known, urgent=False)
            return
        sender, receiver = session.visits[stage - 1].unit, session.visits[stage].unit
        size = known * self.model.activation_bytes
        self._send(now, sender, receiver, [item], size, urgent=False)

    def _from_client(
        self, now: float, session: Session, items: list[Item], tokens: int, *, urgent: bool
    ) -> None:
        head = session.visits[0].unit
        size = tokens * self.model.token_bytes
        client = session.request.client
        when = self.links.send(client, self.nodes[head], size, now, urgent=urgent)
        self.agenda.at(when + self.settings.handle_s, self.deliver, head, items)

    def _send(
        self, now: float, sender: int, receiver: int, items: list[Item], size: float, urgent: bool
    ) -> None:
        when = self.links.send(self.nodes[sender], self.nodes[receiver], size, now, urgent=urgent)
        self.agenda.at(when + self.settings.handle_s, self.deliver, receiver, items)

    # --- stages --------------------------------------------------------------------------------

    def deliver(self, now: float, number: int, items: Iterable[Item]) -> None:
        """A message reached a unit."""
        stage = self.stages[number]
        if stage is None:
            return
        for key, position, count, last, epoch in items:
            session = self.sessions.get(key)
            if session is None or session.epoch != epoch:
                continue
            span = session.spans[session.stage_of[number]]
            stage.submit(key, position, count, last, span, epoch, now)
        if stage.running is None:
            self.start(now, stage)

    def start(self, now: float, stage: Stage) -> None:
        """Let an idle stage compute, or wait for as long as its queue wants."""
        before_s = stage.wake_s
        ends_s = stage.begin(now)
        if ends_s is not None:
            self.agenda.at(ends_s, self._done, stage)
        elif stage.wake_s is not None and stage.wake_s != before_s:
            self.agenda.at(stage.wake_s, self._wake, stage)

    def _wake(self, now: float, stage: Stage) -> None:
        if stage.alive and stage.running is None and stage.wake_s == now:
            stage.wake_s = None
            self.start(now, stage)

    def _done(self, now: float, stage: Stage) -> None:
        if not stage.alive:
            return
        batch, work = stage.finish(now)
        self._hand_on(now, stage, batch)
        self.policy.computed(now, work)
        if stage.running is None:  # a ring of one stage may have started it again
            self.start(now, stage)

    # --- rows on their way ---------------------------------------------------------------------

    def _hand_on(self, now: float, stage: Stage, batch: Batch) -> None:
        """Each row to its next stage, or out as a token."""
        ways: dict[int, list[_Message]] = {}
        sampled: list[Session] = []
        number = stage.number
        for row in batch.rows:
            session = self.sessions.get(row.session)
            if session is None or session.epoch != row.epoch:
                continue
            place = session.stage_of[number]
            if session.replay_to >= 0 and self._caught_up(now, session, place, row):
                continue
            if place + 1 < len(session.visits):
                item = (row.session, row.position, row.count, row.sample, row.epoch)
                # A prompt goes by the bulk lane to its very end, or that would overtake its pieces.
                urgent = row.decode and row.position >= session.request.input_tokens
                self._pack(ways, session.visits[place + 1].unit, item, urgent)
            elif row.sample:
                sampled.append(session)
        if sampled:
            self._tokens(now, number, sampled)
        for receiver, messages in ways.items():
            for urgent, items in filter(_brings, messages):
                size = self.model.activation_bytes * sum(item[2] for item in items)
                self._send(now, number, receiver, items, size, urgent=urgent)

    def _pack(
        self, ways: dict[int, list[_Message]], receiver: int, item: Item, urgent: bool
    ) -> None:
        """Into a message of its kind: with lanes two for each receiver, tokens first; in line the
        rows leave in their order, so a message ends where the kind changes."""
        messages = ways.setdefault(receiver, [])
        if self.execution.lanes and not messages:
            messages += [(True, []), (False, [])]
        if self.execution.lanes:
            messages[not urgent][1].append(item)
        elif messages and messages[-1][0] == urgent:
            messages[-1][1].append(item)
        else:
            messages.append((urgent, [item]))

    def _caught_up(self, now: float, session: Session, place: int, row: Row) -> bool:
        """Whether a replay ends with this row, so that it goes no further."""
        if place < session.replay_to:
            return False
        if row.position + row.count == session.known:
            session.replay_to = -1
            session.empty.clear()
            self.audience.replayed(now, session)
        return True

    def _tokens(self, now: float, tail: int, sessions: list[Session]) -> None:
        """A batch of the tail gave tokens: to the clients, and round the ring."""
        clients: dict[str, list[Session]] = {}
        heads: dict[int, list[Item]] = {}
        for session in sessions:
            session.made += 1
            clients.setdefault(session.request.client, []).append(session)
            if self.execution.ring and session.made < session.request.output_tokens:
                item = (session.key, session.known, 1, True, session.epoch)
                heads.setdefault(session.visits[0].unit, []).append(item)
        size = self.model.token_bytes
        for head, items in heads.items():
            self._send(now, tail, head, items, size * len(items), urgent=True)
        for client, those in clients.items():
            node = self.nodes[tail]
            when = self.links.send(node, client, size * len(those), now, urgent=True)
            if self.execution.ring:
                for session in those:
                    self.audience.heard(when, session)
            else:
                told = [(session, session.epoch) for session in those]
                self.agenda.at(when, self._returned, told)

    def _returned(self, now: float, told: list[tuple[Session, int]]) -> None:
        """Tokens came to their client, which sends the next steps."""
        heads: dict[tuple[str, int], list[Item]] = {}
        for session, epoch in told:
            if session.key not in self.sessions:
                continue
            self.audience.heard(now, session)
            if session.made < session.request.output_tokens and session.epoch == epoch:
                way = session.request.client, session.visits[0].unit
                item = (session.key, session.known, 1, True, session.epoch)
                heads.setdefault(way, []).append(item)
        for (client, head), items in heads.items():
            size = self.model.token_bytes * len(items)
            when = self.links.send(client, self.nodes[head], size, now, urgent=True)
            self.agenda.at(when + self.settings.handle_s, self.deliver, head, items)


def _brings(message: _Message) -> bool:
    return bool(message[1])
