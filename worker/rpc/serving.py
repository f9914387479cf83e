"""The state of the gRPC server, for `/health` and for the standard health service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpc_health.v1 import health
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from worker.observability.status import GRPC
from worker.rpc.service import SERVICE

if TYPE_CHECKING:
    import grpc

    from worker.errors import RedisUnavailable
    from worker.observability.status import Status

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class ServingStatus:
    """Implements AppendReport.

    Over gRPC, the service is SERVING while metrics can be stored, and the server (the empty name) until it stops.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        self._servicer = health.aio.HealthServicer()
        self._serves: bool | None = None

    def add_to(self, server: grpc.aio.Server) -> None:
        add_HealthServicer_to_server(self._servicer, server)

    async def works(self) -> None:
        if self._serves is not True:
            self._serves = True
            self._status.ok(GRPC, role="serving")
            await self._servicer.set(SERVICE, SERVING)

    async def fails(self, error: RedisUnavailable) -> None:
        self._status.failing(GRPC, str(error), error.remedy)
        if self._serves is not False:
            self._serves = False
            await self._servicer.set(SERVICE, NOT_SERVING)

    async def stop(self) -> None:
        await self._servicer.enter_graceful_shutdown()
