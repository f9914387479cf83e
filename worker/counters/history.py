"""Keeps the hourly history: adds flushes to it, behind the flush."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.db.counters.history import History
from worker.errors import DatabaseRefused, DatabaseUnavailable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

# Ids of one transaction. It holds the lock of the source row, as a flush does.
IDS_AT_ONCE = 50_000


class RollUp:
    """The history of one source."""

    def __init__(self, database: Database, source: str, metrics: Metrics, clock: Clock) -> None:
        self._database = database
        self._history = History(source)
        self._metrics = metrics
        self._clock = clock
        # Monotonic: when the first flush that is not in the history was written, as far as this worker knows.
        self._behind_since: float | None = None
        self._ids_at_once = IDS_AT_ONCE
        self._failed = False
        metrics.history_behind_seconds.set_function(self._behind_seconds)

    def _behind_seconds(self) -> float:
        return 0.0 if self._behind_since is None else self._clock.monotonic() - self._behind_since

    def may_be_behind(self) -> None:
        """There may be a flush that is not in the history."""
        if self._behind_since is None:
            self._behind_since = self._clock.monotonic()

    def stand_by(self) -> None:
        """Another worker keeps the history from now on."""
        self._behind_since = None

    async def catch_up(self, is_calm: Callable[[], bool]) -> None:
        """Add flushes to the history until all are in it, or until `is_calm` is false.

        A failure is logged and measured: views are counted without a history, too.
        """
        try:
            while self._behind_since is not None and is_calm():
                await self._step()
        except (DatabaseUnavailable, DatabaseRefused) as error:
            self._metrics.history_failures.inc()
            self._ids_at_once = max(1, self._ids_at_once // 2)
            if not self._failed:
                log.warning("history not updated", cause=str(error))
            self._failed = True
        else:
            self._failed = False

    async def _step(self) -> None:
        async with self._database.transaction() as tx:
            age = await self._history.roll_up(tx, self._ids_at_once)
        self._behind_since = None if age is None else self._clock.monotonic() - age
        self._ids_at_once = min(IDS_AT_ONCE, self._ids_at_once * 2)
