"""How the two witnesses of a view, its INCR and its message, make one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import func

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import ColumnElement

CountSource = Literal["both", "counters", "messages", "sum"]

# (counted, announced) → views
IN_SQL: dict[CountSource, Callable[[Any, Any], ColumnElement[int]]] = {
    "both": func.greatest,
    "counters": lambda counted, _: counted,
    "messages": lambda _, announced: announced,
    "sum": lambda counted, announced: counted + announced,
}
HERE: dict[CountSource, Callable[[int, int], int]] = {
    "both": max,
    "counters": lambda counted, _: counted,
    "messages": lambda _, announced: announced,
    "sum": lambda counted, announced: counted + announced,
}
