"""Views as producers announce them: a row for each message, or for each entry of a stream."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from worker.contract.message_reading import InvalidMessage, Message, read_message
from worker.pipelines.model import Column, Defaults, InvalidRecord, RecordType, append
from worker.pipelines.records import fields

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window


class ViewEvent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """`count` views of an id at one time. The fields are the columns of the table, in their order."""

    time: datetime
    vod_id: str
    count: int
    event_id: str | None = None


class _Document(Message, gc=False):
    ts: str | int | None = None
    event_id: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def parse(document: bytes, entry_id: EntryId, window: Window) -> ViewEvent:
    """An event without a `ts` has the time of its arrival. Raises InvalidRecord."""
    try:
        vod_id, found = read_message(_decode, document)
    except InvalidMessage as error:
        raise InvalidRecord(str(error), error.detail) from None
    if found.event_id is not None:
        fields.check_key(found.event_id, "event_id")
        if found.ts is None:
            raise InvalidRecord("invalid_field", "`event_id` needs a `ts`: a repeated event must have the same")
    time = fields.time_of(entry_id) if found.ts is None else fields.parse_time(found.ts, "ts")
    fields.check_time(time, entry_id, window, "ts")
    return ViewEvent(time=time, vod_id=vod_id, count=found.count, event_id=found.event_id)


VIEW_EVENTS = RecordType(
    name="view_events",
    columns=(
        Column("time", "timestamptz"),
        Column("vod_id", "text"),
        Column("count", "bigint"),
        Column("event_id", "text"),
    ),
    time="time",
    rule=append(),
    parse=parse,
    row=msgspec.structs.astuple,
    defaults=Defaults(
        batch_size=("VIEW_EVENTS_BATCH_SIZE", 1000),
        interval=("VIEW_EVENTS_FLUSH_INTERVAL", 1.0),
        max_retries=("VIEW_EVENTS_MAX_RETRIES", 3),
        retry_delay=("VIEW_EVENTS_RETRY_DELAY", 0.1),
        capacity=("VIEW_EVENTS_CHANNEL_BUFFER", 10_000),
    ),
)
