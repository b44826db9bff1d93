"""The developer's door in asyncio: text or messages in, a stream of text out.

    async with AsyncClient(bootstrap=[...]) as client:
        answer = client.stream("The capital of France is", max_new_tokens=8, max_latency=0.25)
        async for piece in answer:
            print(piece, end="")
        print(answer.completion.route)

One client serves many requests at once over shared links. A request is a session opened along the
route that the router found (`hexswarm.planning`); if a stage refuses or cannot be reached before
the first token, the next-best route is taken at once without it (`hexswarm.opening`). If a peer is
lost later, another takes its place and the answer goes on (`hexswarm.failover`). What an answer
teaches (how fast its peers were, where the time went) serves the next one (`hexswarm.tracing`).

`hexswarm.blocking` wraps all this for code without an event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from hexswarm.clock import RealClock
from hexswarm.config import DEFAULT_MODEL, ClientConfig
from hexswarm.conversation import Answer, Completion, Conversation, Prompt
from hexswarm.errors import (
    ContextTooLong,
    SessionClosed,
    UsageError,
)
from hexswarm.failover import Mender
from hexswarm.membership import Membership
from hexswarm.opening import Opener
from hexswarm.options import Options, Wishes
from hexswarm.planning import Plan, Planner, without_habits
from hexswarm.records import RouteRequest, Sampling
from hexswarm.router.explain import Explanation
from hexswarm.router.network import Snapshot
from hexswarm.runtime import OpenSession, SessionRuntime
from hexswarm.session import EmitLogits, Turn
from hexswarm.store import ModelFolder, resolve
from hexswarm.tokenizer import Tokenizer, load_tokenizer
from hexswarm.trace import LAST, SessionTrace, load
from hexswarm.tracing import Tracer, draft
from hexswarm.version import __version__

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

STALE_S = 30.0
"""A request waits for a fresh reading of the directory if the last one is older than this; the
background reading comes every 10 s."""


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
        self._member = Membership(self.config, RealClock(), software=f"hexswarm/{__version__}")
        self._clock = self._member.clock
        self._runtime = SessionRuntime(self._clock)
        self._tracer = Tracer(self.config.folder / "traces")
        self._set_up(random.Random())
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
            self._planner.start()
            self._runtime.closed = False
            self._folder = folder

    def _set_up(self, rng: random.Random) -> None:
        """What chooses, opens and mends."""
        self._planner = Planner(self._member, self._runtime, self._clock, rng)
        parts = self._planner, self._member, self._runtime, self._clock
        self._opener = Opener(*parts, rng, patience_s=self.config.patience_s)
        self._mender = Mender(*parts, repair_s=self.config.repair_s)

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
            await self._mender.close()
            await self._planner.close()
            await self._tracer.close()
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

        options = Options(max_new_tokens=max_new_tokens)  # raises UsageError
        await self.start()
        ids = await self.ids(prompt)
        self.check_context(len(ids), max_new_tokens)
        session, plan = await self._open(ids, max_new_tokens, options, client_loop=True)
        try:
            known = len(session.machine.cached)
            turn, stops = (
                Turn(known, tuple(ids[known:]), max_new_tokens, Sampling(), ()),
                self.tokenizer.stop_ids,
            )
            self._mender.begin(session, plan, turn)
            session.generate(turn)
            for _ in range(max_new_tokens):
                event = await session.wait()
                if not isinstance(event, EmitLogits):
                    continue
                row = np.frombuffer(event.data, dtype="<f4")
                chosen = yield row
                token = int(row.argmax()) if chosen is None else int(chosen)
                if token in stops:
                    return
                session.feed(token)
        finally:
            self._mender.end(session)
            session.close()

    # --- looking without asking -----------------------------------------------------------------

    async def snapshot(self) -> Snapshot:
        """Who serves what, as known now."""
        await self.start()
        await self._look()
        return self._planner.snapshot()

    async def plan(self, prompt_tokens: int, new_tokens: int = 256, **wishes: Any) -> Plan:
        """The route that such a request would take, without taking it; wishes as in `Wishes`.

        Raises UsageError (ContextTooLong) or NoRoute.
        """
        return await self._planner.plan(await self._dry(prompt_tokens, new_tokens, wishes))

    async def explain(
        self, prompt_tokens: int, new_tokens: int = 256, **wishes: Any
    ) -> tuple[Snapshot, Explanation]:
        """Why that route, or why there is none; and the view of the swarm it is said of."""
        return await self._planner.explain(await self._dry(prompt_tokens, new_tokens, wishes))

    async def _dry(
        self, prompt_tokens: int, new_tokens: int, wishes: Mapping[str, Any]
    ) -> RouteRequest:
        checked = Wishes(**wishes)
        await self.start()
        self.check_context(prompt_tokens, new_tokens)
        await self._look()
        spec = self.folder.spec
        return without_habits(self._planner.request(spec, prompt_tokens, new_tokens, checked))

    async def trace(self, session: str = LAST) -> SessionTrace:
        """Where the time of an answer went, by the name in its `Completion`; it may be weeks old.

        Raises UsageError if there is none.
        """
        await self._tracer.settle()
        return load(self._tracer.folder, session)

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

    async def ids(self, prompt: Prompt) -> list[int]:
        """`encode`, without holding up the loop: a chat template may take seconds."""
        if isinstance(prompt, str) or all(type(item) is int for item in prompt):
            return self.encode(prompt)
        return await asyncio.to_thread(self.encode, prompt)

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

    async def _look(self) -> None:
        """Read the directory if the last reading is old; an old view is better than no answer."""
        try:
            await self._member.refresh(self.spec_digest, older_s=STALE_S)
        except Exception as error:  # hivemind raises many kinds
            log.warning("reading the directory failed: %r", error)

    async def _open(
        self, ids: Sequence[int], new_tokens: int, wishes: Wishes, *, client_loop: bool = False
    ) -> tuple[OpenSession, Plan]:
        """A session with room for prompt and answer, along the best route that accepts it."""
        await self._look()
        request = self._planner.request(self.folder.spec, len(ids), new_tokens, wishes)
        connect_s = self.config.connect_s
        return await self._opener.open(request, connect_s, client_loop=client_loop, prompt=ids)

    # --- after an answer --------------------------------------------------------------------------

    def _after(self, session: OpenSession, plan: Plan, completion: Completion) -> None:
        """Learn from a finished turn, and have its stages tell where the time went."""
        if session.machine.failed is not None:
            return
        self._planner.use(plan.route)
        announced = self._planner.announced(plan)
        mended = bool(completion.mends)  # then its time says little of who served at the end
        if completion.tpot_s is not None and not mended:
            self._planner.observed(plan, announced, completion.tpot_s)

        def told(trace: SessionTrace) -> None:
            computed = {hop.peer: hop.measured.compute_s for hop in trace.hops if hop.measured}
            if not mended:
                self._planner.told(announced, computed)

        name, now = self.folder.spec.name, self._clock.wall()
        self._tracer.begin(session, draft(plan, completion, name, now), told)
