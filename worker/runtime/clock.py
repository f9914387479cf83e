"""Time as an argument: code that decides by time takes a clock, so that tests control it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never jumps. For all decisions."""

    def now(self) -> datetime:
        """Wall-clock time in UTC. To show, never for a decision."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)
