"""A worker that takes metrics over gRPC, and calls to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tests.support.records import Records
from tests.support.world import CliWorker
from worker.dev.servers import free_port
from worker.rpc.analytics.v1.analytics_pb2 import LogMetricsRequest, LogMetricsResponse

METHOD = "/analytics.v1.AnalyticsService/LogMetric"


class MetricCalls:
    """Starts workers that serve gRPC on ports of their own, in the world of `records`."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.world = records.world
        self.stream = f"{self.world.prefix}metrics"
        self.port = free_port()

    def start(self, *, program: list[str] | None = None, **settings: str) -> CliWorker:
        own = {
            "PIPELINES": "metrics",
            "METRICS_STREAM": f"metrics {self.world.prefix}",
            "METRICS_FLUSH_INTERVAL": "50ms",
            "GRPC_HOST": "127.0.0.1",
            "GRPC_PORT": str(self.port),
        }
        return self.records.start(program=program, **own | settings)

    async def rows(self) -> list[Any]:
        return list(await self.world.sql.fetch("SELECT * FROM metrics ORDER BY value"))

    async def has_rows(self, count: int, timeout: float = 30.0) -> list[Any]:
        """Wait for so many rows."""

        async def all_there() -> bool:
            return await self.world.sql.fetchval("SELECT count(*) FROM metrics") >= count

        await self.records.wait(all_there, timeout)
        rows = await self.rows()
        assert len(rows) == count
        return rows

    @asynccontextmanager
    async def channel(self, **credentials: grpc.ChannelCredentials) -> AsyncIterator[grpc.aio.Channel]:
        async with connect(self.port, **credentials) as channel:
            await asyncio.wait_for(channel.channel_ready(), 20)
            yield channel


def connect(port: int, credentials: grpc.ChannelCredentials | None = None) -> grpc.aio.Channel:
    # Connections of their own, and quick to come back after a restart.
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 300),
    )
    if credentials is None:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
    return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)


async def log_metric(channel: grpc.aio.Channel, timeout: float = 5.0, **fields: Any) -> LogMetricsResponse:
    """One call. Raises grpc.aio.AioRpcError."""
    request = LogMetricsRequest(**{"service_name": "checkout", "metric_name": "cpu_usage", **fields})
    call = channel.unary_unary(
        METHOD,
        request_serializer=LogMetricsRequest.SerializeToString,
        response_deserializer=LogMetricsResponse.FromString,
    )
    response: LogMetricsResponse = await call(request, timeout=timeout)
    return response


async def code_of(channel: grpc.aio.Channel, timeout: float = 5.0, **fields: Any) -> grpc.StatusCode:
    """The status of one call."""
    try:
        await log_metric(channel, timeout, **fields)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
