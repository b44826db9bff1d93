"""One answer, and turns of a conversation: from ids to a running session to a stream of text.

A `Conversation` keeps its session over turns and sends only the ids that its stages do not hold
yet. Nor does a new session send what earlier ones of this client left there. A single request is a
conversation of one turn.

Beside the text every turn yields two figures: what its caller saw (`ttft_s`, `tokens_per_s`) and
how fast the ring was (`tpot_s`). They differ when the caller is slow to take the pieces, and only
the second may be held against the peers; `Meter` tells them apart.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from hexswarm.errors import HexswarmError, SessionClosed
from hexswarm.options import Options
from hexswarm.records import Route
from hexswarm.resume import whole
from hexswarm.router.explain import Budget
from hexswarm.runtime import OpenSession
from hexswarm.session import Emit, Turn
from hexswarm.tokenizer import TextStream
from hexswarm.trace import Repair

if TYPE_CHECKING:
    from hexswarm.client import AsyncClient
    from hexswarm.planning import Plan

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Text, chat messages of role and content, or token ids."""

MIN_TOKENS = 8
"""Fewer tokens say little about the time per token."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer and how it came about; `str()` is the text."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    finish: str
    """stop (end of text or a stop string), length, or cancelled."""
    route: Route
    ttft_s: float
    """Seconds from the call to the first token."""
    tokens_per_s: float
    """Rate after the first token; 0 if there was only one."""
    reused_tokens: int = 0
    """Prompt tokens whose KV an earlier turn, or an earlier answer, had left at the stages."""
    session: str = ""
    """Its name: `hexswarm why --trace NAME` tells where the time went."""
    tpot_s: float | None = None
    """Median seconds per token as the ring gave them, however slowly they were taken; None if there
    were fewer than eight, or all came in one read."""
    predicted: Budget | None = None
    """What the router had predicted, hop by hop, for the route at the end."""
    mends: tuple[Repair, ...] = ()
    """Peers that were lost or left on the way, and who took over."""

    def __str__(self) -> str:
        return self.text


class Answer:
    """Pieces of text as they come; `completion` is complete after the last one."""

    def __init__(self, source: AsyncGenerator[str | Completion, None]) -> None:
        self._source = source
        self._completion: Completion | None = None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        async for item in self._source:
            if isinstance(item, Completion):
                self._completion = item
                continue
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel: the peers stop and free what they hold."""
        await self._source.aclose()

    @property
    def completion(self) -> Completion:
        if self._completion is None:
            raise SessionClosed("the answer is not complete")
        return self._completion


class Conversation:
    """Turns of one session: each turn sends only the ids that the stages do not hold yet."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._session: OpenSession | None = None
        self._plan: Plan
        """Which the session follows."""
        self._busy = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Answer the whole conversation so far, given as messages, text or ids."""
        answer = self.stream(prompt, **options)
        async for _ in answer:
            continue
        return answer.completion

    def stream(self, prompt: Prompt, **options: Any) -> Answer:
        return Answer(self._answer(prompt, Options(**options)))

    async def close(self) -> None:
        """Free the peers, once they have told where the time of the last turn went."""
        if self._session is not None:
            self._client._tracer.close_session(self._session)
            self._session = None

    async def _answer(
        self, prompt: Prompt, options: Options
    ) -> AsyncGenerator[str | Completion, None]:
        if self._busy:
            raise SessionClosed("the conversation is busy", remedy="wait for the turn to end")
        self._busy = True
        try:
            async with contextlib.aclosing(self._turn(prompt, options)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._busy = False

    async def _turn(
        self, prompt: Prompt, options: Options
    ) -> AsyncGenerator[str | Completion, None]:
        client, clock = self._client, self._client._clock
        meter = Meter(clock.monotonic())
        sampling = options.sampling()
        await client.start()
        ids = await client.ids(prompt)
        client.check_context(len(ids), options.max_new_tokens)
        session, position = await self._ready(ids, options)
        stops = client.tokenizer.stop_ids
        turn = Turn(
            position=position,
            ids=tuple(ids[position:]),
            max_new=options.max_new_tokens,
            sampling=sampling,
            stop_ids=tuple(sorted(stops)),
            history=tuple(ids),
        )
        text = TextStream(client.tokenizer, stop=options.stops)
        mends: tuple[Repair, ...] = ()
        try:
            client._mender.begin(session, self._plan, turn)
            session.generate(turn)
            while not meter.finish:
                event = await session.wait()
                if not isinstance(event, Emit) or event.token is None:
                    continue
                meter.token(event.token, event.arrived_s, clock.monotonic())
                meter.finish = event.finish
                piece = "" if event.token in stops else text.push(event.token)
                if text.stopped:
                    meter.finish = "stop"
                if piece:
                    meter.pieces.append(piece)
                    yield piece
            rest = text.finish()
            if rest:
                meter.pieces.append(rest)
                yield rest
        finally:
            mends = self._settle(session)
        completion = replace(self._complete(session, len(ids), position, meter), mends=mends)
        client._after(session, self._plan, completion)
        yield completion

    def _complete(
        self, session: OpenSession, prompt_tokens: int, reused: int, meter: Meter
    ) -> Completion:
        return Completion(
            text="".join(meter.pieces),
            ids=tuple(meter.ids),
            prompt_tokens=prompt_tokens,
            finish=meter.finish,
            route=session.route,
            ttft_s=meter.ttft_s,
            tokens_per_s=meter.rate,
            reused_tokens=reused,
            session=session.name,
            tpot_s=meter.tpot_s,
            predicted=self._plan.budget(),
        )

    async def _ready(self, ids: Sequence[int], options: Options) -> tuple[OpenSession, int]:
        """The session to use and how many of `ids` its stages hold already."""
        session, new_tokens = self._session, options.max_new_tokens
        if session is not None and not self._fits(session, options):
            await self.close()
            session = None
        if session is not None and len(ids) + new_tokens > session.machine.kv_tokens:
            try:
                self._client._planner.asked(session)
                longer = session.extend(len(ids) + new_tokens)
                within_s = self._client.config.connect_s
                await self._client._opener.vigil.wait(session, longer, within_s)
                self._client._planner.answered(session)
            except (HexswarmError, TimeoutError):  # a new session may do better
                await self.close()
                session = None
        if session is None:
            session, self._plan = await self._client._open(ids, new_tokens, options)
            self._session = session
        machine = session.machine
        return session, whole(min(_common(machine.cached, ids), len(ids) - 1), machine.named)

    def _fits(self, session: OpenSession, options: Options) -> bool:
        """It can go on, and its route was chosen for the same wishes."""
        going = session.machine.open and not session.machine.leaving
        asked = self._plan.request
        return going and all(
            getattr(asked, name) == value for name, value in options.request().items()
        )

    def _settle(self, session: OpenSession) -> tuple[Repair, ...]:
        """After a turn: stop what still runs; a failed session is of no further use."""
        mends: tuple[Repair, ...] = ()
        if (kept := self._client._mender.end(session)) is not None:
            self._plan, mends = kept
        if session.machine.running:
            session.cancel()
        if session.machine.failed is not None:
            session.close()
            self._session = None
        return mends


class Meter:
    """What came of one answer, and when.

    The caller's figures count from when a token was taken. The pace of the ring is that of their
    arrival: the time between two reads of the network, over the tokens that the second brought.
    """

    def __init__(self, began_s: float) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.finish = ""
        self._began_s = began_s
        self._first_s = self._last_s = began_s
        self._arrivals: dict[float, int] = {}
        """How many tokens had come by each moment at which some came."""

    def token(self, token: int, arrived_s: float, now: float) -> None:
        """A token that arrived at `arrived_s` and is taken now."""
        if not self.ids:
            self._first_s = now
        self.ids.append(token)
        self._last_s = now
        self._arrivals[arrived_s] = len(self.ids)

    @property
    def ttft_s(self) -> float:
        return self._first_s - self._began_s

    @property
    def tpot_s(self) -> float | None:
        """Median seconds per token of the ring; None if there were too few tokens or reads."""
        if len(self.ids) < MIN_TOKENS or len(self._arrivals) < 2:
            return None
        reads = itertools.pairwise(self._arrivals.items())
        return statistics.median((b_s - a_s) / (b - a) for (a_s, a), (b_s, b) in reads)

    @property
    def rate(self) -> float:
        spent_s = self._last_s - self._first_s
        return (len(self.ids) - 1) / spent_s if spent_s > 0 else 0.0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
