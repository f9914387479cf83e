"""Reads the values of metrics inside the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Readings:
    """The values of all metrics of a registry at one moment, by the names and labels that a scrape shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in registry.collect()
            for sample in family.samples
        }

    def find(self, name: str, **labels: str) -> float | None:
        """The value, or None where there is no such sample."""
        return self._values.get((name, frozenset(labels.items())))

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(value for (found, _), value in self._values.items() if found == name)

    def get(self, name: str, **labels: str) -> float:
        """The value, or 0 where there is no such sample."""
        return self._values.get((name, frozenset(labels.items())), 0.0)
