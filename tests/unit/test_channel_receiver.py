"""What is heard on a channel goes into the buffer once it is certain that no other worker hears it, too."""

from __future__ import annotations

from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from tests.support.fakes import FakeClock
from worker.observability.metrics import Metrics
from worker.observability.throttle import Throttle
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import OVERHEAD_BYTES, Buffer, ByteBudget
from worker.pipelines.metrics import BufferMetrics
from worker.pipelines.sources.channel import ChannelReceiver

FIRST, SECOND = uuid4(), uuid4()


class Case:
    """A receiver with a lease that the test sets, listening by the token FIRST."""

    def __init__(self, *, capacity: int = 4, max_bytes: int = 10**6) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.lease = SimpleNamespace(token=FIRST, is_sure=True)
        budget = ByteBudget(max_bytes)
        self.buffer = Buffer(
            Batcher(100, 0.0),
            batch_size=100,
            capacity=capacity,
            budget=budget,
            monotonic=self.clock.monotonic,
            on_due=lambda: None,
        )
        self.receiver = ChannelReceiver(
            pipeline="view_events",
            buffer=self.buffer,
            capacity=capacity,
            budget=budget,
            lease=self.lease,  # type: ignore[arg-type]
            is_first=lambda token: token == FIRST,
            metrics=BufferMetrics(self.metrics.records, "view_events"),
            gaps=self.metrics.event_gaps,
            clock=self.clock,
            warnings=Throttle(60.0, self.clock.monotonic),
        )
        assert not self.receiver.begin(FIRST)

    def hear(self, *messages: bytes) -> None:
        self.receiver.receive(list(messages))

    def taken(self) -> list[tuple[float, bytes]]:
        """When and what, since the last call."""
        closed = self.buffer.take()
        if closed is None:
            return []
        self.buffer.release(len(closed.items), sum(len(message) for _, message in closed.items))
        return closed.items

    def metric(self, name: str) -> float | None:
        labels = {} if name == "view_event_gaps_total" else {"pipeline": "view_events"}
        return self.metrics.registry.get_sample_value(name, labels)

    def lose(self, token: UUID | None = None) -> None:
        self.lease.token = token


def test_messages_go_into_the_buffer_in_their_order() -> None:
    case = Case()
    case.hear(b"1", b"2")
    case.hear()
    case.hear(b"3")
    assert case.taken() == [(1000.0, b"1"), (1000.0, b"2"), (1000.0, b"3")]


def test_what_a_full_buffer_has_no_room_for_is_dropped_counted_and_logged_once_a_minute() -> None:
    case = Case()
    with capture_logs() as logs:
        for _ in range(3):
            case.hear(b"1", b"2", b"3")
        case.clock.advance(61)
        case.hear(b"4")
    assert [line["messages"] for line in logs] == [2, 1]
    assert [message for _, message in case.taken()] == [b"1", b"2", b"3", b"1"]
    for name in ("persistence_dropped_total", "persistence_queue_full_total"):
        assert case.metric(name) == 6


def test_what_comes_while_the_lease_is_not_sure_waits_and_keeps_its_time() -> None:
    case = Case()
    case.lease.is_sure = False
    case.hear(b"1")
    case.clock.advance(5)
    case.hear(b"2")
    assert case.taken() == []
    assert case.metric("persistence_queue_depth") == 2
    case.lease.is_sure = True
    case.clock.advance(5)
    case.hear()
    assert case.taken() == [(1000.0, b"1"), (1005.0, b"2")]
    assert case.metric("persistence_queue_depth") == 0
    assert case.metric("view_event_gaps_total") == 0


@pytest.mark.parametrize("limit", ["records", "bytes"])
def test_what_is_set_aside_is_bounded_together_with_the_buffer(limit: str) -> None:
    size = OVERHEAD_BYTES + 1
    case = Case(capacity=4) if limit == "records" else Case(capacity=100, max_bytes=4 * size + 1)
    case.hear(b"1")
    case.lease.is_sure = False
    case.hear(b"2", b"3", b"4", b"5")
    case.hear(b"6")
    assert case.metric("persistence_dropped_total") == 2
    case.lease.is_sure = True
    case.hear()
    assert [message for _, message in case.taken()] == [b"1", b"2", b"3", b"4"]


def test_what_is_set_aside_is_forgotten_when_the_lease_is_lost() -> None:
    case = Case()
    case.hear(b"1")
    case.lease.is_sure = False
    case.hear(b"2")
    case.lose()
    case.hear(b"3")
    assert case.metric("persistence_queue_depth") == 0
    case.lose(SECOND)
    case.lease.is_sure = True
    case.hear(b"4")
    assert case.receiver.begin(SECOND)
    case.hear(b"5")
    assert [message for _, message in case.taken()] == [b"1", b"5"]
    # The new holder of the lease heard the others, or counted a gap.
    assert case.metric("persistence_dropped_total") == 0


def test_what_is_set_aside_is_forgotten_by_the_next_lease() -> None:
    case = Case()
    case.lease.is_sure = False
    case.hear(b"1")
    case.lose(SECOND)
    case.receiver.begin(SECOND)
    case.lease.is_sure = True
    case.hear(b"2")
    assert [message for _, message in case.taken()] == [b"2"]


@pytest.mark.parametrize("is_sure", [True, False])
def test_the_end_closes_the_buffer_with_what_is_certain(is_sure: bool) -> None:
    case = Case()
    case.lease.is_sure = False
    case.hear(b"1")
    case.lease.is_sure = is_sure
    case.receiver.end()
    assert case.buffer.is_closed
    assert len(case.taken()) == is_sure
    assert case.metric("persistence_dropped_total") == (not is_sure)


def test_a_worker_that_never_listened_ends() -> None:
    case = Case()
    case.lose()
    case.receiver.end()
    assert case.buffer.is_closed


def test_listening_again_is_a_gap() -> None:
    case = Case()
    case.receiver.missed()
    assert case.metric("view_event_gaps_total") == 1
