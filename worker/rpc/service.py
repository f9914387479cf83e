"""The service AnalyticsService."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus
from grpc_status import rpc_status

from worker.errors import AppendUnanswered, NotAppended, StreamFull
from worker.observability.logs import get_logger
from worker.pipelines.model import InvalidRecord
from worker.pipelines.records.metrics import METRICS
from worker.rpc.analytics.v1 import analytics_pb2
from worker.rpc.requests import read_metric

if TYPE_CHECKING:
    from worker.observability.metrics import Metrics
    from worker.pipelines.model import Window
    from worker.redis.appender import StreamAppender
    from worker.runtime.clock import Clock

log = get_logger(__name__)

SERVICE = analytics_pb2.DESCRIPTOR.services_by_name["AnalyticsService"].full_name
METHOD = "LogMetric"
ACCEPTED = analytics_pb2.LogMetricsResponse(success=True).SerializeToString()
LABELS = ("unary", SERVICE, METHOD)

# After a stop, no call for so long means that clients have noticed.
QUIET_S = 0.1
# Those that never notice are cut off.
LONGEST_DRAIN_S = 1.0

Context = grpc.aio.ServicerContext[bytes, bytes]


class AnalyticsService:
    """An accepted metric is an entry of the stream: it will be a row, also if this process is killed.

    `retry_after`: seconds after which a client may send a metric again that was not stored.
    """

    def __init__(
        self, appender: StreamAppender, window: Window, metrics: Metrics, clock: Clock, *, retry_after: float
    ) -> None:
        self._appender = appender
        self._window = window
        self._clock = clock
        self._retry_after = retry_after
        self._taken = 0
        self._called_at = 0.0
        self._is_stopping = False
        self._started = metrics.calls_started.labels(*LABELS)
        self._full = metrics.records.queue_full.labels(METRICS.name)
        self._seconds = metrics.call_seconds.labels(*LABELS)
        self._handled = {code: metrics.calls_handled.labels(*LABELS, code.name) for code in grpc.StatusCode}

    def handler(self) -> grpc.GenericRpcHandler:
        # Messages are parsed here, so that a message that is not valid has the answer INVALID_ARGUMENT.
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._log_metric)
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})

    async def drain(self) -> None:
        """Refuse calls from now on. Returns when those that were taken are answered, and no more come.

        Otherwise gRPC would cut off calls that have arrived when it stops, and that it has not passed on.
        """
        self._is_stopping = True
        began = self._clock.monotonic()
        while self._taken or self._clock.monotonic() - max(began, self._called_at) < QUIET_S:
            if not self._taken and self._clock.monotonic() - began > LONGEST_DRAIN_S:
                return
            await asyncio.sleep(QUIET_S / 10)

    async def _log_metric(self, message: bytes, context: Context) -> bytes:
        began, code = self._clock.monotonic(), grpc.StatusCode.CANCELLED
        self._called_at = began
        self._started.inc()
        try:
            answer = await self._log(message)
            code = answer.code
        finally:
            self._handled[code].inc()
            self._seconds.observe(self._clock.monotonic() - began)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, answer.details, answer.metadata)
        return ACCEPTED

    async def _log(self, message: bytes) -> _Answer:
        if self._is_stopping:
            return self._not_stored(grpc.StatusCode.UNAVAILABLE, "not stored: the server is stopping")
        self._taken += 1
        try:
            await self._appender.append(read_metric(message, self._clock.now(), self._window))
        except InvalidRecord as error:
            return _Answer(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except StreamFull as error:
            self._full.inc()
            return self._not_stored(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except NotAppended as error:
            return self._not_stored(grpc.StatusCode.UNAVAILABLE, f"not stored: {error}")
        except AppendUnanswered as error:
            return _Answer(grpc.StatusCode.UNKNOWN, f"it is not known whether the metric is stored: {error}")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.error("call failed", method=METHOD, exc_info=error)
            return _Answer(grpc.StatusCode.UNKNOWN, "it is not known whether the metric is stored")
        finally:
            self._taken -= 1
        return _Answer(grpc.StatusCode.OK)

    def _not_stored(self, code: grpc.StatusCode, cause: str) -> _Answer:
        """With RetryInfo: a client that loses the connection sees UNAVAILABLE, too, but without it."""
        delay = Duration()
        delay.FromMilliseconds(round(self._retry_after * 1000))
        status = RpcStatus(code=code.value[0], message=cause)
        status.details.add().Pack(RetryInfo(retry_delay=delay))
        made = rpc_status.to_status(status)
        return _Answer(code, made.details, made.trailing_metadata)


@dataclass(frozen=True, slots=True)
class _Answer:
    code: grpc.StatusCode
    details: str = ""
    metadata: Any = ()
