"""The door through which Prometheus reads: GET /metrics over HTTP/1.1, and nothing else.

A server of its own, since what is needed is one path and one answer, and a framework would be a
dependency of every volunteer. It listens on the loopback unless told otherwise: the numbers name
nobody, but they tell when somebody is there. A stranger who reaches it all the same can make it
hold `MOST` requests of `HEAD_BYTES` for `REQUEST_S` each; one more connection is closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from hexswarm.errors import UsageError
from hexswarm.metrics import CONTENT_TYPE, Metric, exposition

HEAD_BYTES = 4096
REQUEST_S = 5.0
MOST = 8


class Scrapes:
    """Serves what `collect` says at each request, from `start` until `close`."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect
        self._server: asyncio.Server | None = None
        self._open = 0

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which is another one than asked for if that was 0."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_BYTES)
        except OSError as error:
            raise UsageError(
                f"metrics cannot be served on {host}:{port}: {error.strerror or error}",
                remedy="choose another --metrics-port",
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._open < MOST:
                self._open += 1
                try:
                    async with asyncio.timeout(REQUEST_S):
                        await self._answer(reader, writer)
                finally:
                    self._open -= 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, slow or no HTTP client
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(response(head, self._collect))
        await writer.drain()


def response(head: bytes, collect: Callable[[], Iterable[Metric]]) -> bytes:
    """The answer to a request with this head; the connection ends with it."""
    method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return _message("405 Method Not Allowed", "only GET\n", ("Allow: GET, HEAD",))
    if path != b"/metrics":
        return _message("404 Not Found", "metrics are at /metrics\n")
    text = exposition(collect())
    return _message("200 OK", text, (), CONTENT_TYPE, body=method == b"GET")


def _message(
    status: str,
    text: str,
    fields: tuple[str, ...] = (),
    kind: str = "text/plain; charset=utf-8",
    *,
    body: bool = True,
) -> bytes:
    data = text.encode()
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(data)}",
        "Connection: close",
        *fields,
    )
    return "\r\n".join((*lines, "", "")).encode() + (data if body else b"")
