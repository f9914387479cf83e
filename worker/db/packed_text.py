"""Sends the texts of a column as one text, which Postgres splits.

The driver encodes an array element by element, which takes more time than everything else that Python does for a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from sqlalchemy import ARRAY, Text, bindparam, case, func, literal_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement

# The separators of units and records in ASCII: texts hardly ever contain them.
SEPARATOR = "\x1f"
NULL = "\x1e"


class PackedTexts(NamedTuple):
    """`texts` has one for each column, None for a column of NULLs; the others are the parameters of `unpack`."""

    texts: list[str | None]
    separator: str
    null: str


def pack(columns: Sequence[Sequence[str | None]]) -> PackedTexts:
    """Join the texts of each column."""
    separator, null = SEPARATOR, NULL
    while True:
        texts = [_join(column, separator, null) for column in columns]
        if all(_fits(*each, separator, null) for each in zip(texts, columns, strict=True)):
            return PackedTexts(texts, separator, null)
        # A text contains one of them: take others, which none contains.
        token = uuid4().hex
        separator, null = SEPARATOR + token, NULL + token


def unpack(name: str) -> ColumnElement[Any]:
    """The texts as an array, by the parameters `name`, `separator` and `null`. NULL for a column of NULLs."""
    packed = bindparam(name, type_=Text)
    parts = func.string_to_array(packed, bindparam("separator", type_=Text), bindparam("null", type_=Text))
    # A single text that is empty would be no element.
    return case((packed == literal_column("''", Text), literal_column("ARRAY['']", ARRAY(Text))), else_=parts)


def _join(column: Sequence[str | None], separator: str, null: str) -> str | None:
    if None not in column:
        return separator.join(column)  # type: ignore[arg-type]
    if all(text is None for text in column):
        return None
    return separator.join([null if text is None else text for text in column])


def _fits(joined: str | None, column: Sequence[str | None], separator: str, null: str) -> bool:
    if joined is None:
        return True
    return joined.count(separator) == len(column) - 1 and joined.count(null) == column.count(None)
