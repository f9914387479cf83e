"""The number of keys in a flush follows the backlog."""

from __future__ import annotations

from worker.counters.flush.batch_size import BatchSize


def test_batches_grow_with_a_backlog_shrink_when_slow_and_return_to_the_initial_size() -> None:
    size = BatchSize(100, 2000)
    grown = []
    for seconds in (0.1, 0.01, 0.1, 0.1):
        size.flushed(seconds, left=100_000)
        grown.append(size.keys)
    assert grown == [200, 1600, 2000, 2000]
    size.flushed(3.0, left=100_000)
    assert size.keys == 1000
    size.flushed(1.0, left=100_000)
    assert size.keys == 1000
    size.flushed(0.01, left=50)
    assert size.keys == 100
    size.flushed(9.0, left=100_000)
    assert size.keys == 100
    size.flushed(0.01, left=100_000)
    size.failed()
    assert size.keys == 100


def test_only_timeouts_reduce_a_batch_below_the_initial_size_and_it_grows_back_step_by_step() -> None:
    size = BatchSize(100, 1000)
    size.timed_out(80)
    assert size.keys == 40
    size.flushed(25.0, left=100_000)
    size.flushed(25.0, left=0)
    size.failed()
    assert size.keys == 40
    for keys in (40, 20, 10, 5, 2, 1):
        size.timed_out(keys)
    assert size.keys == 1
    grown = []
    for _ in range(8):
        size.flushed(0.1, left=100_000)
        grown.append(size.keys)
    assert grown == [2, 4, 8, 16, 32, 64, 128, 256]
