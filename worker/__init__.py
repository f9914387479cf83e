"""Moves the views that applications count in Redis to Postgres, each view exactly once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.producer.client import Outcome, SyncViewProducer, ViewProducer

__all__ = ["Outcome", "SyncViewProducer", "ViewProducer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load the client library on first use, because every command imports this package."""
    if name in __all__:
        return getattr(import_module("worker.producer.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
