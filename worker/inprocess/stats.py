"""What became of the records of a Writer, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriterStats:
    """Numbers of records.

    Accepted ones are `coalesced + written + repeated + dead + dropped + unwritten + unknown + queued`.

    `refused`: `send` returned False. `coalesced`: a newer one of the same key came before they were written.
    `written`: rows. `repeated`: rows that were there already, with their `event_id`. `dead`: dead letters. `dropped`:
    they could not even be kept as such. `queued`: not written yet; after `shutdown`, these are `unwritten`, and those
    whose commit had no answer `unknown`.
    """

    accepted: int = 0
    refused: int = 0
    coalesced: int = 0
    written: int = 0
    repeated: int = 0
    dead: int = 0
    dropped: int = 0
    unwritten: int = 0
    unknown: int = 0
    queued: int = 0
