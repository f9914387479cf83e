"""The last event id of each session (seed 004)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from worker.pipelines.model import Column, Defaults, InvalidRecord, RecordType, Rule
from worker.pipelines.records import fields

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window


class SessionEvent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One event. The fields are the columns of the table, in their order.

    Position and `recorded_at` are those of its arrival: of two events of a session, the later arrival is newer.
    """

    session_id: str
    last_event_id: str
    position_ms: int
    position_seq: int
    recorded_at: datetime


class SessionUpdate(msgspec.Struct, frozen=True, gc=False):
    """What an application sends."""

    session_id: str
    event_id: str


_decode = msgspec.json.Decoder(SessionUpdate).decode


def parse(document: bytes, entry_id: EntryId, window: Window) -> SessionEvent:
    """Raises InvalidRecord."""
    found = fields.decode(_decode, document)
    fields.check_key(found.session_id, "session_id")
    fields.check_key(found.event_id, "event_id")
    return SessionEvent(
        session_id=found.session_id,
        last_event_id=found.event_id,
        position_ms=entry_id.ms,
        position_seq=entry_id.seq,
        recorded_at=fields.time_of(entry_id),
    )


def is_key(text: object) -> bool:
    """Whether this may be the id of a session or of an event."""
    try:
        if not isinstance(text, str):
            return False
        fields.check_key(text, "id")
    except (InvalidRecord, UnicodeEncodeError):
        return False
    return True


def coalesce_by(update: SessionUpdate) -> str | None:
    """The session. None for an update that becomes a dead letter: it does not replace one that becomes a row."""
    return update.session_id if is_key(update.session_id) and is_key(update.event_id) else None


SESSION_EVENTS = RecordType(
    name="session_events",
    columns=(
        Column("session_id", "text"),
        Column("last_event_id", "text"),
        Column("position_ms", "bigint"),
        Column("position_seq", "bigint"),
        Column("recorded_at", "timestamptz"),
    ),
    time="recorded_at",
    rule=Rule(key=("session_id",), action="replace_older", position=("position_ms", "position_seq")),
    parse=parse,
    row=msgspec.structs.astuple,
    defaults=Defaults(
        batch_size=("SESSION_BATCH_SIZE", 50),
        interval=("SESSION_FLUSH_INTERVAL", 0.1),
        max_retries=("SESSION_MAX_ATTEMPTS", 3),
        retry_delay=("SESSION_RETRY_DELAY", 0.1),
        capacity=("SESSION_CHANNEL_CAP", 1000),
        counts_first_try=True,
    ),
    coalesce_by=coalesce_by,
)
