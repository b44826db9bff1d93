"""The developer's door without an event loop: `Client` and `generate`.

A `Client` runs its `AsyncClient` in a thread of its own and may be used from many threads at once.
`generate` keeps one client for each (bootstrap, model, home) alive until the process ends, because
starting one takes seconds (a libp2p daemon, the DHT, the tokenizer).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from hexswarm.client import AsyncClient
from hexswarm.config import DEFAULT_MODEL, ClientConfig, default_bootstrap
from hexswarm.conversation import Answer, Completion, Conversation, Prompt
from hexswarm.errors import SessionClosed, UsageError
from hexswarm.planning import Plan
from hexswarm.records import Coordinates, ModelSpec
from hexswarm.router.explain import Explanation
from hexswarm.router.network import Snapshot
from hexswarm.trace import LAST, SessionTrace

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

CLOSE_S = 10.0


class Client:
    """A client of one swarm and one model; thread-safe, reusable, closed by `with` or `close()`."""

    def __init__(
        self,
        bootstrap: Sequence[str] = (),
        *,
        model: str = DEFAULT_MODEL,
        home: str | Path | None = None,
        config: ClientConfig | None = None,
    ) -> None:
        self._client = AsyncClient(bootstrap, model=model, home=home, config=config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="hexswarm-client", daemon=True)
        self._thread.start()
        self._closed = False

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Join the swarm now instead of at the first request."""
        self._wait(self._client.start())

    def close(self) -> None:
        """End all requests and leave the swarm; may be called twice."""
        if self._closed:
            return
        self._closed = True
        future = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        with contextlib.suppress(Exception):  # the process may be ending in any state
            future.result(CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    async def _shut_down(self) -> None:
        await self._client.close()
        await self._loop.shutdown_asyncgens()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # hivemind leaves some behind
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Stream: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Any
    ) -> Completion | Stream:
        """The answer to `prompt`: whole, or with `stream=True` an iterator of its pieces."""
        if options.pop("loop", "ring") == "client":
            raise UsageError("loop='client' yields logits", remedy="call Client.logits")
        if stream:
            return Stream(self, self._client.stream(prompt, **options))
        return self._wait(self._client.generate(prompt, **options))

    def logits(
        self, prompt: Prompt, max_new_tokens: int = 256
    ) -> Generator[np.ndarray[Any, Any], int | None, None]:
        """Client loop: yields logits, takes the chosen token by `send` (None: the most likely)."""
        source: AsyncGenerator[Any, int | None] = self._client.logits(prompt, max_new_tokens)
        chosen: int | None = None
        try:
            while True:
                try:
                    row: np.ndarray[Any, Any] = self._wait(source.asend(chosen))
                except StopAsyncIteration:
                    return
                chosen = yield row
        finally:
            self._wait(source.aclose())

    def conversation(self) -> BlockingConversation:
        """A session over several turns that reuses the KV of the turns before."""
        return BlockingConversation(self, self._client.conversation())

    @property
    def spec(self) -> ModelSpec:
        """The model that this client asks for."""
        return self._client.folder.spec

    def snapshot(self) -> Snapshot:
        """Who serves what, as known now."""
        return self._wait(self._client.snapshot())

    def count(self, prompt: Prompt) -> int:
        """Tokens of a prompt."""
        self.start()
        return len(self._client.encode(prompt))

    def plan(self, prompt_tokens: int, new_tokens: int = 256, **wishes: Any) -> Plan:
        """The route that such a request would take, without taking it; wishes as in `generate`.

        Raises NoRoute or UsageError.
        """
        return self._wait(self._client.plan(prompt_tokens, new_tokens, **wishes))

    def explain(
        self, prompt_tokens: int, new_tokens: int = 256, **wishes: Any
    ) -> tuple[Snapshot, Explanation]:
        """Why that route, or why there is none; and the view of the swarm it is said of."""
        return self._wait(self._client.explain(prompt_tokens, new_tokens, **wishes))

    @property
    def coordinates(self) -> Coordinates | None:
        """Where this client is in the swarm's delay space, if that is known yet."""
        return self._client._planner.coordinates

    def trace(self, session: str = LAST) -> SessionTrace:
        """Where the time of an answer went, by the name in its `Completion`.

        Raises UsageError if there is none.
        """
        return self._wait(self._client.trace(session))

    def _wait(self, work: Coroutine[Any, Any, T] | Any) -> T:
        """Run `work` in the client's loop; Ctrl-C cancels it there."""
        if self._closed:
            if asyncio.iscoroutine(work):
                work.close()
            raise SessionClosed("the client is closed")

        async def run() -> T:
            result: T = await work
            return result

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


class Stream(Iterator[str]):
    """Pieces of an answer; `completion` is there after the last one, `close()` cancels."""

    def __init__(self, client: Client, answer: Answer) -> None:
        self._client = client
        self._answer = answer
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        try:
            return self._client._wait(self._answer.__anext__())
        except StopAsyncIteration:
            self._ended = True
            raise StopIteration from None
        except BaseException:
            self._ended = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel: the peers stop and free what they hold."""
        if not self._ended and not self._client._closed:
            self._ended = True
            self._client._wait(self._answer.aclose())

    def __del__(self) -> None:
        if not self._ended and not self._client._closed:
            self._ended = True
            asyncio.run_coroutine_threadsafe(self._answer.aclose(), self._client._loop)

    @property
    def completion(self) -> Completion:
        return self._answer.completion


class BlockingConversation:
    """`Conversation` without an event loop."""

    def __init__(self, client: Client, conversation: Conversation) -> None:
        self._client = client
        self._conversation = conversation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Completion: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Stream: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Any
    ) -> Completion | Stream:
        """Answer the whole conversation so far, given as messages, text or ids."""
        if stream:
            return Stream(self._client, self._conversation.stream(prompt, **options))
        return self._client._wait(self._conversation.generate(prompt, **options))

    def close(self) -> None:
        """Free the peers."""
        if not self._client._closed:
            self._client._wait(self._conversation.close())


_clients: dict[tuple[tuple[str, ...], str, str], Client] = {}
_clients_lock = threading.Lock()


def generate(
    prompt: Prompt,
    *,
    model: str = DEFAULT_MODEL,
    bootstrap: Sequence[str] | None = None,
    home: str | Path | None = None,
    stream: bool = False,
    loop: Literal["ring", "client"] = "ring",
    **options: Any,
) -> Any:
    """Generate an answer in the swarm.

    `prompt` is text, a list of chat messages, or token ids. `bootstrap` defaults to the addresses
    in HEXSWARM_BOOTSTRAP (separated by commas), then to the peers remembered on disk.

    Options: `max_new_tokens` (256), `temperature` (0: greedy), `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `stop` (text or texts), `seed`; for the route `max_latency` (seconds per
    token) and `ttft` (seconds to the first token), kept in `percentile` (95) of the time, `allow`,
    `deny` and `trusted` (peer ids), `dtypes`, `min_bandwidth` (bytes per second). With a limit the
    route that takes least from others within it is used, without one the fastest.

    Returns a `Completion` (its `str()` is the text); with `stream=True` an iterator of pieces of
    text; with `loop="client"` a generator of float32 logits that takes the chosen token by `send`.

    Raises UsageError (ContextTooLong), UnknownModel, BootstrapUnreachable, NoRoute, Refused or
    PeerLost, all of them HexswarmError.
    """
    if loop not in ("ring", "client"):
        raise UsageError(f"loop = {loop!r}", remedy='use "ring" or "client"')
    client = _client(model, bootstrap, home)
    if loop == "client":
        return client.logits(prompt, options.get("max_new_tokens", 256))
    if stream:
        return client.generate(prompt, stream=True, **options)
    return client.generate(prompt, **options)


def _client(model: str, bootstrap: Sequence[str] | None, home: str | Path | None) -> Client:
    if isinstance(bootstrap, str):
        raise UsageError("bootstrap is a list of addresses, not one text")
    addresses = default_bootstrap() if bootstrap is None else tuple(bootstrap)
    key = (addresses, model, os.fspath(home or ""))
    with _clients_lock:
        client = _clients.get(key)
        if client is None or client._closed:
            client = Client(addresses, model=model, home=home)
            _clients[key] = client
            if len(_clients) == 1:
                atexit.register(_close_all)
    try:
        client.start()
    except BaseException:
        with _clients_lock:
            _clients.pop(key, None)
        client.close()
        raise
    return client


def _close_all() -> None:
    for client in list(_clients.values()):
        client.close()
