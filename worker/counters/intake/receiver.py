"""Sums up the messages that the listener hears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from worker.counters.intake.announced import Announced
    from worker.counters.intake.messages import MessageSummer
    from worker.observability.metrics import Metrics

# So many ids with unwritten sums do not wait for the interval.
FLUSH_AT_IDS = 50_000


class Flushing(Protocol):
    """The loop that flushes what is heard."""

    def sweep_soon(self) -> None:
        """Messages may have been missed."""

    def flush_soon(self) -> None:
        """There are many sums to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnouncedReceiver:
    """Implements Receiver: adds what is heard to `announced`, and sets `announced.ended` at the end."""

    announced: Announced
    messages: MessageSummer
    flushing: Flushing
    metrics: Metrics

    def begin(self, token: int) -> bool:
        self.announced.begin(token)
        return token > 1

    def missed(self) -> None:
        self.metrics.subscription_gaps.inc()
        self.flushing.sweep_soon()

    def receive(self, messages: list[bytes]) -> None:
        before = len(self.announced)
        self.announced.add(self.messages.sum(messages))
        if before < FLUSH_AT_IDS <= len(self.announced):
            self.flushing.flush_soon()

    def end(self) -> None:
        self.announced.ended.set()
