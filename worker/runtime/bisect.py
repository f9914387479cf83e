"""Finds the items that make a step fail, and gets the others through."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")


async def bisect(
    items: Sequence[T],
    attempt: Callable[[Sequence[T]], Awaitable[R]],
    concerns_an_item: Callable[[Exception], bool],
    reject: Callable[[T, Exception], None],
) -> AsyncGenerator[R]:
    """Attempt all items together; where one of them fails the attempt, halve until it is alone, and `reject` it.

    Yields what each successful attempt returns, in the order of the items. Other errors than those that
    `concerns_an_item` accepts are raised.
    """
    parts = [items]
    while parts:
        part = parts.pop()
        try:
            result = await attempt(part)
        except Exception as error:
            if not part or not concerns_an_item(error):
                raise
            if len(part) == 1:
                reject(part[0], error)
            else:
                half = len(part) // 2
                parts += part[half:], part[:half]
            continue
        yield result
