"""Writes the batches of an application's records until there are no more. Knows neither Redis nor SQL."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from worker.errors import RetriesExhausted, Unavailable, UnknownFailure, ViewerWorkerError, WriteTooSlow
from worker.observability.logs import get_logger
from worker.pipelines.model import Batch, CommitUnanswered, NotClaimed, Written
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.observability.throttle import Throttle
    from worker.pipelines.delivery import Delivery
    from worker.pipelines.sources.buffered import BufferedSource
    from worker.runtime.clock import Clock

log = get_logger(__name__)

R = TypeVar("R")

# Tickets are kept for a day. Long before that, a batch whose commit had no answer is not tried again.
GIVE_UP_S = 12 * 3600.0
WAIT_S = 10.0
HOLD_S = 60.0
# The longest pause while the application waits for the last batches.
LAST_PAUSE_S = 0.5


@dataclass(slots=True)
class Tally:
    """What became of records. `unknown`: their commit had no answer."""

    written: int = 0
    repeated: int = 0
    dead: int = 0
    dropped: int = 0
    unknown: int = 0

    def add(self, written: Written) -> None:
        self.written += written.rows
        self.repeated += written.repeated
        self.dead += written.letters
        self.dropped += written.dropped

    @property
    def total(self) -> int:
        return self.written + self.repeated + self.dead + self.dropped + self.unknown


class Drain(Generic[R]):
    """One of several deliveries that compete for the batches of a source.

    What heals, and a table that does not fit, is tried for ever. After the tries for an error of unknown class, each
    record is tried alone: the bad ones become dead letters, and what cannot even be kept as one is dropped. Once
    `closing` is set, pauses are short. `report` is called after each try, with its error or None.
    """

    def __init__(
        self,
        source: BufferedSource[R],
        delivery: Delivery[R],
        tally: Tally,
        clock: Clock,
        closing: asyncio.Event,
        warnings: Throttle,
        report: Callable[[ViewerWorkerError | None], None] = lambda _: None,
    ) -> None:
        self._source = source
        self._delivery = delivery
        self._tally = tally
        self._clock = clock
        self._closing = closing
        self._warnings = warnings
        self._report = report
        self._waits = Backoff(first=0.1, cap=WAIT_S)
        self._holds = Backoff(first=1.0, cap=HOLD_S)
        # Records that wait out a pause.
        self.pausing = 0

    async def run(self) -> None:
        while (batch := await self._source.next()) is not None:
            # A batch is empty where everything in it was dropped.
            parts: list[Batch[R]] = [batch] if len(batch) else []
            while parts:
                parts += await self._write(parts.pop())
            self._source.done(batch, NotClaimed())

    async def _write(self, batch: Batch[R]) -> tuple[Batch[R], ...]:
        """Until it is clear what became of the batch. Returns the parts to write instead, the last one first."""
        attempt = _Attempt(self._clock)
        try:
            while not attempt.is_too_old:
                pause = await self._try(batch, attempt)
                if attempt.outcome is not None:
                    self._tally.add(attempt.outcome)
                    return ()
                if attempt.is_too_slow and len(batch.items) > 1 and attempt.unanswered is None:
                    return self._source.halve(batch)[::-1]
                await self._pause(pause, len(batch))
            log.error("batch given up: it may be written or not", records=len(batch))
            self._tally.unknown += len(batch)
            return ()
        except asyncio.CancelledError:
            if attempt.may_be_written:
                self._tally.unknown += len(batch)
            raise

    async def _try(self, batch: Batch[R], attempt: _Attempt) -> float:
        """Write the batch once. Returns seconds to wait where nothing came of it."""
        attempt.is_too_slow = False
        try:
            outcome = await self._delivery.deliver(batch, isolate=attempt.isolates, before_commit=attempt.begin_commit)
        except CommitUnanswered as error:
            attempt.has_no_answer(error.written)
            pause = self._failed(error, self._waits)
        except WriteTooSlow as error:
            attempt.is_too_slow = True
            pause = self._failed(error, self._waits)
        except Unavailable as error:
            pause = self._failed(error, self._waits)
        except UnknownFailure as error:
            self._note(error)
            pause = self._delivery.pause()
        except RetriesExhausted as error:
            self._report(error)
            if attempt.isolates and attempt.unanswered is None:
                log.error("records dropped", records=len(batch), cause=str(error))
                attempt.outcome = Written(dropped=len(batch))
            attempt.isolates = True
            pause = self._delivery.pause()
        except ViewerWorkerError as error:
            pause = self._failed(error, self._holds)
        else:
            self._report(None)
            self._waits.reset()
            self._holds.reset()
            # Not claimed: the attempt whose commit had no answer did write it.
            attempt.outcome = outcome if isinstance(outcome, Written) else attempt.unanswered or Written()
            pause = 0.0
        attempt.is_committing = False
        return pause

    def _failed(self, error: ViewerWorkerError, pauses: Backoff) -> float:
        self._note(error)
        return pauses.next()

    def _note(self, error: ViewerWorkerError) -> None:
        self._report(error)
        if self._warnings.allows(str(error)):
            log.warning("records not written", cause=str(error))

    async def _pause(self, seconds: float, records: int) -> None:
        self.pausing = records
        try:
            if self._closing.is_set():
                await asyncio.sleep(min(seconds, LAST_PAUSE_S))
            else:
                await wait_first(seconds, self._closing)
        finally:
            self.pausing = 0


class _Attempt:
    """What is known of a batch that is not written for certain."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began: tuple[float, float] | None = None
        self.outcome: Written | None = None
        self.unanswered: Written | None = None
        self.is_committing = False
        self.is_too_slow = False
        self.isolates = False

    def begin_commit(self) -> None:
        self.is_committing = True

    def has_no_answer(self, written: Written) -> None:
        self.unanswered = written
        if self._began is None:
            self._began = self._times()

    @property
    def may_be_written(self) -> bool:
        return self.outcome is None and (self.is_committing or self.unanswered is not None)

    @property
    def is_too_old(self) -> bool:
        """Its ticket may be pruned soon. By both clocks: one stops while the machine sleeps, the other may be set."""
        if self._began is None:
            return False
        return any(now - began > GIVE_UP_S for now, began in zip(self._times(), self._began, strict=True))

    def _times(self) -> tuple[float, float]:
        return self._clock.monotonic(), self._clock.now().timestamp()
