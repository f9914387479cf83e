"""TLS termination for servers that are built without TLS, as the embedded ones are."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Coroutine
from typing import Any

import trustme

SSL_REQUEST = bytes.fromhex("0000000804d2162f")


class Certificates:
    """A certificate authority, and a server certificate for 127.0.0.1 that it issued."""

    def __init__(self) -> None:
        self.authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1").configure_cert(self.server)


class TlsFront:
    """Listens on 127.0.0.1:`port` with TLS, and forwards to 127.0.0.1:`server_port`.

    With `postgres`, TLS begins when the client asks for it, as in Postgres's protocol. Other clients are disconnected.
    """

    def __init__(self, certificates: Certificates, server_port: int, *, postgres: bool = False) -> None:
        self._tls = certificates.server
        self._server_port = server_port
        self._postgres = postgres
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=None if postgres else self._tls))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(timeout=10)

    async def _end(self) -> None:
        self._server.close()
        serving = asyncio.all_tasks() - {asyncio.current_task()}
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            if not self._postgres or await self._upgraded(reader, writer):
                upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._server_port)
                await asyncio.gather(_pass_on(reader, upstream), _pass_on(upstream_reader, writer))
        writer.close()

    async def _upgraded(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if await reader.readexactly(len(SSL_REQUEST)) != SSL_REQUEST:
            return False
        writer.write(b"S")
        await writer.start_tls(self._tls)
        return True


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
