"""A Redis channel as a source: what is heard goes into a buffer, which drops and counts what it has no room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.observability.logs import get_logger
from worker.pipelines.buffer import OVERHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from prometheus_client import Counter

    from worker.db.lease import Lease
    from worker.observability.throttle import Throttle
    from worker.pipelines.buffer import Buffer, ByteBudget
    from worker.pipelines.metrics import BufferMetrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

FULL = "buffer full"


class ChannelReceiver:
    """Implements Receiver, for the listener. It never waits.

    A message becomes a row once, so only the holder of the lease may take it. What comes while the lease is not sure
    is set aside, since another worker may hear it, too: it goes into the buffer when the lease is renewed, and is
    forgotten when the lease is lost; the next holder counts a gap. `is_first`: whether nobody had the lease before the
    one with this token. `capacity` (records) and `budget` are those of the buffer.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        buffer: Buffer,
        capacity: int,
        budget: ByteBudget,
        lease: Lease[UUID],
        is_first: Callable[[UUID], bool],
        metrics: BufferMetrics,
        gaps: Counter,
        clock: Clock,
        warnings: Throttle,
    ) -> None:
        self._pipeline = pipeline
        self._buffer = buffer
        self._capacity = capacity
        self._budget = budget
        self._lease = lease
        self._is_first = is_first
        self._metrics = metrics
        self._gaps = gaps
        self._clock = clock
        self._warnings = warnings
        self._token: UUID | None = None
        # With the time at which each was heard.
        self._aside: list[tuple[float, bytes]] = []
        self._aside_bytes = 0
        metrics.add(self)

    @property
    def held(self) -> int:
        """Messages that are set aside."""
        return len(self._aside)

    pausing = held
    # The buffer's capacity includes what is set aside.
    capacity = 0

    def begin(self, token: UUID) -> bool:
        if token != self._token:
            self._forget_aside()
        self._token = token
        return not self._is_first(token)

    def missed(self) -> None:
        self._gaps.inc()

    def receive(self, messages: list[bytes]) -> None:
        if self._lease.token != self._token:
            # The subscription is about to end: the new holder hears these.
            self._forget_aside()
        elif not self._lease.is_sure:
            self._set_aside(messages)
        else:
            self._take_aside()
            refused = sum(not self._buffer.add(message) for message in messages)
            self._drop(refused)

    def end(self) -> None:
        if self._lease.token == self._token and self._lease.is_sure:
            self._take_aside()
        # Nobody is there to hear of a renewal.
        self._metrics.left(self._forget_aside(), unknown=0)
        self._buffer.close()

    def _set_aside(self, messages: list[bytes]) -> None:
        now = self._clock.monotonic()
        refused = 0
        for message in messages:
            size = len(message) + OVERHEAD_BYTES
            has_bytes = self._budget.held + self._aside_bytes + size <= self._budget.limit
            if has_bytes and self._buffer.held + len(self._aside) < self._capacity:
                self._aside.append((now, message))
                self._aside_bytes += size
            else:
                refused += 1
        self._drop(refused)

    def _take_aside(self) -> None:
        aside = self._clear_aside()
        refused = sum(not self._buffer.add(message, at=at) for at, message in aside)
        self._drop(refused)

    def _forget_aside(self) -> int:
        """Returns how many messages that were."""
        if aside := self._clear_aside():
            log.warning("messages forgotten: the lease was not renewed", pipeline=self._pipeline, messages=len(aside))
        return len(aside)

    def _clear_aside(self) -> list[tuple[float, bytes]]:
        aside, self._aside, self._aside_bytes = self._aside, [], 0
        return aside

    def _drop(self, messages: int) -> None:
        """There was no room for so many."""
        if not messages:
            return
        self._metrics.refused(messages, full=True)
        if self._warnings.allows(FULL):
            log.warning("messages dropped", pipeline=self._pipeline, cause=FULL, messages=messages)
