"""Batches keep the order, close by size, age or flush, and say why."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from worker.pipelines.batcher import Batcher, Closed, ClosedBy, CoalescingBatcher

AGE = 10.0
# What happens next: seconds pass, then an item is added (None), or the next batch is taken, with or without a flush.
STEPS = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 4.0, 10.0]), st.sampled_from([None, None, False, True])))


@given(STEPS, st.integers(1, 4))
def test_every_item_is_taken_once_in_order_and_each_batch_says_why_it_ends(
    steps: list[tuple[float, bool | None]], size: int
) -> None:
    batcher: Batcher[int] = Batcher(size, AGE)
    added: list[tuple[float, int]] = []
    taken: list[tuple[float, int]] = []
    now = 0.0
    for seconds, flush in steps:
        now += seconds
        if flush is None:
            added.append((now, len(added)))
            batcher.add(len(added) - 1, now)
            continue
        waiting = added[len(taken) :]
        is_due = batcher.due() <= now
        closed = batcher.take(now, flush=flush)
        check(closed, waiting, size, now, flush=flush)
        assert is_due == (closed is not None and closed.by is not ClosedBy.FLUSH)
        taken += closed.items if closed is not None else []
        assert len(batcher) == len(added) - len(taken)
    while closed := batcher.take(math.inf):
        taken += closed.items
    assert taken == added


def check(closed: Closed[int] | None, waiting: list[tuple[float, int]], size: int, now: float, *, flush: bool) -> None:
    is_full = len(waiting) >= size
    is_old = bool(waiting) and now >= waiting[0][0] + AGE
    if closed is None:
        assert not is_full
        assert not is_old
        assert not (flush and waiting)
        return
    assert closed.items == waiting[:size]
    expected = {ClosedBy.SIZE: is_full, ClosedBy.AGE: is_old and not is_full, ClosedBy.FLUSH: flush and not is_old}
    assert expected[closed.by]


def test_age_counts_from_the_first_item() -> None:
    batcher: Batcher[str] = Batcher(3, AGE)
    assert batcher.due() == math.inf
    batcher.add("a", 5.0)
    batcher.add("b", 14.0)
    assert batcher.due() == 15.0
    assert batcher.take(14.9) is None
    assert batcher.take(15.0) == Closed([(5.0, "a"), (14.0, "b")], ClosedBy.AGE)
    assert batcher.due() == math.inf


def test_full_batch_is_due_at_once_and_leaves_the_rest() -> None:
    batcher: Batcher[str] = Batcher(2, AGE)
    for item in "abc":
        batcher.add(item, 0.0)
    assert batcher.due() == -math.inf
    assert batcher.take(0.0) == Closed([(0.0, "a"), (0.0, "b")], ClosedBy.SIZE)
    assert batcher.due() == AGE
    assert batcher.take(0.0) is None
    assert batcher.take(0.0, flush=True) == Closed([(0.0, "c")], ClosedBy.FLUSH)


def test_clearing_forgets_what_waits() -> None:
    batcher: Batcher[str] = Batcher(1, AGE)
    batcher.add("a", 0.0)
    batcher.clear()
    assert len(batcher) == 0
    assert batcher.take(math.inf, flush=True) is None


# Coalescing


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_of_each_key_only_the_newest_item_is_taken_in_the_place_of_the_first(steps: list[tuple[str, bool]]) -> None:
    batcher: CoalescingBatcher[int] = CoalescingBatcher(2, 100.0)
    model: dict[str, tuple[float, int]] = {}
    for number, (key, takes) in enumerate(steps):
        assert batcher.find(key) == (model[key][1] if key in model else None)
        if key in model:
            batcher.replace(key, number, float(number))
        else:
            assert batcher.add(number, float(number), key) == len(model) + 1
        model[key] = (float(number), number)
        assert batcher.find(key) == number
        if takes and (closed := batcher.take(float(number))) is not None:
            keys = list(model)[:2]
            assert closed == Closed([model.pop(each) for each in keys], ClosedBy.SIZE)
        assert len(batcher) == len(model)


def test_age_of_a_slot_counts_from_the_first_item_of_its_key() -> None:
    batcher: CoalescingBatcher[str] = CoalescingBatcher(10, 5.0)
    batcher.add("old", 1.0, "k")
    batcher.replace("k", "new", 4.0)
    assert batcher.due() == 6.0
    assert batcher.take(5.9) is None
    assert batcher.take(6.0) == Closed([(4.0, "new")], ClosedBy.AGE)
    assert batcher.due() == math.inf
