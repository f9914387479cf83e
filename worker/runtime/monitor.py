"""Watches a server, so that its state is known without asking it when the state is needed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from worker.errors import DatabaseRefused, Unavailable, cause_of
from worker.observability.logs import get_logger
from worker.runtime.backoff import Backoff
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from worker.observability.metrics import Up
    from worker.observability.status import Status

log = get_logger(__name__)

PERIOD_S = 2.0
BEAT_S = 60.0
UNEXPECTED = "The answer is not what this program expects. With LOG_LEVEL=debug the log has the details."


class Monitor:
    """Probes one server: every two seconds, or with backoff while it fails."""

    def __init__(
        self,
        name: str,
        probe: Callable[[], Awaitable[None]],
        status: Status,
        up: Up,
        on_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._probe = probe
        self._status = status
        self._up = up
        self._on_up = on_up
        self._backoff = Backoff(first=0.2, cap=5.0)

    async def run(self, stop: asyncio.Event) -> None:
        self._status.expect_beat(self._name, within=BEAT_S)
        while not stop.is_set():
            delay = await self._look()
            self._status.expect_beat(self._name, within=delay + BEAT_S)
            await wait_first(delay, stop)

    async def _look(self) -> float:
        try:
            await self._probe()
        except (Unavailable, DatabaseRefused) as error:
            return self._down(str(error), error.remedy)
        except Exception as error:
            log.debug("probe failed", check=self._name, exc_info=error)
            return self._down(cause_of(error), UNEXPECTED)
        if not self._status.is_ok(self._name):
            self._on_up()
        self._up.set(1)
        self._status.ok(self._name)
        self._backoff.reset()
        return PERIOD_S

    def _down(self, cause: str, remedy: str) -> float:
        self._up.set(0)
        self._status.failing(self._name, cause, remedy)
        return self._backoff.next()
