"""What peers say to each other, as records with a strict schema.

Every message is a frozen dataclass; its fields name their wire type, and `encode`/`decode` are
derived from that. A header is a plain msgpack array `[kind, field, field, ...]`: no maps, no
extension types, no nesting beyond one list, so that a hostile header costs microseconds. Bulk data
(token ids, activations, logits) follows the header as raw bytes, the *payload*.

A session is named by 128 random bits of the client (`session`). `epoch` counts the routes that a
session has had, `turn` its prompts: frames of an abandoned route or a cancelled turn are told
apart by them and dropped. Positions are absolute.

Rejected: protobuf (needs generated code and doubles bf16 through hivemind's wrapper), msgpack
extension types (hivemind's hook decodes them recursively without a limit), pickle in any form.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import msgpack

from hexswarm.errors import LocalProtocolError, RemoteProtocolError, UsageError
from hexswarm.flat import flag, real
from hexswarm.records import DTYPES, Load, PeerId, Sampling, Span
from hexswarm.schema import amount, blob, integer, list_of, one_of, share, text, wire

PROTOCOL_VERSION = 3
MAX_HEADER_BYTES = 8192
"""An `Open` with eight addresses needs about 1 kB."""

SESSION_BYTES = 16
MAX_TOKENS = 1 << 22
MAX_LAYERS = 1 << 12

_session = blob(SESSION_BYTES)
_position = integer(0, MAX_TOKENS)
_small = integer(0, 1 << 16)
_peer = text(128)
_addresses = list_of(text(256), 8)
_dtype = one_of(tuple(DTYPES))
_group = text(64)
_epoch = integer(0, 1 << 62)


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; KIND is the number on the wire."""

    KIND: ClassVar[int] = -1


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First frame each way on every stream: what is spoken, and which lane of which pair it is."""

    KIND: ClassVar[int] = 0
    version: int = wire(integer(0, 1 << 16))
    software: str = wire(text(64))
    lane: int = wire(integer(0, 1))
    link: bytes = wire(_session)


@dataclass(frozen=True, slots=True)
class Ping(Message):
    KIND: ClassVar[int] = 1
    nonce: int = wire(integer(0, (1 << 63) - 1))


@dataclass(frozen=True, slots=True)
class Pong(Message):
    KIND: ClassVar[int] = 2
    nonce: int = wire(integer(0, (1 << 63) - 1))


@dataclass(frozen=True, slots=True)
class Open(Message):
    """Client to stage: reserve KV, accept input from `predecessor` only, send on to `successor`.

    The head's predecessor is the tail (the client may always feed the head); the tail's
    successor is the head. An empty `successor` at the tail asks for logits to the client instead
    of a ring (client loop). Sent again with the same epoch it prolongs the lease to `kv_tokens`;
    with a higher epoch it rewires the session: its KV stays, its steps that are not yet sent on
    are forgotten, and it stands still until `Resume` (see `hexswarm.session`).
    The payload may name what the session's tokens are (`hexswarm.prefix`).
    """

    KIND: ClassVar[int] = 3
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    digest: str = wire(text(64))
    first: int = wire(integer(0, MAX_LAYERS))
    end: int = wire(integer(1, MAX_LAYERS))
    predecessor: str = wire(_peer)
    successor: str = wire(_peer)
    successor_addresses: tuple[str, ...] = wire(_addresses)
    kv_tokens: int = wire(integer(1, MAX_TOKENS))
    step_s: float = wire(amount, default=0.0)
    """Most seconds that a decode step may take at this stage, wait included: the stage promises it
    or refuses. 0 asks for no promise. A longer lease keeps what was promised."""

    @property
    def span(self) -> Span:
        return Span(self.first, self.end)


@dataclass(frozen=True, slots=True)
class Opened(Message):
    """Stage to client: the lease is granted and the way to the successor is open.

    The last four fields tell the stage's `Load`: fresher than its announcement, and for nothing.
    """

    KIND: ClassVar[int] = 4
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    kv_tokens: int = wire(integer(1, MAX_TOKENS))
    queue_s: float = wire(amount, default=0.0)
    rows: float = wire(amount, default=0.0)
    busy: float = wire(share, default=0.0)
    free_kv_tokens: int = wire(integer(0, 1 << 40), default=0)
    cached: int = wire(_position, default=0)
    """Positions [0, cached) are computed here and sent on, or known from earlier sessions."""
    journal: int = wire(_position, default=0)
    """Outputs of positions [journal, cached) can be sent again."""

    @property
    def load(self) -> Load:
        return Load(self.queue_s, self.rows, self.busy, self.free_kv_tokens)


@dataclass(frozen=True, slots=True)
class Refuse(Message):
    """Stage to client: no session.

    `code`: full, draining, model, span, unreachable, invalid, slow (the promise asked for cannot be
    kept), busy (what others were promised could not be kept).
    """

    KIND: ClassVar[int] = 5
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    code: str = wire(text(16))
    reason: str = wire(text(256))
    retry_s: float = wire(real)
    queue_s: float = wire(amount, default=0.0)
    rows: float = wire(amount, default=0.0)
    busy: float = wire(share, default=0.0)
    free_kv_tokens: int = wire(integer(0, 1 << 40), default=0)

    @property
    def load(self) -> Load:
        return Load(self.queue_s, self.rows, self.busy, self.free_kv_tokens)


@dataclass(frozen=True, slots=True)
class Generate(Message):
    """Client to tail, once a turn: how to choose tokens, and when to stop.

    The payload holds the token ids so far (uint32) if a repetition penalty needs them, else it is
    empty: a tail does not learn the prompt without need.
    """

    KIND: ClassVar[int] = 6
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    max_new: int = wire(integer(0, MAX_TOKENS))
    stop_ids: tuple[int, ...] = wire(list_of(integer(0, 1 << 24), 64))
    temperature: float = wire(real)
    top_p: float = wire(real)
    top_k: int = wire(integer(0, 1 << 20))
    min_p: float = wire(real)
    repetition_penalty: float = wire(real)
    seed: int = wire(integer(0, (1 << 64) - 1))

    @property
    def sampling(self) -> Sampling:
        """Raises UsageError if a value is out of range."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class Tokens(Message):
    """To the head: token ids (payload, uint32) from `position` on; from the client or the tail."""

    KIND: ClassVar[int] = 7
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    position: int = wire(_position)
    last: bool = wire(flag)
    siblings: int = wire(_small, default=0)


@dataclass(frozen=True, slots=True)
class Hidden(Message):
    """Stage to stage: activations (payload, count x hidden elements of `dtype`, row-major)."""

    KIND: ClassVar[int] = 8
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    position: int = wire(_position)
    count: int = wire(integer(1, 1 << 20))
    last: bool = wire(flag)
    dtype: str = wire(_dtype)
    siblings: int = wire(_small, default=0)


@dataclass(frozen=True, slots=True)
class Token(Message):
    """Tail to client: the chosen token at `position`; `finish` is "", "stop" or "length"."""

    KIND: ClassVar[int] = 9
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    position: int = wire(_position)
    token: int = wire(integer(0, 1 << 24))
    finish: str = wire(one_of(("", "stop", "length")))


@dataclass(frozen=True, slots=True)
class Logits(Message):
    """Tail to client in the client loop: float32 logits (payload) for the token at `position`."""

    KIND: ClassVar[int] = 10
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    position: int = wire(_position)


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """Client to all stages: end this turn; the KV stays for the next one."""

    KIND: ClassVar[int] = 11
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)


@dataclass(frozen=True, slots=True)
class Close(Message):
    """Client to stage: free everything; the payload may name it, to find it again."""

    KIND: ClassVar[int] = 12
    session: bytes = wire(_session)


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """Stage to client: the session cannot go on here.

    `code`: lost (of `peer`, the neighbour), gap, full, input, conflict (a step came again with
    other content), engine, expired, unknown, draining.
    """

    KIND: ClassVar[int] = 13
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    code: str = wire(text(16))
    reason: str = wire(text(256))
    peer: str = wire(_peer)


@dataclass(frozen=True, slots=True)
class GoAway(Message):
    """The sender drains: open no sessions here; it exits in `exit_s` seconds."""

    KIND: ClassVar[int] = 14
    exit_s: float = wire(real)


@dataclass(frozen=True, slots=True)
class Measure(Message):
    """Client to peer: measure the way from you to `peer` now; the answer is `Measured`."""

    KIND: ClassVar[int] = 15
    nonce: int = wire(integer(0, (1 << 63) - 1))
    peer: str = wire(_peer)
    addresses: tuple[str, ...] = wire(_addresses)


@dataclass(frozen=True, slots=True)
class Measured(Message):
    """Round trip and jitter (as in `Link`) to `peer`, negative if it cannot be reached."""

    KIND: ClassVar[int] = 16
    nonce: int = wire(integer(0, (1 << 63) - 1))
    peer: str = wire(_peer)
    rtt_s: float = wire(real)
    jitter_s: float = wire(amount)
    bytes_per_s: float = wire(amount)
    """0 if not measured."""


@dataclass(frozen=True, slots=True)
class Probe(Message):
    """A payload on the bulk lane whose arrival is timed; the answer is `Probed`."""

    KIND: ClassVar[int] = 17
    nonce: int = wire(integer(0, (1 << 63) - 1))


@dataclass(frozen=True, slots=True)
class Probed(Message):
    """How fast the probe came in, in bytes per second (0: it was too short to tell)."""

    KIND: ClassVar[int] = 18
    nonce: int = wire(integer(0, (1 << 63) - 1))
    bytes_per_s: float = wire(amount)


@dataclass(frozen=True, slots=True)
class Trace(Message):
    """Client to stage: where did the time of this session's decode steps go? (`Traced`)"""

    KIND: ClassVar[int] = 19
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    nonce: int = wire(integer(0, (1 << 63) - 1), default=0)


@dataclass(frozen=True, slots=True)
class Traced(Message):
    """Sums over the decode steps of a session at one stage, and what its prompt cost there."""

    KIND: ClassVar[int] = 20
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    steps: int = wire(integer(0, MAX_TOKENS))
    wait_s: float = wire(amount)
    """From arrival to the start of the batch."""
    compute_s: float = wire(amount)
    """In batches, whole batches: what a row waits for."""
    handle_s: float = wire(amount)
    """Everything else between arrival and sending on: decoding, threads, encoding."""
    prompt_wait_s: float = wire(amount)
    prompt_compute_s: float = wire(amount)
    rows: float = wire(amount)
    """Mean rows in the batches of the decode steps."""
    successor_rtt_s: float = wire(real)
    """Median round trip to the next stage; negative if it was not measured."""
    nonce: int = wire(integer(0, (1 << 63) - 1), default=0)
    """Of the `Trace` that this answers."""


@dataclass(frozen=True, slots=True)
class Resume(Message):
    """Client to stage, once all stages have granted an epoch: how the session goes on after a loss.

    The stage crops its KV to `start` and expects input from there on. What it has in its journal
    from `send_from` to `start` it sends to the successor now, and what it computes from then on, if
    it is not below `send_from`: the successor has that. The session's tokens are known up to `end`:
    the row before it is the last step, after which the tail chooses.
    """

    KIND: ClassVar[int] = 21
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    turn: int = wire(_small)
    start: int = wire(_position)
    send_from: int = wire(_position)
    end: int = wire(_position)


@dataclass(frozen=True, slots=True)
class AskProgress(Message):
    """Client to stage: how far are you? The answer is `Progress`."""

    KIND: ClassVar[int] = 22
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    nonce: int = wire(integer(0, (1 << 63) - 1))


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """Where a stage stands: who waits for whom, and who is slow, can be told from all of them."""

    KIND: ClassVar[int] = 23
    session: bytes = wire(_session)
    epoch: int = wire(_small)
    nonce: int = wire(integer(0, (1 << 63) - 1))
    received: int = wire(_position)
    """Input of positions [0, received) has arrived."""
    done: int = wire(_position)
    """Output of positions [0, done) was sent on."""
    step_s: float = wire(amount)
    """Mean seconds from arrival to sending on of the last decode steps; 0 if there were none."""
    computed: int = wire(integer(0, (1 << 63) - 1), default=0)
    """Steps of any session that were computed here: one that works for others is no idler."""


@dataclass(frozen=True, slots=True)
class GroupInvite(Message):
    """Leader to peer of its LAN: hold a part of these layers with us in this epoch. The payload is
    the signed invitation (`hexswarm.peer.groups.invitation`); the answer is `GroupAnswer`."""

    KIND: ClassVar[int] = 24
    group: str = wire(_group)
    epoch: int = wire(_epoch)


@dataclass(frozen=True, slots=True)
class GroupAnswer(Message):
    """Member to leader: yes (an empty `code`: it keeps itself free), or why not."""

    KIND: ClassVar[int] = 25
    group: str = wire(_group)
    epoch: int = wire(_epoch)
    code: str = wire(text(16))
    reason: str = wire(text(256))
    latest: int = wire(_epoch)
    """Of code `stale`: the latest epoch of the group that it knows of."""


@dataclass(frozen=True, slots=True)
class GroupCommit(Message):
    """Leader to member: all have said yes, load your part."""

    KIND: ClassVar[int] = 26
    group: str = wire(_group)
    epoch: int = wire(_epoch)


@dataclass(frozen=True, slots=True)
class GroupReport(Message):
    """Member to leader: my part is loaded, and my streams are open."""

    KIND: ClassVar[int] = 27
    group: str = wire(_group)
    epoch: int = wire(_epoch)


@dataclass(frozen=True, slots=True)
class GroupRelease(Message):
    """Leader to member: the epoch is over, or will not be."""

    KIND: ClassVar[int] = 28
    group: str = wire(_group)
    epoch: int = wire(_epoch)


@dataclass(frozen=True, slots=True)
class GroupLeave(Message):
    """Member to leader: I am not in the epoch any more, or shall not be in a moment."""

    KIND: ClassVar[int] = 29
    group: str = wire(_group)
    epoch: int = wire(_epoch)
    how: str = wire(text(256))


_KINDS: dict[int, type[Message]] = {
    kind.KIND: kind
    for kind in (
        *(Hello, Ping, Pong, Open, Opened, Refuse, Generate, Tokens, Hidden),
        *(Token, Logits, Cancel, Close, Failed, GoAway),
        *(Measure, Measured, Probe, Probed, Trace, Traced),
        *(Resume, AskProgress, Progress),
        *(GroupInvite, GroupAnswer, GroupCommit, GroupReport, GroupRelease, GroupLeave),
    )
}
_FIELDS = {
    kind: [(item.name, item.metadata["check"]) for item in fields(kind)] for kind in _KINDS.values()
}


def encode(message: Message) -> bytes:
    """The header bytes of `message`. Raises LocalProtocolError if a value is illegal."""
    kind = type(message)
    try:
        values = [check(getattr(message, name)) for name, check in _FIELDS[kind]]
        packed: bytes = msgpack.packb([kind.KIND, *values])
    except (ValueError, KeyError, OverflowError) as error:
        raise LocalProtocolError(f"{kind.__name__}: {error}") from error
    return packed


def decode(header: bytes | memoryview) -> Message:
    """The message of a header. Raises RemoteProtocolError for anything but a valid one."""
    try:
        values = msgpack.unpackb(
            header, max_str_len=1024, max_bin_len=64, max_array_len=80, max_map_len=0, max_ext_len=0
        )
        if type(values) is not list or not values or type(values[0]) is not int:
            raise ValueError("not a message")
        kind = _KINDS.get(values[0])
        if kind is None:
            raise ValueError(f"unknown message kind {values[0]}")
        checks = _FIELDS[kind]
        if len(values) != len(checks) + 1:
            raise ValueError(f"{kind.__name__} has {len(checks)} fields, not {len(values) - 1}")
        return kind(*(check(value) for (_, check), value in zip(checks, values[1:], strict=True)))
    except (ValueError, UsageError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"malformed header: {error}") from error


def neighbour(name: str) -> PeerId | None:
    """The peer named in an `Open`, None for the empty name."""
    return PeerId(name) if name else None
