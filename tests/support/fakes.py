"""Stand-ins for unit tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from worker.db.counters.reads import Shown, Top, TopEntry


class FakeNumbers:
    """Returns numbers computed from the request; raises `error` if it is set."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def views(self, ids: Sequence[str]) -> list[Shown]:
        if self.error is not None:
            raise self.error
        return [Shown(vod_id, views=len(vod_id), pending=1, stored=len(vod_id) - 1) for vod_id in ids]

    async def top(self, window: timedelta, limit: int) -> Top:
        return Top(datetime(2024, 1, 1, tzinfo=UTC) - window, [TopEntry("a", 5, 7)] * limit)


class FakeClock:
    """A clock that moves only when `advance` is called."""

    def __init__(self) -> None:
        self._seconds = 1000.0

    def monotonic(self) -> float:
        return self._seconds

    def now(self) -> datetime:
        return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=self._seconds - 1000)

    def advance(self, seconds: float) -> None:
        self._seconds += seconds
