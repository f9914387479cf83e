"""Takes the views that applications count in Redis and makes them durable in Postgres, each view exactly once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.producer.client import Outcome, SyncViewProducer, ViewProducer

__all__ = ["Outcome", "SyncViewProducer", "ViewProducer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The client library, loaded when it is asked for: every command imports this package."""
    if name in __all__:
        return getattr(import_module("worker.producer.client"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
