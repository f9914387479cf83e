"""Runs the named loops of the worker, and drains them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Protocol

from worker.errors import NotDrained
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = get_logger(__name__)

CANCEL_AGAIN_S = 0.1
CANCEL_TRIES = 10


class Loop(Protocol):
    """A long-running part of the worker. It returns soon after `stop` is set, with its work finished."""

    async def run(self, stop: asyncio.Event) -> None: ...


class Supervisor:
    """Starts the loops, watches them, and drains them within one deadline.

    `drain_timeout` is seconds. A loop that ends before `stop` is a failure of the whole worker: the process ends, so
    that its platform restarts it, instead of running with a part missing.
    """

    def __init__(self, drain_timeout: float, on_stop: Callable[[], None] = lambda: None) -> None:
        self._drain_timeout = drain_timeout
        self._on_stop = on_stop
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ask all loops to drain. Safe to call again."""
        self._stop.set()

    async def run(self, loops: dict[str, Loop]) -> bool:
        """Run until stopped or until a loop dies. True when every loop ended in time and without an error."""
        tasks = {asyncio.create_task(loop.run(self._stop), name=name): name for name, loop in loops.items()}
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            with self._signals():
                await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
                self._on_stop()
                clean = self._stop.is_set()
                self._stop.set()
                _, late = await asyncio.wait(tasks, timeout=self._drain_timeout)
        finally:
            await _cancel({*tasks, stopping})
        for task in late:
            log.error("drain deadline passed", loop=tasks[task], timeout_s=self._drain_timeout)
        failed = [name for task, name in tasks.items() if not self._ended_well(task, name)]
        return clean and not failed

    def _ended_well(self, task: asyncio.Task[None], name: str) -> bool:
        if not task.done() or task.cancelled():
            return False
        error = task.exception()
        if isinstance(error, NotDrained):
            log.error("loop not drained", loop=name, cause=str(error))
        elif error is not None:
            log.error("loop died", loop=name, exc_info=error)
        return error is None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT starts the drain; the second ends the process at once with 128 + its number."""
        event_loop = asyncio.get_running_loop()

        def received(number: signal.Signals) -> None:
            if self._stop.is_set():
                log.warning("second signal, exiting now", signal=number.name)
                os._exit(128 + number)
            log.info("stopping", signal=number.name, timeout_s=self._drain_timeout)
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            event_loop.add_signal_handler(number, received, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                event_loop.remove_signal_handler(number)


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel repeatedly: up to Python 3.11 `wait_for`, which drivers use, may swallow a cancellation."""
    for _ in range(CANCEL_TRIES):
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        if not tasks:
            return
    log.error("tasks do not end", tasks=[task.get_name() for task in tasks])
