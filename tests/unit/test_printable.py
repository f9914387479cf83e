"""Untrusted text is safe to print."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.observability.printable import excerpt, printable


@given(st.binary(max_size=400))
def test_excerpt_is_short_printable_ascii(key: bytes) -> None:
    shown = excerpt(key)
    assert len(shown) <= 64
    assert shown.isascii()
    assert shown.isprintable()


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    assert printable(text).isprintable()
    if text.isprintable():
        assert printable(text) == text
