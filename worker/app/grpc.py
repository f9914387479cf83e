"""Makes the gRPC server, and connects it to the stream of the metrics."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from worker.errors import InvalidSettings, SettingProblem
from worker.pipelines.records.metrics import METRICS
from worker.redis.appender import StreamAppender
from worker.runtime.clock import SystemClock

if TYPE_CHECKING:
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import RedisClient
    from worker.rpc.server import GrpcServer
    from worker.settings.model import Settings

INSTALL = "0, which turns it off, or the extra grpc: pip install 'viewer-worker[grpc]'"


async def start_grpc(settings: Settings, redis: RedisClient, status: Status, metrics: Metrics) -> GrpcServer:
    """A server that listens. `status` has the check `grpc`.

    Raises InvalidSettings without the extra `grpc` or for a certificate that cannot be used, and CannotListen.
    """
    # gRPC writes lines of its own to stderr, for each failed handshake, too.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from worker.rpc.server import GrpcServer
        from worker.rpc.service import AnalyticsService
        from worker.rpc.serving import ServingStatus
        from worker.rpc.tls import Certificate
    except ModuleNotFoundError as error:
        raise InvalidSettings([SettingProblem("GRPC_PORT", str(settings.grpc_port), INSTALL)]) from error
    certificate = None
    if settings.grpc_tls_cert is not None and settings.grpc_tls_key is not None:
        try:
            certificate = Certificate(chain=settings.grpc_tls_cert, key=settings.grpc_tls_key)
        except OSError as error:
            expected = f"a certificate chain in PEM for the key in GRPC_TLS_KEY ({error})"
            raise InvalidSettings([SettingProblem("GRPC_TLS_CERT", str(settings.grpc_tls_cert), expected)]) from error
    clock = SystemClock()
    own = settings.pipeline(METRICS)
    serving = ServingStatus(status)
    appender = StreamAppender(
        redis.stream_connection(),
        streams=own.streams,
        field=own.field,
        group=own.group,
        limit=own.capacity,
        report=serving,
        clock=clock,
    )
    service = AnalyticsService(appender, own.window, metrics, clock, retry_after=own.interval.total_seconds())
    server = GrpcServer(
        service,
        appender,
        serving,
        host=settings.grpc_host,
        port=settings.grpc_port,
        certificate=certificate,
    )
    await server.start()
    return server
