"""Makes text from outside safe to print: it may hold control characters of a terminal, or anything else."""

from __future__ import annotations

EXCERPT_LENGTH = 64


def printable(text: str) -> str:
    """`text` with everything that is not printable escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def excerpt(raw: bytes) -> str:
    """The beginning of `raw`, at most 64 characters of printable ASCII."""
    text = raw[:EXCERPT_LENGTH].decode(errors="backslashreplace")
    return text.encode("unicode_escape").decode()[:EXCERPT_LENGTH]
