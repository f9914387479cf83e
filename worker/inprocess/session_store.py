"""`SessionStore`: the last event id of each session, written from inside an application (seed 004)."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Self

import msgspec

from worker.db.record_reads import read_last_event
from worker.inprocess.connections import Connections
from worker.inprocess.options import WriterOptions
from worker.inprocess.writer import FLUSH_TIMEOUT_S, PUT_TIMEOUT_S, Writer
from worker.observability.logs import get_logger
from worker.pipelines.records.session_events import SESSION_EVENTS, SessionUpdate, is_key

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from prometheus_client import CollectorRegistry

    from worker.inprocess.stats import WriterStats

log = get_logger("worker.sessions")

SHUTDOWN_TIMEOUT_S = 5.0
MAX_PENDING = 1000
# Events that are accepted at a stretch: less than a millisecond.
SLICE = 100

_decode = msgspec.json.Decoder(SessionUpdate).decode


class SessionStore:
    """Writes event ids in batches behind the caller, and reads them.

    Of a session's events only the newest is written, by the order in which they were accepted. What is not given comes
    from the environment: `DATABASE_URL` or `DB_*`, `SESSION_CHANNEL_CAP` (`capacity`, in sessions),
    `SESSION_BATCH_SIZE`, `SESSION_FLUSH_INTERVAL` (`batch_timeout`) and `SESSION_RETRY_DELAY` (here in seconds),
    `SESSION_MAX_ATTEMPTS`. Its metrics go to `registry`. Raises InvalidSettings.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        capacity: int | None = None,
        batch_size: int | None = None,
        batch_timeout: float | None = None,
        max_attempts: int | None = None,
        retry_delay: float | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        options = WriterOptions.read(
            SESSION_EVENTS,
            database_url=database_url,
            capacity=capacity,
            batch_size=batch_size,
            batch_timeout=batch_timeout,
            max_attempts=max_attempts,
            retry_delay=retry_delay,
        )
        self._writer: Writer[SessionUpdate] = Writer(SESSION_EVENTS, options, registry)
        self._reader = Connections(options)

    async def store_last_event_id(self, session_id: str, event_id: str, timeout: float = PUT_TIMEOUT_S) -> bool:
        """Accept an event id, waiting up to `timeout` seconds for room. False: refused, and counted."""
        return await self._writer.put(SessionUpdate(session_id, event_id), timeout)

    def offer(self, session_id: str, event_id: str) -> bool:
        """As `store_last_event_id`, without waiting, from any thread."""
        return self._writer.send(SessionUpdate(session_id, event_id))

    async def batch_store_event_ids(self, updates: Iterable[tuple[str, str]], timeout: float = PUT_TIMEOUT_S) -> int:
        """Accept pairs of session id and event id, waiting up to `timeout` seconds in all. Returns how many it took."""
        now = asyncio.get_running_loop().time
        deadline = now() + timeout
        accepted = 0
        for number, update in enumerate(updates):
            accepted += await self.store_last_event_id(*update, timeout=max(0.0, deadline - now()))
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        return accepted

    async def get_last_event_id(self, session_id: str) -> str | None:
        """The newest event id that was accepted here or written by any process; None for an unknown session.

        Raises DatabaseUnavailable, DatabaseRefused.
        """
        if (held := self.find_held(session_id)) is not None and not self._reader.is_closed:
            return held
        if not is_key(session_id):
            return None
        async with self._reader.transaction() as tx:
            found = await read_last_event(tx, session_id)
        return None if found is None else found[0]

    def find_held(self, session_id: str) -> str | None:
        """The newest event id of the session that is accepted and not written yet."""
        if not is_key(session_id):
            return None
        if (document := self._writer.find_waiting(session_id)) is not None:
            return _decode(document).event_id
        for batch in self._writer.in_flight:
            for item in batch.items:
                if item.record.session_id == session_id:
                    return str(item.record.last_event_id)
        return None

    async def flush(self, timeout: float = FLUSH_TIMEOUT_S) -> bool:
        """As `Writer.flush`."""
        return await self._writer.flush(timeout)

    @property
    def stats(self) -> WriterStats:
        return self._writer.stats

    async def start(self) -> None:
        """Start writing. The database need not be reachable."""
        await self._writer.start()

    async def close(self, timeout: float | None = None) -> bool:
        """Accept nothing more, and write what is left, as `Writer.shutdown`."""
        try:
            return await self._writer.shutdown(timeout)
        finally:
            await self._reader.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class EventTracker:
    """Records the events of one session. It never waits and never starts a task: it is a callback for any code.

    It remembers the newest `max_pending` event ids that are not written yet.
    """

    def __init__(self, store: SessionStore, session_id: str, max_pending: int = MAX_PENDING) -> None:
        self.session_id = session_id
        self.last_event_id: str | None = None
        self._store = store
        self._pending: deque[str] = deque(maxlen=max_pending)

    def __call__(self, event_id: str) -> bool:
        """False: refused at once, and counted, since there is no room or the store is closed."""
        if self._store.find_held(self.session_id) is None:
            self._pending.clear()
        if not self._store.offer(self.session_id, event_id):
            return False
        self.last_event_id = event_id
        self._pending.append(event_id)
        return True

    @property
    def pending(self) -> tuple[str, ...]:
        """Accepted event ids, the oldest first, of which the newest is not written yet."""
        if self._store.find_held(self.session_id) is None:
            self._pending.clear()
        return tuple(self._pending)


class SessionManager:
    """Makes trackers on one store, whose single task writes for all of them."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store

    async def start(self) -> None:
        """Start the store unless it was started."""
        await self._store.start()

    def create_event_tracker(self, session_id: str, max_pending: int = MAX_PENDING) -> EventTracker:
        return EventTracker(self._store, session_id, max_pending)

    async def shutdown(self, timeout: float = SHUTDOWN_TIMEOUT_S) -> bool:
        """Close the store within `timeout` seconds. False when event ids are left: they are counted."""
        is_clean = await self._store.close(timeout)
        if is_clean:
            log.info("persistence worker shut down cleanly")
        else:
            left = self._store.stats
            log.error("persistence worker shutdown timeout", unwritten=left.unwritten, unknown=left.unknown)
        return is_clean

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()
