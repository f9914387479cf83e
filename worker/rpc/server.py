"""The gRPC server: the service, its health, and reflection."""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from worker.errors import CannotListen
from worker.rpc.service import SERVICE

if TYPE_CHECKING:
    from worker.redis.appender import StreamAppender
    from worker.rpc.service import AnalyticsService
    from worker.rpc.serving import ServingStatus
    from worker.rpc.tls import Certificate

LAST_ANSWERS_S = 0.2
MAX_CONNECTIONS = 2000
OPTIONS = (
    # A metric has three texts of at most 256 bytes.
    ("grpc.max_receive_message_length", 16 * 1024),
    # Otherwise a second worker could listen on the same port, unnoticed.
    ("grpc.so_reuseport", 0),
    # Calls and watches that a connection may have open; the next ones wait at the client. Without the limit, gRPC would
    # cancel calls of a client that makes thousands at once; with this protection, it would refuse them.
    ("grpc.max_concurrent_streams", 100),
    ("grpc.http.overload_protection", 0),
    # Close connections on which no client speaks gRPC; the default is two minutes.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # Find clients that are gone, and let clients find out the same more often than the default of five minutes.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)


class GrpcServer:
    """Serves on `host`:`port` (0: a free port), with TLS where there is a certificate."""

    def __init__(
        self,
        service: AnalyticsService,
        appender: StreamAppender,
        serving: ServingStatus,
        *,
        host: str,
        port: int,
        certificate: Certificate | None,
    ) -> None:
        self._service = service
        self._appender = appender
        self._serving = serving
        self._host = f"[{host}]" if ":" in host else host
        self._port = port
        self._certificate = certificate
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises CannotListen."""
        server = grpc.aio.server(options=(*OPTIONS, ("grpc.max_allowed_incoming_connections", _max_connections())))
        server.add_generic_rpc_handlers((self._service.handler(),))
        self._serving.add_to(server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            if self._certificate is None:
                self._port = server.add_insecure_port(self.address)
            else:
                self._port = server.add_secure_port(self.address, self._certificate.credentials())
        except RuntimeError as error:
            certificate = "" if self._certificate is None else " with the certificate of GRPC_TLS_CERT"
            raise CannotListen(f"cannot listen on {self.address} for gRPC{certificate}") from error
        await server.start()
        self._server = server

    async def run(self, stop: asyncio.Event) -> None:
        """Take calls until stopped. Then answer those that are here, and end."""
        appending = asyncio.create_task(self._appender.run(), name="append metrics")
        stopping = asyncio.create_task(stop.wait(), name="stop grpc")
        try:
            await asyncio.wait({appending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._stop()
        finally:
            for task in (appending, stopping):
                task.cancel()
            await asyncio.wait({appending, stopping})
        if not appending.cancelled() and (error := appending.exception()) is not None:
            raise error

    async def _stop(self) -> None:
        assert self._server is not None  # set by start()  # noqa: S101
        await self._serving.stop()
        await self._service.drain()
        # Clients that watch the health hold a call open as long as they can.
        await self._server.stop(LAST_ANSWERS_S)


def _max_connections() -> int:
    """Half of the files that this process may open: the others are for Redis, Postgres and HTTP."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)
