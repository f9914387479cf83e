"""`SyncWriter`: a Writer for threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from worker.inprocess.thread import InThread
from worker.inprocess.writer import FLUSH_TIMEOUT_S, PUT_TIMEOUT_S, Writer

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from worker.inprocess.stats import WriterStats
    from worker.pipelines.records.chunk_requests import ChunkEvent

R = TypeVar("R")

NO_THREAD = "no thread can be started"


class SyncWriter(InThread[Writer[R]]):
    """As `Writer`, for any thread; on an event loop in a thread of its own, which starts with the first call."""

    @staticmethod
    def chunk_requests(
        database_url: str | None = None,
        *,
        capacity: int | None = None,
        writers: int | None = None,
        batch_size: int | None = None,
        batch_timeout: float | None = None,
        max_retries: int | None = None,
        retry_delay: float | None = None,
        enabled: bool | None = None,
        registry: CollectorRegistry | None = None,
    ) -> SyncWriter[ChunkEvent]:
        """As `Writer.chunk_requests`."""
        return SyncWriter(
            Writer.chunk_requests(
                database_url,
                capacity=capacity,
                writers=writers,
                batch_size=batch_size,
                batch_timeout=batch_timeout,
                max_retries=max_retries,
                retry_delay=retry_delay,
                enabled=enabled,
                registry=registry,
            )
        )

    def send(self, record: R) -> bool:
        """As `Writer.send`."""
        if self._thread is None and not self._start():
            return self._service.refuse(NO_THREAD)
        return self._service.send(record)

    def put(self, record: R, timeout: float = PUT_TIMEOUT_S) -> bool:
        """As `Writer.put`."""
        if not self._start():
            return self._service.refuse(NO_THREAD)
        return self._call(self._service.put(record, timeout), otherwise=lambda: self._service.send(record))

    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """As `Writer.flush`."""
        self._start()
        return self._call(self._service.flush(timeout), otherwise=lambda: self._service.is_complete)

    @property
    def stats(self) -> WriterStats:
        return self._service.stats
