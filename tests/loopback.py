"""Sessions and stages without network, engine or clock: a swarm in one thread, as a test double.

`Loopback` holds real `StageTable`s, each with real `BlockTables` as its ledger, and real `Session`s
of clients. Between them lie *channels*, one per (sender, receiver, lane), each first in first out,
as streams are; frames are packed and decoded on the way. Nothing happens by itself: `moves` lists
what could happen next (deliver a frame, finish a dial, take a step, finish a step), and a test, a
random generator or Hypothesis chooses. `run` goes on until nothing is left to do.

Peers die, come back empty, freeze and wake (`kill`, `restart`, `freeze`, `thaw`). That one is gone
each party learns in a move of its own, some time later; what the dead had sent before may still
arrive. A running turn that loses a stage fails, unless the swarm has a `mender`: then asking it for
another route is a move, too.

The model is `IntegerModel`: hidden size 1, exact integers, layers that read all KV before them. Its
cells are poisoned whenever a block is leased, so that a gap in the KV (a token computed at one
stage and not at another) raises instead of giving a plausible number. `answer` says what a ring
must say, computed in one go. Each host counts how often it computed a position for a route.
"""

from __future__ import annotations

import random
import struct
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from hexswarm import instructions as client
from hexswarm.errors import HexswarmError
from hexswarm.instructions import Turn
from hexswarm.messages import Message
from hexswarm.peer import actions
from hexswarm.peer.admission import Hosted
from hexswarm.peer.cache import BlockTables
from hexswarm.peer.journal import Journal
from hexswarm.peer.leases import Lease
from hexswarm.peer.stage import StageTable
from hexswarm.peer.steps import Activations, Result, Row, SessionKey, Step, TailPolicy
from hexswarm.prefix import Namer
from hexswarm.records import Load, PeerId, Route, Sampling, Span, Speed, Stage
from hexswarm.resume import whole
from hexswarm.session import Session
from hexswarm.wire import Frame, FrameDecoder, pack

MODEL = "ab" * 32
VOCABULARY = 97
PIECE = 3
"""Tokens of a prompt that a stage computes at a time."""
CLIENT = PeerId("client")


# --- the model ----------------------------------------------------------------------------------


class IntegerModel:
    """The layers of one peer; KV of token t of a session lies in `blocks[t // 16]`."""

    def __init__(self, span: Span, layers: int, blocks: int) -> None:
        self.span, self.layers = span, layers
        self.cells: list[list[list[int | None]]] = [
            [[None] * 16 for _ in range(blocks)] for _ in range(layers)
        ]

    def poison(self, blocks: Iterable[int]) -> None:
        for layer in self.cells:
            for block in blocks:
                layer[block] = [None] * 16

    def run(self, row: Row) -> Result:
        span = row.span or self.span
        values = row.payload
        if isinstance(values, Activations):
            values = [int(v) for v in struct.unpack(f"<{row.count}f", values.data)]
        out = [self._token(row, span, row.position + i, value) for i, value in enumerate(values)]
        if span.end < self.layers:
            data = struct.pack(f"<{row.count}f", *out)
            return Result(row, activations=Activations(data, "float32"))
        if not row.sample:
            return Result(row)
        token = out[-1] % VOCABULARY
        assert row.policy is not None, "a sampled row of the tail says how"
        if row.policy.logits:
            logits = [float(word == token) for word in range(VOCABULARY)]
            return Result(row, logits=struct.pack(f"<{VOCABULARY}f", *logits))
        return Result(row, token=token)

    def _token(self, row: Row, span: Span, position: int, value: int) -> int:
        for layer in range(span.first, span.end):
            cells = self.cells[layer]
            cells[row.blocks[position // 16]][position % 16] = value
            seen = [cells[row.blocks[i // 16]][i % 16] for i in range(position + 1)]
            assert None not in seen, f"a gap in the KV before position {position}"
            value = (3 * value + layer + sum(filter(None, seen))) % 9973
        return value


def answer(ids: Sequence[int], max_new: int, layers: int, stops: Iterable[int] = ()) -> list[int]:
    """What the whole model says after `ids`."""
    model = IntegerModel(Span(0, layers), layers, 64)
    tokens: list[int] = []
    given = list(ids)
    policy = TailPolicy(Sampling())
    position = 0
    while len(tokens) < max_new and not set(tokens[-1:]) & set(stops):
        row = Row(bytes(16), position, len(given), given, True, tuple(range(64)), policy=policy)
        token = model.run(row).token
        assert token is not None
        position += len(given)
        tokens.append(token)
        given = [token]
    return tokens


# --- hosts and clients --------------------------------------------------------------------------


class TableLedger:
    """`BlockTables` as a stage's ledger, at a time that the test sets."""

    def __init__(self, model: IntegerModel, blocks: int) -> None:
        self.tables = BlockTables(blocks, lease_s=100.0)
        self.now = 0.0
        self.load = Load(0.25, 1.5, 0.5)
        """As measured; the free tokens are counted."""
        self.speed: Speed | None = None
        """None: the peer does not know it, and promises nothing."""
        self._model = model
        self.on_close: Callable[[SessionKey], None] = lambda session: None

    def open(
        self,
        session: SessionKey,
        tokens: int,
        names: Sequence[Hashable] = (),
        *,
        publish: bool = True,
    ) -> Lease:
        lease = self.tables.lease(session, tokens, self.now, names, publish=publish)
        self._model.poison(lease.blocks[lease.known // 16 :])
        return lease

    def extend(self, session: SessionKey, tokens: int) -> object:
        held = set(self.tables.blocks(session))
        lease = self.tables.extend(session, tokens, self.now)
        self._model.poison(set(lease.blocks) - held)
        return lease

    def close(self, session: SessionKey, names: Sequence[Hashable] = ()) -> bool:
        self.on_close(session)
        return self.tables.release(session, self.now, names)

    def expire(self) -> list[SessionKey]:
        return self.tables.expire(self.now)

    def load_now(self, *, prompts: bool = True) -> Load:
        return replace(self.load, free_kv_tokens=self.tables.free_tokens)

    def speed_now(self) -> Speed | None:
        return self.speed


class Host:
    """A peer: its table, its KV, and a device that takes one piece of one step at a time."""

    def __init__(self, peer: PeerId, span: Span, layers: int, blocks: int) -> None:
        self.peer = peer
        self.model = IntegerModel(span, layers, blocks)
        self.ledger = TableLedger(self.model, blocks)
        self.ledger.on_close = self.drop
        self.journal = Journal()
        self.table = StageTable(Hosted(peer, MODEL, span, layers, 1), self.ledger, self.journal)
        self.steps: deque[Step] = deque()
        self.running: Row | None = None
        self.refused: deque[Result] = deque()
        self.watched: Counter[PeerId] = Counter()
        self.computed: Counter[tuple[SessionKey, int, int, int]] = Counter()
        """How often a position was: by session, turn, epoch and position."""

    @property
    def kv_in_use(self) -> int:
        return self.ledger.tables.total_blocks - self.ledger.tables.free_blocks

    def submit(self, step: Step) -> None:
        """As the engine does: admit in order, answer what is not in order."""
        try:
            self.ledger.tables.write(step.session, step.position, step.count, self.ledger.now)
        except HexswarmError as error:
            row = Row(
                *(step.session, step.position, step.count, None, step.last, (), step.turn),
                epoch=step.epoch,
            )
            self.refused.append(Result(row, error=str(error)))
        else:
            self.steps.append(step)

    def drop(self, session: SessionKey, position: int | None = None) -> None:
        """As the engine does: forget what waits, and take the cached length back to before it."""
        waiting = [step.position for step in self.steps if step.session == session]
        self.steps = deque(step for step in self.steps if step.session != session)
        if position is not None:
            waiting.append(position)
        if waiting:
            self.ledger.tables.rewind(session, min(waiting))

    def take(self) -> None:
        """Begin with the next piece of the oldest step."""
        step = self.steps.popleft()
        count = min(PIECE, step.count)
        payload = step.payload
        rest = None
        if isinstance(payload, Activations):
            payload = Activations(payload.data[: 4 * count], payload.dtype)
            rest = Activations(step.payload.data[4 * count :], payload.dtype)
        else:
            payload, rest = payload[:count], payload[count:]
        last = count == step.count
        self.running = Row(
            session=step.session,
            position=step.position,
            count=count,
            payload=payload,
            sample=step.last and last,
            blocks=self.ledger.tables.blocks(step.session),
            turn=step.turn,
            span=step.span,
            policy=step.policy,
            epoch=step.epoch,
        )
        if not last:
            position, left = step.position + count, step.count - count
            more = replace(step, position=position, count=left, payload=rest)
            self.steps.appendleft(more)

    def compute(self) -> Result | None:
        """What the piece that was begun gives; nothing if its session has ended."""
        row, self.running = self.running, None
        assert row is not None
        if row.session not in self.ledger.tables.sessions:
            return None
        end = row.position + row.count
        for position in range(row.position, end):
            self.computed[row.session, row.turn, row.epoch, position] += 1
        result = self.model.run(row)
        self.ledger.tables.computed(row.session, end, self.ledger.now)
        return result

    def finish(self) -> list[actions.Action]:
        result = self.compute()
        return [] if result is None else self.table.on_results([result], self.ledger.now)


@dataclass
class Told:
    """What a session's caller saw."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    finish: str = ""
    ready: int = 0
    logits: list[bytes] = field(default_factory=list)
    traced: int = 0
    progress: int = 0
    broken: list[frozenset[PeerId]] = field(default_factory=list)
    draining: list[PeerId] = field(default_factory=list)
    mended: list[int] = field(default_factory=list)
    """The epochs on which the turn went on after a loss."""
    error: HexswarmError | None = None


# --- the swarm ----------------------------------------------------------------------------------

Channel = tuple[PeerId, PeerId, int]

Mender = Callable[[Session], Route | None]
"""The route on which a session whose turn is broken goes on; the one that it has: not yet; None:
it is given up."""


class Loopback:
    """See the module. `spans` makes one host each, named p0, p1, ..."""

    def __init__(
        self, *spans: tuple[int, int], layers: int | None = None, blocks: int = 64
    ) -> None:
        self.layers = layers or max(end for _, end in spans)
        self.hosts = {
            PeerId(f"p{i}"): Host(PeerId(f"p{i}"), Span(*span), self.layers, blocks)
            for i, span in enumerate(spans)
        }
        self.channels: dict[Channel, deque[bytes]] = {}
        self.dials: deque[tuple[PeerId, actions.Dial]] = deque()
        self.unreachable: set[frozenset[PeerId]] = set()
        self.sessions: dict[bytes, tuple[PeerId, Session, Told]] = {}
        self.strange: list[tuple[PeerId, PeerId, Message]] = []
        """Frames that went to a party without such a session: (from, to, message)."""
        self.dead: dict[PeerId, Host] = {}
        """Peers that are gone, as they were."""
        self.frozen: set[PeerId] = set()
        """Hosts that hear and do nothing."""
        self.mender: Mender | None = None
        """None: a loss in a running turn fails the session."""
        self._news: list[tuple[PeerId, PeerId]] = []
        """Who has yet to learn that whom is gone."""
        self._keys = 0

    def route(self, *peers: str, spans: Sequence[tuple[int, int]] | None = None) -> Route:
        names = [PeerId(peer) for peer in peers] or list(self.hosts)
        parts = (
            [Span(*span) for span in spans]
            if spans
            else [self.hosts[name].model.span for name in names]
        )
        stages = tuple(Stage(n, s, ("/x",)) for n, s in zip(names, parts, strict=True))
        return Route(stages, 0.0, 0.0)

    def open(
        self,
        kv_tokens: int = 64,
        route: Route | None = None,
        *,
        who: PeerId = CLIENT,
        client_loop: bool = False,
        prompt: Sequence[int] = (),
    ) -> tuple[Session, Told]:
        """A session whose opening is under way; with a `prompt`, of which stages may know."""
        self._keys += 1
        route = route or self.route()
        made = Session(
            *(self._keys.to_bytes(16, "big"), route, MODEL, kv_tokens),
            client_loop=client_loop,
            namer=Namer(who.encode(), MODEL) if prompt else None,
            prompt=prompt,
        )
        key = made.key
        told = Told()
        self.sessions[key] = (who, made, told)
        self.carry_out(made, made.start())
        return made, told

    def opened(self, kv_tokens: int = 64, route: Route | None = None) -> tuple[Session, Told]:
        made, told = self.open(kv_tokens, route)
        self.run()
        assert made.open, made.failed
        return made, told

    def ask(
        self,
        session: Session,
        ids: Sequence[int],
        max_new: int = 4,
        *,
        stop_ids: Iterable[int] = (),
        penalty: float = 1.0,
    ) -> None:
        """Begin a turn whose conversation so far is `ids`; only what is not cached is sent."""
        position = 0
        for cached, wanted in zip(session.cached, ids, strict=False):
            if cached != wanted:
                break
            position += 1
        position = whole(min(position, len(ids) - 1), session.named)
        turn = Turn(
            position,
            tuple(ids[position:]),
            max_new,
            Sampling(repetition_penalty=penalty),
            tuple(stop_ids),
            tuple(ids),
        )
        told = self.sessions[session.key][2]
        told.tokens, told.positions, told.finish = [], [], ""
        self.carry_out(session, session.generate(turn))

    # --- the caller's instructions and the stages' actions --------------------------------------

    def carry_out(self, session: Session, made: Iterable[client.Instruction]) -> None:
        who, _, told = self.sessions[session.key]
        for item in made:
            match item:
                case client.Connect(stage=found, message=message, payload=payload):
                    if not self._reachable(who, found.peer):
                        self.carry_out(session, session.on_lost(found.peer, "cannot be reached"))
                    elif session.failed is None:
                        self.send(who, found.peer, message, payload)
                case client.Send(peer=peer, message=message, payload=payload, bulk=bulk):
                    self.send(who, peer, message, payload, int(bulk))
                case client.Ready():
                    told.ready += 1
                case client.Emit(token=token, position=position, finish=finish):
                    told.finish = finish
                    if token is not None:
                        told.tokens.append(token)
                        told.positions.append(position)
                case client.EmitLogits(data=data):
                    told.logits.append(data)
                case client.EmitTraces():
                    told.traced += 1
                case client.EmitProgress():
                    told.progress += 1
                case client.Broken(peers=peers):
                    told.broken.append(peers)
                    if self.mender is None:
                        self.carry_out(session, session.give_up(session.broken[min(peers)]))
                case client.Draining(peer=peer):
                    told.draining.append(peer)
                case client.Mended(epoch=epoch):
                    told.mended.append(epoch)
                case client.Fail(error=error):
                    assert told.error is None, "a session fails once"
                    told.error = error

    def act(self, host: Host, made: Iterable[actions.Action]) -> None:
        for action in made:
            match action:
                case actions.Send(peer=peer, message=message, payload=payload, lane=lane):
                    self.send(host.peer, peer, message, bytes(payload), lane)
                case actions.Report(peer=peer, message=message):
                    self.send(host.peer, peer, message)
                case actions.Submit(step=step):
                    host.submit(step)
                case actions.Dial():
                    self.dials.append((host.peer, action))
                case actions.Drop(session=key, position=position):
                    host.drop(key, position)
                case actions.Watch(peer=peer, on=on):
                    host.watched[peer] += 1 if on else -1
                    assert host.watched[peer] >= 0, "unwatched more often than watched"

    def send(
        self, source: PeerId, target: PeerId, message: Message, payload: bytes = b"", lane: int = 0
    ) -> None:
        if not self._reachable(source, target):
            return
        data = b"".join(pack(message, payload))
        self.channels.setdefault((source, target, lane), deque()).append(data)

    # --- what can happen ------------------------------------------------------------------------

    def moves(self) -> list[Callable[[], None]]:
        """Everything that could happen next, in a fixed order."""
        found: list[Callable[[], None]] = []
        for channel in sorted(self.channels):
            if self.channels[channel] and channel[1] not in self.frozen:
                found.append(lambda channel=channel: self.deliver(channel))  # type: ignore[misc]
        if self.dials:
            found.append(self._finish_dial)
        for host in self.hosts.values():
            if host.peer in self.frozen:
                continue
            if host.refused:
                found.append(lambda host=host: self._refuse(host))  # type: ignore[misc]
            elif host.running is not None:
                found.append(lambda host=host: self.act(host, host.finish()))  # type: ignore[misc]
            elif host.steps:
                found.append(host.take)
        for party, peer in self._news:
            found.append(lambda party=party, peer=peer: self._learn(party, peer))  # type: ignore[misc]
        for _, session, _ in self.sessions.values():
            if session.broken and session.running and self.mender is not None:
                found.append(lambda session=session: self._mend(session))  # type: ignore[misc]
        return found

    def run(self, rng: random.Random | None = None, most: int = 100_000) -> None:
        """Until nothing can happen; with `rng` in any order that streams permit."""
        for _ in range(most):
            moves = self.moves()
            if not moves:
                return
            (rng.choice(moves) if rng else moves[0])()
        raise AssertionError("it goes on for ever")

    def deliver(self, channel: Channel) -> None:
        source, target, _ = channel
        (frame,) = FrameDecoder().feed(self.channels[channel].popleft(), 0.0)
        host = self.hosts.get(target)
        if host is not None:
            self.act(host, host.table.on_frame(source, frame, host.ledger.now))
            return
        key = getattr(frame.message, "session", None)
        mine = [s for who, s, _ in self.sessions.values() if who == target]
        matching = [session for session in mine if key in (None, session.key)]
        if not matching:
            self.strange.append((source, target, frame.message))
        for session in matching:
            self.carry_out(session, session.on_frame(source, frame))

    def lose(self, a: PeerId | str, b: PeerId | str) -> None:
        """The link between two parties ends; what is under way is lost."""
        one, other = PeerId(a), PeerId(b)
        self.unreachable.add(frozenset((one, other)))
        for channel in list(self.channels):
            if {one, other} == set(channel[:2]):
                self.channels[channel].clear()
        for me, peer in ((one, other), (other, one)):
            if me in self.hosts:
                self.act(self.hosts[me], self.hosts[me].table.on_lost(peer))
            for who, session, _ in list(self.sessions.values()):
                if who == me:
                    self.carry_out(session, session.on_lost(peer, "vanished"))

    def kill(self, name: PeerId | str) -> None:
        """A peer is gone, with all that it had; the others learn of it when they do."""
        peer = PeerId(name)
        self.dead[peer] = self.hosts.pop(peer)
        self.frozen.discard(peer)
        for channel in self.channels:
            if channel[1] == peer:
                self.channels[channel].clear()
        self.dials = deque(dial for dial in self.dials if dial[0] != peer)
        self._news = [news for news in self._news if news[0] != peer]
        parties = {who for who, _, _ in self.sessions.values()} | set(self.hosts)
        self._news.extend((party, peer) for party in sorted(parties))

    def restart(self, name: PeerId | str) -> None:
        """A dead peer is back and remembers nothing; that it was gone is known to all by then."""
        peer = PeerId(name)
        for party, gone in list(self._news):
            if gone == peer:
                self._learn(party, gone)
        before = self.dead.pop(peer)
        span, blocks = before.model.span, before.ledger.tables.total_blocks
        self.hosts[peer] = Host(peer, span, self.layers, blocks)

    def freeze(self, name: PeerId | str) -> None:
        """A peer stands still: it hears nothing, says nothing, computes nothing."""
        self.frozen.add(PeerId(name))

    def thaw(self, name: PeerId | str) -> None:
        self.frozen.discard(PeerId(name))

    def repeat(self, channel: Channel) -> None:
        """The next frame of a channel arrives twice."""
        queue = self.channels[channel]
        queue.appendleft(queue[0])

    def _reachable(self, a: PeerId, b: PeerId) -> bool:
        gone = a in self.dead or b in self.dead
        return not gone and frozenset((a, b)) not in self.unreachable

    def _learn(self, party: PeerId, peer: PeerId) -> None:
        """Somebody learns that a peer is gone: what it sent and has not come will not come."""
        self._news.remove((party, peer))
        for channel in list(self.channels):
            if channel[:2] == (peer, party):
                self.channels[channel].clear()
        if party in self.hosts:
            self.act(self.hosts[party], self.hosts[party].table.on_lost(peer))
        for who, session, _ in list(self.sessions.values()):
            if who == party:
                self.carry_out(session, session.on_lost(peer, "vanished"))

    def _mend(self, session: Session) -> None:
        assert self.mender is not None
        route = self.mender(session)
        if route is None:
            error = session.broken[min(session.broken)]
            self.carry_out(session, session.give_up(error))
        elif route is not session.route:
            self.carry_out(session, session.reroute(route))

    def say(
        self,
        source: PeerId | str,
        target: PeerId | str,
        message: Message,
        payload: bytes = b"",
    ) -> list[actions.Action]:
        """A host's answer to a frame out of the blue, which is also carried out."""
        host = self.hosts[PeerId(target)]
        frame = Frame(message, payload)
        made = host.table.on_frame(PeerId(source), frame, host.ledger.now)
        self.act(host, made)
        return made

    def _finish_dial(self) -> None:
        peer, dial = self.dials.popleft()
        ok = self._reachable(peer, dial.peer)
        host = self.hosts[peer]
        self.act(host, host.table.dialled(dial.session, dial.epoch, ok, host.ledger.now))

    def _refuse(self, host: Host) -> None:
        results = list(host.refused)
        host.refused.clear()
        self.act(host, host.table.on_results(results, host.ledger.now))

    # --- what must hold -------------------------------------------------------------------------

    def check(self) -> None:
        """KV in use is exactly that of the sessions which the tables know."""
        for host in self.hosts.values():
            tables = host.ledger.tables
            leased = len({block for key in tables.sessions for block in tables.blocks(key)})
            assert host.kv_in_use == leased
            assert len(tables.sessions) == len(host.table)
            assert max(host.computed.values(), default=1) == 1, "computed twice for one route"

    def check_clean(self) -> None:
        """Nobody holds anything for anybody."""
        for host in self.hosts.values():
            assert len(host.table) == 0
            assert host.kv_in_use == 0
            assert not host.steps
            assert host.watched.total() == 0, host.watched
