"""Delivers batches to a sink. Knows neither Redis nor SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from worker.errors import RetriesExhausted, UnknownFailure, ViewerWorkerError, cause_of
from worker.observability.logs import get_logger
from worker.pipelines.model import Written
from worker.runtime.backoff import Backoff

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from worker.pipelines.model import Batch, Sink, WriteOutcome
    from worker.pipelines.observer import WriteObserver
    from worker.runtime.clock import Clock

log = get_logger(__name__)

R = TypeVar("R")

MAX_PAUSE_S = 10.0


class Delivery(Generic[R]):
    """Writes one batch at a time, measures each write, and counts its tries.

    An error of unknown class is UnknownFailure `max_retries` times in a row, then RetriesExhausted. `retry_delay`
    (seconds) is the longest pause after the first; it doubles with each, up to ten seconds.
    """

    def __init__(
        self,
        sink: Sink[R],
        observer: WriteObserver,
        clock: Clock,
        *,
        max_retries: int,
        retry_delay: float,
        rng: random.Random | None = None,
    ) -> None:
        self._sink = sink
        self._observer = observer
        self._clock = clock
        self._max_retries = max_retries
        self._pauses = Backoff(first=retry_delay, cap=MAX_PAUSE_S, rng=rng)
        self._failed = False
        self._unknown_failures = 0

    def pause(self) -> float:
        """Seconds to wait after UnknownFailure."""
        return self._pauses.next()

    async def deliver(
        self, batch: Batch[R], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        """Write the batch once, as `Sink.write` does. Raises what that raises, and RetriesExhausted."""
        try:
            outcome = await self._write(batch, isolate, before_commit)
        except UnknownFailure as error:
            self._unknown_failures += 1
            if self._unknown_failures <= self._max_retries:
                raise
            self._start_again()
            self._observer.exhausted(len(batch))
            raise RetriesExhausted(str(error)) from error
        self._start_again()
        return outcome

    def _start_again(self) -> None:
        self._unknown_failures = 0
        self._pauses.reset()

    async def _write(self, batch: Batch[R], isolate: bool, before_commit: Callable[[], None]) -> WriteOutcome:
        self._observer.writing(len(batch), again=self._failed)
        started = self._clock.monotonic()
        try:
            outcome = await self._sink.write(batch, isolate=isolate, before_commit=before_commit)
        except BaseException as error:
            self._failed = True
            self._observer.failed(len(batch))
            if isinstance(error, Exception) and not isinstance(error, ViewerWorkerError):
                # A mistake of ours may concern this batch only.
                log.error("write failed", exc_info=error)
                raise UnknownFailure(cause_of(error)) from error
            raise
        self._failed = False
        if not isinstance(outcome, Written):
            self._observer.not_claimed()
        else:
            seconds = self._clock.monotonic() - started
            latency = None if batch.oldest is None else max(0.0, self._clock.now().timestamp() - batch.oldest)
            self._observer.written(outcome, seconds, latency)
        return outcome
