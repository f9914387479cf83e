"""A TCP proxy on loopback that can drop traffic or reset connections at a chosen point."""

from __future__ import annotations

import asyncio
from enum import Enum
from types import TracebackType
from urllib.parse import urlsplit


class Mode(Enum):
    FORWARD = "forward"
    DROP_ANSWERS = "the server gets every byte, its answers are lost"
    DROP_ALL = "nothing gets through in either direction"
    RESET = "the server gets every byte, and the connection is reset instead of its answer"


class Proxy:
    """`requests` are the chunks that arrived, in order; `mode` may be changed at any time."""

    def __init__(self, server_url: str) -> None:
        self._server = urlsplit(server_url)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reset_at: bytes | None = None
        self._last_request: bytes | None = None
        self._last_mode = Mode.RESET
        self._addition: tuple[bytes, bytes] | None = None
        self._cut_before: bytes | None = None
        self.cuts = 0
        self.mode = Mode.FORWARD
        self.requests: list[bytes] = []
        self.connections = 0

    def move_to(self, server_url: str) -> None:
        """Connect new clients to another server. Open connections stay where they are."""
        self._server = urlsplit(server_url)

    def reset_at(self, answer: bytes) -> None:
        """Reset the connection when the server sends these bytes, instead of passing them on."""
        self._reset_at = answer

    def lose_answer_to(self, request: bytes, mode: Mode = Mode.RESET) -> None:
        """From the first request that contains these bytes on, reset connections instead of answering."""
        self._last_request = request
        self._last_mode = mode

    def cut_before(self, request: bytes | None) -> None:
        """Reset the connection at each request that contains these bytes; the server does not get it. None: no more."""
        self._cut_before = request

    def append_to(self, answer: bytes, extra: bytes) -> None:
        """After data that ends with `answer`, also send `extra`, which the server did not send."""
        self._addition = (answer, extra)

    def append_nothing(self) -> None:
        self._addition = None

    @property
    def url(self) -> str:
        """The server's URL, with this proxy's host and port."""
        credentials, _, _ = self._server.netloc.rpartition("@")
        here = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self._server._replace(netloc=f"{credentials}@{here}" if credentials else here).geturl()

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        usual_port = 6379 if self._server.scheme == "redis" else 5432
        try:
            upstream, to_server = await asyncio.open_connection(self._server.hostname, self._server.port or usual_port)
        except OSError:
            return writer.transport.abort()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests(reader, to_server, writer))
                group.create_task(self._replies(upstream, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            to_server.close()

    async def _requests(
        self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter, to_client: asyncio.StreamWriter
    ) -> None:
        while chunk := await reader.read(65536):
            self.requests.append(chunk)
            if self._last_request is not None and self._last_request in chunk:
                self.mode = self._last_mode
            if self._cut_before is not None and self._cut_before in chunk:
                self.cuts += 1
                raise ConnectionResetError  # it ends both directions
            if self.mode is not Mode.DROP_ALL:
                to_server.write(chunk)
                await to_server.drain()
        to_server.close()
        to_client.close()

    async def _replies(self, upstream: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        before = b""
        while chunk := await upstream.read(65536):
            found = self._reset_at is not None and self._reset_at in before + chunk
            before = chunk
            if self.mode is Mode.RESET or found:
                return to_client.transport.abort()
            if self.mode is Mode.FORWARD:
                added = self._addition[1] if self._addition is not None and chunk.endswith(self._addition[0]) else b""
                to_client.write(chunk + added)
                await to_client.drain()
        return to_client.close()
