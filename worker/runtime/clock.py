"""Time as an argument: whoever decides by time is given a clock, so that tests can hold it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never jumps. For every decision."""

    def now(self) -> datetime:
        """Wall-clock time in UTC. For people to read, never for a decision."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)
