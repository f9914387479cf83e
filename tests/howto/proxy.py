"""A TCP proxy before Redis that loses one kind of answer, as a network does at the worst moment."""

from __future__ import annotations

import asyncio
from types import TracebackType
from urllib.parse import urlsplit


class AnswerLost:
    """Forwards all commands. Once one has `to` in it, the answer is awaited, dropped, and the connection cut."""

    def __init__(self, redis_url: str, to: bytes) -> None:
        address = urlsplit(redis_url)
        self._host, self._port = address.hostname, address.port
        self._to = to

    async def __aenter__(self) -> AnswerLost:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._server.close()

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        redis, to_redis = await asyncio.open_connection(self._host, self._port)
        try:
            while command := await client.read(65536):
                to_redis.write(command)
                answer = await redis.read(65536)
                if self._to in command:
                    break
                to_client.write(answer)
        finally:
            to_client.close()
            to_redis.close()
