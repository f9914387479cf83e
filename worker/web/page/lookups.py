"""What only the databases know: the most-viewed ids, and the dead letters that are stored.

One loop reads them, every ten seconds while a page is open. All pages share what it read.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from worker.contract.times import format_time
from worker.errors import DatabaseRefused, Unavailable, cause_of
from worker.observability.logs import get_logger
from worker.observability.status import SERVERS
from worker.runtime.waiting import run_until, wait_first
from worker.web.views_api import top_document

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from worker.db.counters.reads import Top
    from worker.observability.status import Status
    from worker.runtime.clock import Clock

log = get_logger(__name__)

LOOP = "page lookups"
PERIOD_S = 10.0
BEAT_S = 60.0
WINDOW = timedelta(hours=1)
LIMIT = 10


class Tops(Protocol):
    """Raises Unavailable, DatabaseRefused."""

    async def top(self, window: timedelta, limit: int) -> Top: ...


class Letters(Protocol):
    """Counts the newest stored dead letters by pipeline. Raises Unavailable, DatabaseRefused."""

    async def count_dead_letters(self) -> dict[str, int]: ...


class Lookups:
    """`tops` is None where views are not counted.

    `found` has what was read last, and when: `top`, `deadLetters`, `readAt`.
    """

    def __init__(self, tops: Tops | None, letters: Letters, status: Status, clock: Clock) -> None:
        self._tops = tops
        self._letters = letters
        self._status = status
        self._clock = clock
        self._wake = asyncio.Event()
        self._due = False
        self.found: dict[str, Any] = {}

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._status.expect_beat(LOOP, within=PERIOD_S + BEAT_S)
            if self._due and self._status.is_ok(*SERVERS):
                self._due = False
                await run_until(stop, self.look(), LOOP)  # slow servers do not delay the stop
                await wait_first(PERIOD_S, stop)
            else:
                await wait_first(PERIOD_S, stop, self._wake, self._status.changed)
            self._wake.clear()

    def want(self) -> None:
        """A page is open: look again when ten seconds have passed since the last look."""
        self._due = True
        self._wake.set()

    async def look(self) -> None:
        if self._tops is not None:
            await self._keep("top", self._read_top)
        await self._keep("deadLetters", self._letters.count_dead_letters)

    async def _read_top(self) -> dict[str, Any]:
        assert self._tops is not None  # asked by look()  # noqa: S101
        return top_document(await self._tops.top(WINDOW, LIMIT))

    async def _keep(self, name: str, read: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        try:
            self.found[name] = await read()
            self.found["readAt"] = format_time(self._clock.now())
        except (Unavailable, DatabaseRefused) as error:
            self.found[name] = {"error": str(error)}
        except Exception as error:
            # A mistake here must not end the worker.
            log.error("page lookup failed", lookup=name, exc_info=error)
            self.found[name] = {"error": cause_of(error)}
