"""Bisection finds the items that make a step fail, and processes the others."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.runtime.bisect import bisect


async def run(items: list[int], bad: set[int]) -> tuple[list[int], list[int], int]:
    """The processed items, the rejected items, and the number of attempts."""
    rejected: list[int] = []
    attempts = 0

    async def attempt(part: Sequence[int]) -> Sequence[int]:
        nonlocal attempts
        attempts += 1
        if bad.intersection(part):
            raise ValueError
        return part

    def reject(item: int, error: Exception) -> None:
        assert isinstance(error, ValueError)
        rejected.append(item)

    done = [item async for part in bisect(items, attempt, lambda error: True, reject) for item in part]
    return done, rejected, attempts


@given(st.lists(st.integers(0, 50), unique=True), st.sets(st.integers(0, 50)))
async def test_every_item_is_processed_or_rejected_in_order(items: list[int], bad: set[int]) -> None:
    done, rejected, _ = await run(items, bad)
    assert done == [item for item in items if item not in bad]
    assert rejected == [item for item in items if item in bad]


async def test_one_bad_item_of_a_thousand_costs_about_twenty_attempts() -> None:
    _, rejected, attempts = await run(list(range(1000)), {700})
    assert rejected == [700]
    assert attempts <= 21


async def test_other_errors_are_raised_and_so_is_an_error_without_items() -> None:
    async def attempt(_: Sequence[int]) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        [_ async for _ in bisect([1, 2], attempt, lambda error: False, lambda *_: None)]
    with pytest.raises(ValueError):  # noqa: PT011
        [_ async for _ in bisect([], attempt, lambda error: True, lambda *_: None)]
