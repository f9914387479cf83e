"""The worker's own state. Loops write it; `/health` and the metrics only read it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

log = get_logger(__name__)


# Longer than any single step of a loop may take with all its timeouts.
STEP_LIMIT_S = 300.0

# Names of the checks. A loop has the name of its check.
REDIS = "redis"
POSTGRES = "postgres"
SCHEMA = "schema"
MESSAGES = "messages"
VIEW_COUNTS = "view_counts"
GRPC = "grpc"
# What every loop that moves data needs.
SERVERS = (REDIS, POSTGRES, SCHEMA)


class State(StrEnum):
    STARTING = "starting"
    OK = "ok"
    HOLD = "hold"
    FAILING = "failing"


@dataclass(slots=True)
class Check:
    """One condition for the worker to do its job. `since` is monotonic seconds."""

    name: str
    since: float
    state: State = State.STARTING
    cause: str = "not checked yet"
    remedy: str = ""
    facts: dict[str, object] = field(default_factory=dict)


class Status:
    """The named checks of one worker, and an event that wakes the loops that wait for them.

    `monotonic` is a clock, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float], names: tuple[str, ...]) -> None:
        self._monotonic = monotonic
        self._changed = asyncio.Event()
        self._beats: dict[str, float] = {}
        self.stopping = False
        self.checks = {name: Check(name, monotonic()) for name in names}

    def ok(self, name: str, **facts: object) -> None:
        if self._enter(name, State.OK, "", "", facts):
            log.info(f"{name} ok", **facts)

    def failing(self, name: str, cause: str, remedy: str, **facts: object) -> None:
        if self._enter(name, State.FAILING, cause, remedy, facts):
            log.error(f"{name} failing", cause=cause, remedy=remedy, **facts)

    def hold(self, name: str, cause: str, remedy: str, **facts: object) -> None:
        if self._enter(name, State.HOLD, cause, remedy, facts):
            log.error(f"{name} on hold", cause=cause, remedy=remedy, **facts)

    def is_ok(self, *names: str) -> bool:
        return all(self.checks[name].state is State.OK for name in names)

    def seconds_in_state(self, name: str) -> float:
        return self._monotonic() - self.checks[name].since

    def stop(self) -> None:
        self.stopping = True
        self._wake()

    @property
    def changed(self) -> asyncio.Event:
        """An event that is set at the next change of any check's state; each change has its own event."""
        return self._changed

    def expect_beat(self, loop: str, within: float) -> None:
        """A loop made a step, and promises the next one within so many seconds."""
        self._beats[loop] = self._monotonic() + within

    def late_loops(self) -> list[str]:
        """Loops whose next step is overdue: they are stuck."""
        now = self._monotonic()
        return [loop for loop, due in self._beats.items() if now > due]

    def _enter(self, name: str, state: State, cause: str, remedy: str, facts: dict[str, object]) -> bool:
        """True when this is worth a log line: another state, or another hold. Another cause of a failure is not."""
        check = self.checks[name]
        news = check.state is not state or (state is State.HOLD and check.cause != cause)
        check.cause, check.remedy, check.facts = cause, remedy, facts
        if check.state is not state:
            check.state, check.since = state, self._monotonic()
            self._wake()
        return news

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()
