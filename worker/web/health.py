"""Answers `/health`, `/livez` and `/readyz` from the worker's status. Sends no query to Redis or Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.observability.status import Check, State, Status
from worker.web.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    from worker.runtime.clock import Clock

SERVICE = "viewer-worker"


class Health:
    """`grace` is how long a check may fail before `/health` answers 503."""

    def __init__(
        self,
        status: Status,
        clock: Clock,
        version: str,
        grace: timedelta,
        quarantined: Callable[[], dict[str, str]] = dict,
    ) -> None:
        self._status = status
        self._clock = clock
        self._version = version
        self._grace = grace.total_seconds()
        self._quarantined = quarantined

    def health(self) -> Answer:
        """`healthy` (200), `degraded` (200: a check is on hold, or fails within the grace) or `unhealthy` (503)."""
        checks = self._status.checks.values()
        broken = any(self._is_down(check) and self._seconds(check) > self._grace for check in checks)
        well = all(check.state is State.OK for check in checks)
        word = "unhealthy" if broken else "healthy" if well else "degraded"
        body = self._body(word)
        body["checks"] = {check.name: self._describe(check) for check in checks}
        if quarantined := self._quarantined():
            body["quarantined_keys"] = quarantined
        return Answer(503 if broken else 200, body)

    def live(self) -> Answer:
        """200 while the loops run, in any state of Redis and Postgres; 503 when a loop is stuck: restart the worker."""
        late = self._status.late_loops()
        body = self._body("stuck" if late else "alive")
        if late:
            body["stuck_loops"] = late
        return Answer(503 if late else 200, body)

    def ready(self) -> Answer:
        """200 while the worker can do its job; 503 with the failing checks while it cannot, or is stopping."""
        failing = {
            check.name: self._describe(check) for check in self._status.checks.values() if check.state is not State.OK
        }
        if self._status.stopping:
            return Answer(503, self._body("stopping"))
        if failing:
            return Answer(503, {**self._body("not ready"), "checks": failing})
        return Answer(200, self._body("ready"))

    def _body(self, word: str) -> dict[str, object]:
        timestamp = self._clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"status": word, "timestamp": timestamp, "service": SERVICE, "version": self._version}

    def _is_down(self, check: Check) -> bool:
        return check.state in (State.FAILING, State.STARTING)

    def _seconds(self, check: Check) -> float:
        return self._status.seconds_in_state(check.name)

    def _describe(self, check: Check) -> dict[str, object]:
        described: dict[str, object] = {"status": check.state, "for_seconds": round(self._seconds(check), 1)}
        if check.cause:
            described["cause"] = check.cause
        if check.remedy:
            described["remedy"] = check.remedy
        return described | check.facts
