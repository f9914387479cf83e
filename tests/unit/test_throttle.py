"""Log lines are limited by topic and time."""

from __future__ import annotations

from tests.support.fakes import FakeClock
from worker.observability.throttle import Throttle


def test_one_line_per_topic_and_period() -> None:
    clock = FakeClock()
    throttle = Throttle(60.0, clock.monotonic)
    assert [throttle.allows(topic) for topic in ("a", "a", "b")] == [True, False, True]
    clock.advance(60)
    assert throttle.allows("a")
    assert not throttle.allows("a")


def test_topics_are_bounded_until_some_are_forgotten() -> None:
    clock = FakeClock()
    throttle = Throttle(60.0, clock.monotonic, max_topics=2)
    assert [throttle.allows(topic) for topic in ("a", "b", "c")] == [True, True, False]
    clock.advance(60)
    assert throttle.allows("a")
    assert not throttle.allows("c")
    throttle.keep({"a"})
    assert throttle.allows("c")
