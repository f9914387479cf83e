"""Delivers a batch to a sink. Knows neither Redis nor SQL."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

from worker.errors import TableRefused, UnknownFailure
from worker.observability.logs import get_logger
from worker.pipelines.model import Written

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from worker.pipelines.model import Batch, Sink, WriteOutcome
    from worker.pipelines.observer import WriteObserver
    from worker.runtime.clock import Clock

log = get_logger(__name__)

R = TypeVar("R")

MAX_PAUSE_S = 10.0
RETRIES_FIX = "The log has the error. The worker keeps trying; if the error persists, check the database."


class Delivery(Generic[R]):
    """Measures each write. An error of unknown class is tried again `max_retries` times.

    The pause before the first of these tries is `retry_delay` (seconds); it doubles with each, up to ten seconds.
    """

    def __init__(
        self,
        sink: Sink[R],
        observer: WriteObserver,
        clock: Clock,
        *,
        max_retries: int,
        retry_delay: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sink = sink
        self._observer = observer
        self._clock = clock
        self._max_retries = max_retries
        self._retry_delay = retry_delay
        self._sleep = sleep

    async def deliver(self, batch: Batch[R]) -> WriteOutcome:
        """Raises Unavailable and TableRefused; afterwards its claim shows whether it was written."""
        for attempt in range(self._max_retries + 1):
            try:
                return await self._write(batch, again=attempt > 0)
            except UnknownFailure as error:
                if attempt == self._max_retries:
                    self._observer.exhausted(len(batch))
                    raise TableRefused(str(error), RETRIES_FIX) from error
                log.warning("write failed", cause=str(error), attempt=attempt + 1)
            await self._sleep(min(MAX_PAUSE_S, self._retry_delay * 2**attempt))
        raise AssertionError("unreachable")

    async def _write(self, batch: Batch[R], *, again: bool) -> WriteOutcome:
        self._observer.writing(len(batch), again=again)
        started = self._clock.monotonic()
        try:
            outcome = await self._sink.write(batch)
        except BaseException:
            self._observer.failed(len(batch))
            raise
        if not isinstance(outcome, Written):
            self._observer.not_claimed()
        else:
            seconds = self._clock.monotonic() - started
            latency = None if batch.oldest is None else max(0.0, self._clock.now().timestamp() - batch.oldest)
            self._observer.written(outcome.rows, outcome.letters, seconds, latency)
        return outcome
