"""The buffer is bounded in records and bytes, keeps the order, and holds capacity until it is released."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.fakes import FakeClock
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import OVERHEAD_BYTES, Buffer, ByteBudget

AGE = 10.0


def make(
    *,
    clock: FakeClock | None = None,
    batch_size: int = 3,
    capacity: int = 6,
    budget: ByteBudget | None = None,
    due: list[int] | None = None,
) -> Buffer:
    calls = due if due is not None else []
    return Buffer(
        Batcher(batch_size, AGE),
        batch_size=batch_size,
        capacity=capacity,
        budget=budget or ByteBudget(10**6),
        monotonic=(clock or FakeClock()).monotonic,
        on_due=lambda: calls.append(len(calls)),
    )


class BufferModel(RuleBasedStateMachine):
    """Two buffers with one budget of bytes against lists of the documents that they hold."""

    LIMIT = 5 * (OVERHEAD_BYTES + 20)

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.budget = ByteBudget(self.LIMIT)
        self.buffers = [make(clock=self.clock, budget=self.budget) for _ in range(2)]
        self.waiting: list[list[bytes]] = [[], []]
        self.taken: list[list[list[bytes]]] = [[], []]
        self.accepted = [0, 0]
        self.refused = [0, 0]
        self.number = 0

    def held(self, which: int) -> list[bytes]:
        return self.waiting[which] + [document for batch in self.taken[which] for document in batch]

    @property
    def bytes(self) -> int:
        return sum(len(document) + OVERHEAD_BYTES for which in (0, 1) for document in self.held(which))

    @rule(which=st.integers(0, 1), size=st.integers(4, 200))
    def add(self, which: int, size: int) -> None:
        buffer = self.buffers[which]
        self.number += 1
        document = b"%0*d" % (size, self.number)
        fits = self.bytes + size + OVERHEAD_BYTES <= self.LIMIT and len(self.held(which)) < 6
        accepted = buffer.add(document)
        assert accepted == (fits and not buffer.is_closed)
        if accepted:
            self.waiting[which].append(document)
            self.accepted[which] += 1
        else:
            buffer.refuse()
            self.refused[which] += 1

    @rule(seconds=st.sampled_from([1.0, 9.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(which=st.integers(0, 1), flush=st.booleans())
    def take(self, which: int, flush: bool) -> None:
        buffer, waiting = self.buffers[which], self.waiting[which]
        is_due = buffer.due() == 0
        closed = buffer.take(flush_to=self.accepted[which] if flush else 0)
        assert (closed is not None) == (is_due or (flush and bool(waiting)))
        if closed is not None:
            documents = [document for _, document in closed.items]
            assert documents == waiting[:3]
            del waiting[:3]
            self.taken[which].append(documents)

    @rule(which=st.integers(0, 1), last=st.booleans())
    def release(self, which: int, last: bool) -> None:
        if self.taken[which]:
            documents = self.taken[which].pop(-1 if last else 0)
            self.buffers[which].release(len(documents), sum(map(len, documents)))

    @rule(which=st.integers(0, 1))
    def clear(self, which: int) -> None:
        self.buffers[which].clear()
        self.waiting[which], self.taken[which] = [], []

    @rule(which=st.integers(0, 1))
    def close(self, which: int) -> None:
        if self.number > 30:
            self.buffers[which].close()

    @invariant()
    def counts_agree(self) -> None:
        for which, buffer in enumerate(self.buffers):
            assert buffer.held == len(self.held(which))
            assert len(buffer) == len(self.waiting[which])
            assert (buffer.accepted, buffer.refused) == (self.accepted[which], self.refused[which])
        assert self.budget.held == self.bytes


TestBufferModel = BufferModel.TestCase
TestBufferModel.settings = settings(max_examples=60)


def test_what_is_being_written_takes_capacity_until_it_is_released() -> None:
    buffer = make(batch_size=2, capacity=2)
    assert [buffer.add(b"1"), buffer.add(b"2"), buffer.add(b"3")] == [True, True, False]
    assert buffer.take() is not None
    assert not buffer.add(b"3")
    buffer.release(2, 2)
    assert buffer.add(b"3")


def test_a_document_larger_than_the_budget_is_refused_and_the_next_one_fits() -> None:
    buffer = make(budget=ByteBudget(1000))
    assert not buffer.add(b"x" * 1000)
    assert buffer.add(b"x" * (1000 - OVERHEAD_BYTES))


def test_flush_takes_a_batch_that_has_one_of_the_records_accepted_until_then() -> None:
    buffer = make()
    buffer.add(b"1")
    flush_to = buffer.accepted
    buffer.add(b"2")
    assert buffer.take() is None
    closed = buffer.take(flush_to=flush_to)
    assert closed is not None
    assert [document for _, document in closed.items] == [b"1", b"2"]
    buffer.add(b"3")
    assert buffer.take(flush_to=flush_to) is None


def test_the_reader_is_called_for_the_first_record_and_for_a_full_batch_and_when_closed() -> None:
    due: list[int] = []
    buffer = make(batch_size=3, capacity=10, due=due)
    calls = []
    for _ in range(7):
        buffer.add(b"1")
        calls.append(len(due))
    assert calls == [1, 1, 2, 2, 2, 2, 2]
    buffer.close()
    assert len(due) == 3


def test_due_is_the_time_until_the_next_batch() -> None:
    clock = FakeClock()
    buffer = make(clock=clock)
    assert buffer.due() == math.inf
    buffer.add(b"1")
    clock.advance(4)
    assert buffer.due() == AGE - 4
    clock.advance(10)
    assert buffer.due() == 0


def test_a_record_may_be_added_while_its_own_thread_is_adding() -> None:
    """As by a signal handler or a finalizer: with a plain lock this thread would wait for itself."""

    class Interrupted(Batcher[bytes]):
        def add(self, item: bytes, at: float, key: Hashable = None) -> int:
            if item == b"1":
                assert buffer.add(b"from a signal handler")
            return super().add(item, at, key)

    buffer = Buffer(
        Interrupted(3, AGE),
        batch_size=3,
        capacity=6,
        budget=ByteBudget(10**6),
        monotonic=FakeClock().monotonic,
        on_due=lambda: None,
    )
    assert buffer.add(b"1")
    assert (buffer.accepted, buffer.held, len(buffer)) == (2, 2, 2)


def test_child_of_a_fork_begins_empty_and_a_closed_buffer_stays_closed() -> None:
    budget = ByteBudget(1000)
    open_one, closed_one = make(budget=budget), make(budget=budget)
    for buffer in (open_one, closed_one):
        buffer.add(b"1")
        buffer.refuse()
    closed_one.close()
    budget.lock.acquire()  # another thread of the parent has it at the fork
    budget.forked()
    for buffer in (open_one, closed_one):
        buffer.forked()
        assert (buffer.accepted, buffer.refused, buffer.held, len(buffer)) == (0, 0, 0, 0)
    assert budget.held == 0
    assert in_another_thread(lambda: open_one.add(b"2"))
    assert not in_another_thread(lambda: closed_one.add(b"2"))


def in_another_thread(add: Callable[[], bool]) -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(add()), daemon=True)
    thread.start()
    thread.join(5)
    return found == [True]


def test_threads_that_add_while_another_takes_lose_nothing() -> None:
    buffer = make(batch_size=7, capacity=50)
    accepted: list[bytes] = []
    taken: list[bytes] = []

    def add(first: int) -> None:
        for number in range(first, first + 1000):
            document = b"%d" % number
            while not buffer.add(document):
                buffer.refuse()
            accepted.append(document)

    threads = [threading.Thread(target=add, args=(number * 1000,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(taken) < 4000:
        if (closed := buffer.take(flush_to=buffer.accepted)) is not None:
            documents = [document for _, document in closed.items]
            taken += documents
            buffer.release(len(documents), sum(map(len, documents)))
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(accepted)
    for thread_number in range(4):
        own = [int(document) for document in taken if int(document) // 1000 == thread_number]
        assert own == sorted(own)
    assert (buffer.accepted, buffer.taken, buffer.held) == (4000, 4000, 0)
