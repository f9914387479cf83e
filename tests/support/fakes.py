"""Stand-ins for unit tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from worker.db.counters.reads import Bucket, Shown, Top, TopEntry


class FakeNumbers:
    """Returns numbers computed from the request; raises `error` if it is set."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.is_exact = True

    async def views(self, ids: Sequence[str]) -> list[Shown]:
        if self.error is not None:
            raise self.error
        return [Shown(vod_id, len(vod_id), 1, len(vod_id) - 1, self.is_exact) for vod_id in ids]

    async def top(self, window: timedelta, limit: int) -> Top:
        now = datetime(2024, 1, 1, tzinfo=UTC)
        return Top(now - window, now, [TopEntry("a", 5, 7)] * limit, self.is_exact)


class FakeHistories:
    """Has 3 views in the bucket in which the range begins. `asked` are the arguments of the last call."""

    asked: tuple[object, ...] = ()

    async def history(self, vod_id: str, bucket: str, first: datetime, last: datetime) -> tuple[datetime, list[Bucket]]:
        self.asked = (vod_id, bucket, first, last)
        return last, [Bucket(first, 3)]


class FakeRecords:
    """Has `stored` bars or values, one for each minute from the asked time on; raises `error` if it is set."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.stored = 2
        self.asked: list[Any] = []
        self.values = {"open": 1.5, "high": 2.0, "low": 1.0, "close": 1.25, "volume": 36494, "vwap": 0.0}
        self.value: float | None = 0.5
        self.bucket: dict[str, Any] = {"count": 4, "min": -1.0, "max": 2.5, "sum": 3.0}

    async def bars(self, symbol: str, first: datetime, last: datetime, at_most: int) -> list[dict[str, Any]]:
        self._ask(symbol, first, last, at_most)
        minutes = range(min(self.stored, at_most))
        return [{"symbol": symbol, "timestamp": first + timedelta(minutes=n), **self.values} for n in minutes]

    async def latest_bars(self, symbol: str, count: int) -> list[dict[str, Any]]:
        self._ask(symbol, count)
        return [{"symbol": symbol, "timestamp": datetime(2024, 1, 1, tzinfo=UTC), **self.values}]

    async def last_event(self, session_id: str) -> tuple[str, datetime] | None:
        self._ask(session_id)
        return None if session_id == "unknown" else ("e1", datetime(2024, 1, 1, 0, 0, 0, 250_000, tzinfo=UTC))

    async def metric_values(
        self, service: str, metric: str, first: datetime, last: datetime, at_most: int
    ) -> list[tuple[datetime, float | None]]:
        self._ask(service, metric, first, last, at_most)
        return [(first + timedelta(minutes=n), self.value) for n in range(min(self.stored, at_most))]

    async def metric_buckets(
        self, service: str, metric: str, first: datetime, last: datetime, width: timedelta, summable: float
    ) -> list[dict[str, Any]]:
        self._ask(service, metric, first, last, width)
        return [{"start": first + n * width, **self.bucket} for n in range(self.stored)]

    def _ask(self, *arguments: Any) -> None:
        self.asked.append(arguments)
        if self.error is not None:
            raise self.error


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
