"""The developer's door in asyncio: text or messages in, a stream of text out.

    async with AsyncClient(bootstrap=[...]) as client:
        answer = client.stream("The capital of France is", max_new_tokens=8)
        async for piece in answer:
            print(piece, end="")
        print(answer.completion.route)

One client serves many requests at once over shared links. A request is a session opened along the
route that the router found; if a stage refuses or cannot be reached before the first token, the
next-best route is taken at once without it. Once tokens have come, a lost peer ends the request
with a typed error. `Conversation` keeps a session over turns and sends only what is new.

`hexswarm.blocking` wraps all this for code without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from hexswarm.clock import RealClock
from hexswarm.config import DEFAULT_MODEL, ClientConfig
from hexswarm.errors import (
    ContextTooLong,
    HexswarmError,
    NetworkError,
    NoRoute,
    PeerLost,
    Refused,
    SessionClosed,
    UsageError,
)
from hexswarm.membership import Membership
from hexswarm.records import Link, PeerId, Route, RouteRequest, Sampling
from hexswarm.router.network import Snapshot, snapshot
from hexswarm.router.routing import find_route
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.session import Emit, EmitLogits, Turn
from hexswarm.store import ModelFolder, resolve
from hexswarm.tokenizer import TextStream, Tokenizer, load_tokenizer
from hexswarm.version import __version__

if TYPE_CHECKING:
    import numpy as np

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Text, chat messages of role and content, or token ids."""

ATTEMPTS = 4
"""Routes that may refuse one session before the last refusal is the answer."""
SEARCH_S = 20.0
"""So long dead peers, which the directory names for another minute or two, are passed over."""
STALE_S = 30.0
"""A request waits for a fresh reading of the directory if the last one is older than this; the
background reading comes every 10 s."""
STALL_S = 300.0
"""Longest wait for the next token while every peer is alive."""


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
    """Prompt tokens whose KV an earlier turn had left at the stages."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asks for besides its prompt."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (name == "seed" and value is None):
                raise UsageError(f"{name} = {value!r} is not a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), int | float):
                raise UsageError(f"{name} = {getattr(self, name)!r} is not a number")
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens} is below 1")
        if not isinstance(self.stop, str | Sequence) or not all(
            isinstance(text, str) and text for text in self.stops
        ):
            raise UsageError("stop strings are texts and not empty")
        self.sampling()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> Sampling:
        """Raises UsageError if a value is out of range. No seed means a fresh one."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )


class AsyncClient:
    """A client of one swarm and one model."""

    def __init__(
        self,
        bootstrap: Sequence[str] = (),
        *,
        model: str = DEFAULT_MODEL,
        home: str | Path | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        if isinstance(bootstrap, str):
            raise UsageError("bootstrap is a list of addresses, not one text")
        self.config = config or ClientConfig(
            bootstrap=tuple(bootstrap), model=model, home=Path(home) if home else None
        )
        self._clock = RealClock()
        self._runtime = SessionRuntime()
        self._member = Membership(self.config, self._clock, software=f"hexswarm/{__version__}")
        self._rng = random.Random()
        self._starting: asyncio.Lock = asyncio.Lock()
        self._folder: ModelFolder | None = None
        self._tokenizer: Tokenizer | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Resolve the model and join the swarm; done once, `generate` calls it too.

        Raises UnknownModel, BootstrapUnreachable, NetworkError or UsageError.
        """
        async with self._starting:
            if self._folder is not None:
                return
            folder = await asyncio.to_thread(
                resolve, self.config.model, home=self.config.cache, weights=False
            )
            self._tokenizer = await asyncio.to_thread(load_tokenizer, folder)
            await self._join()
            try:
                self._member.follow(folder.spec.digest)
                await self._member.refresh(folder.spec.digest)
            except BaseException:
                await self._member.close()
                raise
            self._folder = folder

    async def _join(self) -> None:
        if not self.config.bootstrap and not (self.config.folder / "peers.json").exists():
            raise UsageError(
                "no bootstrap address is known",
                remedy="give bootstrap=[...] or --bootstrap; `hexswarm bootstrap` prints one",
            )
        await self._member.join(
            self._runtime.on_frames, self._runtime.on_lost, silence_s=self.config.silence_s
        )
        self._runtime.links = self._member.links

    async def close(self) -> None:
        """End all sessions and leave the swarm."""
        if self._folder is not None:
            self._runtime.close_all()
        await self._member.close()
        self._folder = None

    # --- requests -------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """The whole answer to `prompt`; options as in `Options`.

        Raises UsageError (ContextTooLong), NoRoute, Refused, PeerLost or another NetworkError.
        """
        answer = self.stream(prompt, **options)
        async for _ in answer:
            continue
        return answer.completion

    def stream(self, prompt: Prompt, **options: Any) -> Answer:
        """The answer as it is made. Leaving the iteration early cancels and frees the peers."""
        return Answer(self._once(prompt, Options(**options)))

    async def _once(
        self, prompt: Prompt, options: Options
    ) -> AsyncGenerator[str | Completion, None]:
        conversation = Conversation(self)
        try:
            async with contextlib.aclosing(conversation._answer(prompt, options)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            await conversation.close()

    def conversation(self) -> Conversation:
        """A session over several turns that reuses the KV of the turns before."""
        return Conversation(self)

    async def logits(
        self, prompt: Prompt, max_new_tokens: int = 256
    ) -> AsyncGenerator[np.ndarray[Any, Any], int | None]:
        """Client loop: yields float32 logits of each step and takes the chosen token.

        `asend(token)` chooses; plain iteration takes the most likely token. Ends after
        `max_new_tokens` steps or once a stop token was chosen.
        """
        import numpy as np

        Options(max_new_tokens=max_new_tokens)  # raises UsageError
        await self.start()
        ids = self.encode(prompt)
        self.check_context(len(ids), max_new_tokens)
        session = await self._open(len(ids), max_new_tokens, client_loop=True)
        try:
            greedy, stops = Sampling(), self.tokenizer.stop_ids
            session.generate(Turn(0, tuple(ids), max_new_tokens, greedy, ()))
            for _ in range(max_new_tokens):
                event = await self._next(session)
                if not isinstance(event, EmitLogits):
                    continue
                row = np.frombuffer(event.data, dtype="<f4")
                chosen = yield row
                token = int(row.argmax()) if chosen is None else int(chosen)
                if token in stops:
                    return
                session.feed(token)
        finally:
            session.close()

    async def snapshot(self) -> Snapshot:
        """Who serves what, as known now."""
        await self.start()
        await self._member.refresh(self.spec_digest, older_s=STALE_S)
        return self._view()

    # --- parts of a request -----------------------------------------------------------------------

    @property
    def folder(self) -> ModelFolder:
        if self._folder is None:
            raise SessionClosed("the client is not started", remedy="use `async with` or start()")
        return self._folder

    @property
    def spec_digest(self) -> str:
        return self.folder.spec.digest

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises UsageError for anything else."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt)
        elif prompt and all(type(item) is int for item in prompt):
            ids = cast(list[int], list(prompt))
            vocabulary = self.folder.spec.vocabulary
            if not all(0 <= item < vocabulary for item in ids):
                raise UsageError(f"a token id is outside 0-{vocabulary - 1}")
        else:
            ids = self.tokenizer.encode_chat(cast(Sequence[Mapping[str, str]], prompt))
        if not ids:
            raise UsageError("the prompt is empty")
        return ids

    def check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        limit = self.folder.spec.context
        if prompt_tokens + new_tokens > limit:
            raise ContextTooLong(prompt_tokens, new_tokens, limit)

    def _view(self) -> Snapshot:
        links = self._member.links.rtts
        return snapshot(
            self._member.alive(),
            _own_links(self._member.transport.local, links),
            self._clock.wall(),
        )

    async def _open(
        self, prompt_tokens: int, new_tokens: int, *, client_loop: bool = False
    ) -> OpenSession:
        """A session with room for prompt and answer, along the best route that accepts it."""
        await self._member.refresh(self.spec_digest, older_s=STALE_S)
        deny: set[PeerId] = set()
        refusal: Refused | PeerLost | None = None
        refusals, give_up_s = 0, self._clock.monotonic() + SEARCH_S
        while refusals < ATTEMPTS and self._clock.monotonic() < give_up_s:
            try:
                route = await self._route(prompt_tokens, new_tokens, frozenset(deny))
            except NoRoute:
                if refusal is not None:
                    raise refusal from None
                raise
            session = self._runtime.open(
                route, self.spec_digest, prompt_tokens + new_tokens, client_loop=client_loop
            )
            try:
                await self._opened(session)
            except (Refused, PeerLost) as error:
                refusal = error
                refusals += isinstance(error, Refused)
                deny.add(PeerId(error.peer))
                self._forget_lost(error)
            else:
                return session
        assert refusal is not None
        raise refusal

    async def _route(self, prompt_tokens: int, new_tokens: int, deny: frozenset[PeerId]) -> Route:
        """The best route without the peers in `deny`. Raises NoRoute."""
        spec = self.folder.spec
        request = RouteRequest(
            model=spec.digest,
            layers=spec.layers,
            hidden_bytes=spec.hidden * 4,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            client=self._member.transport.local,
            model_name=spec.name,
            deny=deny,
        )
        try:
            return find_route(self._view(), request, self._clock.monotonic(), self._rng)
        except NoRoute:
            if deny:
                raise
            await self._member.refresh(spec.digest)  # a peer may have come since
            return find_route(self._view(), request, self._clock.monotonic(), self._rng)

    async def _opened(self, session: OpenSession) -> None:
        """Wait until the session is open; it is closed if it does not come to that."""
        try:
            async with asyncio.timeout(self.config.connect_s):
                await session.ready()
        except TimeoutError:
            silent = session.machine.silent
            if not silent:
                return  # the last one answered at that very moment
            session.close()
            # A stage also keeps silent while it waits for the next one: blame one without a link.
            connected = self._member.links.connected
            stage = next((stage for stage in silent if not connected(stage.peer)), silent[0])
            how = f"did not open within {self.config.connect_s:.0f} s"
            raise PeerLost(stage.peer, (stage.span.first, stage.span.end), how) from None
        except BaseException:
            session.close()
            raise

    def _forget_lost(self, error: Exception) -> None:
        """A peer that was seen dead is not used again until it announces itself anew."""
        if isinstance(error, PeerLost):
            self._member.directory.forget(PeerId(error.peer))

    async def _next(self, session: OpenSession) -> object:
        try:
            async with asyncio.timeout(STALL_S):
                return await session.wait()
        except TimeoutError:
            session.close()
            raise NetworkError(f"no token for {STALL_S:.0f} s", remedy="try again") from None
        except PeerLost as error:
            self._forget_lost(error)
            raise


def _own_links(local: PeerId, rtts: Mapping[PeerId, float]) -> dict[tuple[PeerId, PeerId], Link]:
    return {(local, peer): Link(rtt) for peer, rtt in rtts.items()}


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
        """Free the peers."""
        if self._session is not None:
            self._session.close()
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
        client, began_s = self._client, time.monotonic()
        sampling = options.sampling()
        await client.start()
        ids = client.encode(prompt)
        client.check_context(len(ids), options.max_new_tokens)
        session, position = await self._ready(ids, options.max_new_tokens)
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
        meter = _Meter(began_s)
        finish = ""
        session.generate(turn)
        try:
            while not finish:
                event = await client._next(session)
                if not isinstance(event, Emit) or event.token is None:
                    continue
                meter.token(event.token, time.monotonic())
                finish = event.finish
                piece = "" if event.token in stops else text.push(event.token)
                if text.stopped:
                    finish = "stop"
                if piece:
                    meter.pieces.append(piece)
                    yield piece
            rest = text.finish()
            if rest:
                meter.pieces.append(rest)
                yield rest
        finally:
            self._settle(session)
        yield Completion(
            text="".join(meter.pieces),
            ids=tuple(meter.ids),
            prompt_tokens=len(ids),
            finish=finish,
            route=session.route,
            ttft_s=meter.ttft_s,
            tokens_per_s=meter.rate,
            reused_tokens=position,
        )

    async def _ready(self, ids: Sequence[int], new_tokens: int) -> tuple[OpenSession, int]:
        """The session to use and how many of `ids` its stages hold already."""
        session = self._session
        if session is not None and (not session.machine.open or session.machine.leaving):
            await self.close()
            session = None
        if session is not None:
            try:
                async with asyncio.timeout(self._client.config.connect_s):
                    await session.extend(len(ids) + new_tokens)
            except (HexswarmError, TimeoutError):  # a new session may do better
                await self.close()
                session = None
        if session is None:
            session = self._session = await self._client._open(len(ids), new_tokens)
        return session, min(_common(session.machine.cached, ids), len(ids) - 1)

    def _settle(self, session: OpenSession) -> None:
        """After a turn: stop what still runs; a failed session is of no further use."""
        if session.machine.running:
            session.cancel()
        if session.machine.failed is not None:
            session.close()
            self._session = None


class _Meter:
    """What came of one answer, and when."""

    def __init__(self, began_s: float) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self._began_s = began_s
        self._first_s = self._last_s = began_s

    def token(self, token: int, now: float) -> None:
        if not self.ids:
            self._first_s = now
        self.ids.append(token)
        self._last_s = now

    @property
    def ttft_s(self) -> float:
        return self._first_s - self._began_s

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
