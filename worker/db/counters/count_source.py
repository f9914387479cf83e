"""How the two sources of a view, its INCR and its message, make one number (`VIEW_COUNT_SOURCE`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

CountSource = Literal["both", "counters", "messages", "sum"]

# (counted, announced) → views. The ledger has the same rules in SQL.
VIEWS: dict[CountSource, Callable[[int, int], int]] = {
    "both": max,
    "counters": lambda counted, _: counted,
    "messages": lambda _, announced: announced,
    "sum": lambda counted, announced: counted + announced,
}
