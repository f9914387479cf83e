"""Runs a Writer, or what is built on one, on an event loop in a thread of its own, for callers in other threads."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar
from weakref import WeakSet

from worker.observability.logs import get_logger
from worker.runtime.event_loop import run_async

with contextlib.suppress(ImportError):
    import uvloop  # noqa: F401 - at the exit of the interpreter, where the thread may start, it is too late

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

log = get_logger("worker.writer")

T = TypeVar("T")


class Service(Protocol):
    """What runs in the thread."""

    @property
    def is_enabled(self) -> bool: ...
    @property
    def is_complete(self) -> bool: ...
    def refuse_more(self) -> None: ...
    def again(self) -> Self: ...
    async def start(self) -> None: ...
    async def shutdown(self, timeout: float | None = None) -> bool: ...


S = TypeVar("S", bound=Service)


class InThread(Generic[S]):
    """The thread starts with the first call.

    So a server may make this object before it forks: each process that uses it writes what it sent itself. What is left
    when the interpreter exits is written then, for up to `SHUTDOWN_TIMEOUT`.
    """

    def __init__(self, service: S) -> None:
        if _threads_are_replaced():
            raise RuntimeError("threads are replaced by gevent or eventlet: the event loop would block them")
        self._service = service
        # Its holder may use `_loop`: the event loop does not end meanwhile.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        _in_threads.add(self)

    def shutdown(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and write what is left for up to `timeout` seconds (default: `SHUTDOWN_TIMEOUT`).

        False when records are left. Returns when the thread has ended.
        """
        with self._lock:
            self._is_closed = True
            self._service.refuse_more()
        done = self._call(self._end(timeout), otherwise=lambda: self._service.is_complete)
        if self._thread is not None:
            self._thread.join()
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start(self) -> bool:
        """Start the thread unless it was started, or is not needed. False: impossible."""
        with self._lock:
            if self._thread is not None or self._is_closed or not self._service.is_enabled:
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
            self._service.refuse_more()
        finally:
            main.close()
            started.set()

    async def _run(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        await self._service.start()
        self._loop = asyncio.get_running_loop()
        started.set()
        await self._stop.wait()
        with self._lock:
            self._loop = None
        # Calls that were made before become tasks, which the runner cancels; otherwise nobody would answer them.
        await asyncio.sleep(0)

    async def _end(self, timeout: float | None) -> bool:
        try:
            return await self._service.shutdown(timeout)
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
        _of_parent.append((self._loop, self._thread, self._service))
        self._loop = self._thread = None
        if not self._is_closed:
            self._service = self._service.again()


def _threads_are_replaced() -> bool:
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    return bool(
        (gevent is not None and gevent.is_module_patched("threading"))
        or (eventlet is not None and eventlet.is_monkey_patched("thread"))
    )


_in_threads: WeakSet[InThread[Any]] = WeakSet()
# A child must not destroy them: the event loop's descriptors are the parent's, too.
_of_parent: list[object] = []


def _after_fork() -> None:
    for each in list(_in_threads):
        each._forked()


def _at_exit() -> None:
    for each in list(_in_threads):
        each.shutdown()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
