"""`SyncWriter`: a Writer for threads. Its event loop runs in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from weakref import WeakSet

from worker.inprocess.writer import FLUSH_TIMEOUT_S, PUT_TIMEOUT_S, Writer
from worker.observability.logs import get_logger
from worker.runtime.event_loop import run_async

with contextlib.suppress(ImportError):
    import uvloop  # noqa: F401 - at the exit of the interpreter, where the thread may start, it is too late

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from prometheus_client import CollectorRegistry

    from worker.inprocess.writer import WriterStats
    from worker.pipelines.records.chunk_requests import ChunkEvent

log = get_logger("worker.writer")

R = TypeVar("R")
T = TypeVar("T")

NO_THREAD = "no thread can be started"


class SyncWriter(Generic[R]):
    """As `Writer`, for any thread. Its own thread starts with the first call.

    So a server may make it before it forks: each process that uses it writes what it sent itself. What is left when the
    interpreter exits is written then, for up to `SHUTDOWN_TIMEOUT`.
    """

    def __init__(self, writer: Writer[R]) -> None:
        self._writer = writer
        # Its holder may use `_loop`: the event loop does not end meanwhile.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        _writers.add(self)

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
            return self._writer.refuse(NO_THREAD)
        return self._writer.send(record)

    def put(self, record: R, timeout: float = PUT_TIMEOUT_S) -> bool:
        """As `Writer.put`."""
        if not self._start():
            return self._writer.refuse(NO_THREAD)
        return self._call(self._writer.put(record, timeout), otherwise=lambda: self._writer.send(record))

    def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """As `Writer.flush`."""
        self._start()
        return self._call(self._writer.flush(timeout), otherwise=lambda: self._writer.is_complete)

    def shutdown(self, timeout: float | None = None) -> bool:
        """As `Writer.shutdown`. Returns when the thread has ended."""
        with self._lock:
            self._is_closed = True
            self._writer.refuse_more()
        done = self._call(self._end(timeout), otherwise=lambda: self._writer.is_complete)
        if self._thread is not None:
            self._thread.join()
        return done

    @property
    def stats(self) -> WriterStats:
        return self._writer.stats

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start(self) -> bool:
        """Start the thread unless it was started, or is not needed. False: impossible."""
        with self._lock:
            if self._thread is not None or self._is_closed or not self._writer.is_enabled:
                return True
            started = threading.Event()
            thread = threading.Thread(target=self._run_thread, args=(started,), name="writer", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # too many threads, or the interpreter exits
                return False
            self._thread = thread
            started.wait()
            return True

    def _run_thread(self, started: threading.Event) -> None:
        main = self._run(started)
        try:
            run_async(main)
        except Exception as error:
            log.error("writer stopped", exc_info=error)
            self._writer.refuse_more()
        finally:
            main.close()
            started.set()

    async def _run(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        await self._writer.start()
        self._loop = asyncio.get_running_loop()
        started.set()
        await self._stop.wait()
        with self._lock:
            self._loop = None
        # Calls that were made before become tasks, which the runner cancels; otherwise nobody would answer them.
        await asyncio.sleep(0)

    async def _end(self, timeout: float | None) -> bool:
        try:
            return await self._writer.shutdown(timeout)
        finally:
            self._stop.set()

    def _call(self, step: Coroutine[Any, Any, T], otherwise: Callable[[], T]) -> T:
        """Run `step` in the thread; `otherwise` where there is none, or it ends."""
        with self._lock:
            future = None if self._loop is None else asyncio.run_coroutine_threadsafe(step, self._loop)
        if future is None:
            step.close()
            return otherwise()
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            return otherwise()

    def _forked(self) -> None:
        self._lock = threading.Lock()
        _of_parent.append((self._loop, self._thread, self._writer))
        self._loop = self._thread = None
        if not self._is_closed:
            self._writer = self._writer.again()


_writers: WeakSet[SyncWriter[Any]] = WeakSet()
# A child must not destroy them: the event loop's descriptors are the parent's, too.
_of_parent: list[object] = []


def _after_fork() -> None:
    for writer in list(_writers):
        writer._forked()


def _at_exit() -> None:
    for writer in list(_writers):
        writer.shutdown()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
