"""Texts that are joined for a statement: no text is ever split, and none becomes NULL."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from worker.db.packed_text import NULL, SEPARATOR, pack

TEXT = st.text(st.sampled_from("a" + SEPARATOR + NULL + "ß😀"), max_size=4)
COLUMN = st.lists(st.none() | TEXT, min_size=1, max_size=5)


def split(joined: str | None, separator: str, null: str, length: int) -> list[str | None]:
    """As Postgres does."""
    if joined is None:
        return [None] * length
    return [None if part == null else part for part in joined.split(separator)]


@given(st.lists(COLUMN, min_size=1, max_size=3))
@example([[SEPARATOR, NULL, None, ""]])
@example([[NULL]])
@example([[""], [None, None]])
def test_columns_come_back_as_they_were(columns: list[list[str | None]]) -> None:
    packed = pack(columns)
    found = [
        split(joined, packed.separator, packed.null, len(column))
        for joined, column in zip(packed.texts, columns, strict=True)
    ]
    assert found == columns


def test_usual_texts_are_separated_by_one_character() -> None:
    packed = pack([["a", "b"], [None, "c"]])
    assert packed == ([f"a{SEPARATOR}b", f"{NULL}{SEPARATOR}c"], SEPARATOR, NULL)
