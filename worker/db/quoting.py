"""Quotes identifiers."""

from __future__ import annotations


def quote_identifier(name: str) -> str:
    """`name` as an SQL identifier, whatever characters it has."""
    return '"' + name.replace('"', '""') + '"'
