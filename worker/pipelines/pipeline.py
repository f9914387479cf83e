"""A pipeline: source → delivery → sink. Read this first; its fields are the picture in docs/pipelines.md."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from worker.errors import DatabaseRefused, RetriesExhausted, TableRefused, Unavailable, UnknownFailure, cause_of
from worker.observability.logs import get_logger
from worker.observability.status import STEP_LIMIT_S, State
from worker.pipelines.model import Batch, Idle, NotClaimed, OnHold, Written
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import run_until, wait_first

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from worker.db.lease import Lease
    from worker.observability.status import Status
    from worker.pipelines.delivery import Delivery
    from worker.pipelines.model import Source
    from worker.runtime.clock import Clock

log = get_logger(__name__)

R = TypeVar("R")

IDLE_S = 5.0
UNEXPECTED = "Nothing is lost: the entries stay in Redis. The log has the details."


@dataclass(kw_only=True)
class Pipeline(Generic[R]):
    """Carries records from one source while this worker holds its lease.

    `name` is that of the loop and of its check. `interval`: seconds between two commits, unless a batch is full.
    """

    name: str
    source: Source[R]
    delivery: Delivery[R]
    lease: Lease[Any]
    status: Status
    clock: Clock
    interval: float

    _look_again: Backoff = field(default_factory=lambda: Backoff(first=1.0, cap=30.0))
    _retry: Backoff = field(default_factory=lambda: Backoff(first=0.2, cap=10.0))
    _committed_at: float = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        self.status.expect_beat(self.name, within=STEP_LIMIT_S)
        try:
            while await self.lease.wait(stop, self.name, self._standing_by):
                self.source.reset()
                try:
                    await self._carry(stop)
                except Unavailable as error:
                    await self._failed(stop, str(error), error.remedy, self._retry.next())
                except UnknownFailure as error:
                    await self._failed(stop, str(error), UNEXPECTED, self.delivery.pause())
                except (TableRefused, RetriesExhausted, DatabaseRefused) as error:
                    await self._hold(stop, OnHold(str(error), error.remedy))
                except Exception as error:
                    # A mistake in one pipeline must not end the process, and with it the others.
                    log.error("pipeline failed", pipeline=self.name, exc_info=error)
                    await self._failed(stop, cause_of(error), UNEXPECTED, self._retry.next())
        finally:
            await self.source.close()
        await self.lease.release_or_expire()

    async def _carry(self, stop: asyncio.Event) -> None:
        """Read and write until stopped, or until the lease or a server is lost. Raises Unavailable, TableRefused."""
        ahead: Batch[R] | None = None
        while not stop.is_set() and self.lease.is_usable:
            self.status.expect_beat(self.name, within=STEP_LIMIT_S)
            read = ahead or await self.source.read()
            ahead = None
            if isinstance(read, OnHold):
                await self._hold(stop, read)
            elif isinstance(read, Idle) and not read.keep_lease:
                await self._wait_without_lease(stop, read)
            elif isinstance(read, Idle):
                self._report_idle()
                await self._wait_for_more(IDLE_S, stop)
            elif not read.full and (pause := self._committed_at + self.interval - self.clock.monotonic()) > 0:
                # No partial batch is kept: the next look reads its entries again, and more; it may be full then.
                await wait_first(min(pause, IDLE_S), stop, self.lease.changed)
            else:
                ahead = await self._deliver(read)

    async def _deliver(self, batch: Batch[R]) -> Batch[R] | None:
        """Write the batch; meanwhile read the one behind it, if there is one. Returns that."""
        reading = self.source.read_ahead(batch) if batch.full else _nothing()
        outcome, ahead = await asyncio.gather(self.delivery.deliver(batch), reading, return_exceptions=True)
        if isinstance(outcome, BaseException):
            self.source.reset(smaller=True)
            raise outcome
        if isinstance(ahead, BaseException):
            raise ahead
        self.source.done(batch, outcome)
        if isinstance(outcome, NotClaimed):
            # Either an earlier attempt wrote the batch, or another worker has the lease: find out which.
            await self.lease.take()
            return None
        assert isinstance(outcome, Written)  # noqa: S101
        self._committed_at = self.clock.monotonic()
        self._report_ok("carrying")
        log.debug("batch written", pipeline=self.name, rows=outcome.rows, letters=outcome.letters)
        return ahead

    def _report_idle(self) -> None:
        """Nothing is written meanwhile, so only the lease shows that nothing could be."""
        if (failure := self.lease.failure) is not None:
            self.status.failing(self.name, str(failure), failure.remedy)
        else:
            self._report_ok("idle")

    def _report_ok(self, role: str) -> None:
        self._look_again.reset()
        self._retry.reset()
        self.status.ok(self.name, role=role)

    async def _failed(self, stop: asyncio.Event, cause: str, remedy: str, pause: float) -> None:
        log.warning("pipeline interrupted", pipeline=self.name, cause=cause)
        self.status.failing(self.name, cause, remedy)
        await wait_first(pause, stop)

    async def _hold(self, stop: asyncio.Event, hold: OnHold) -> None:
        self.status.hold(self.name, hold.cause, hold.remedy)
        await self._yield_lease(lambda delay: wait_first(delay, stop))

    async def _wait_without_lease(self, stop: asyncio.Event, idle: Idle) -> None:
        self.status.ok(self.name, role="waiting", cause=idle.cause)
        await self._yield_lease(lambda delay: self._wait_for_more(delay, stop))

    async def _yield_lease(self, wait: Callable[[float], Awaitable[None]]) -> None:
        """Let another replica try: it may see another Redis."""
        delay = self._look_again.next()
        await self.lease.release_or_expire(pause=True)
        self.status.expect_beat(self.name, within=delay + STEP_LIMIT_S)
        await wait(delay)
        self.lease.resume()
        self.source.reset()

    async def _wait_for_more(self, seconds: float, stop: asyncio.Event) -> None:
        await run_until(stop, self.source.wait(seconds), f"{self.name} wait")

    def _standing_by(self, holder: str) -> None:
        # The lease is released on hold, so another replica may have it: for one look only, or because it carries.
        on_hold = self.status.checks[self.name].state is State.HOLD
        if not on_hold or self.lease.is_kept_elsewhere:
            self.status.ok(self.name, role="standing by", holder=holder)


async def _nothing() -> None:
    return None
