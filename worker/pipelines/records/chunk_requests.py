"""Requests for chunks of a video, as a server logs them (seed 000)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from worker.pipelines.model import Column, Defaults, RecordType, append
from worker.pipelines.records import fields

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window

TEXTS = ("path", "referer", "user_agent", "sid", "uid", "event_id")


class ChunkEvent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One request. The fields are the columns of the table, in their order.

    `time` None: when a Writer accepts it; not for an event with an `event_id`. `ip` is an IPv4 or IPv6 address.
    """

    time: datetime | None = None
    path: str
    ip: str | None = None
    referer: str | None = None
    user_agent: str | None = None
    sid: str | None = None
    uid: str | None = None
    event_id: str | None = None


class _Document(msgspec.Struct, gc=False):
    time: str | int
    path: str
    ip: str | None = None
    referer: str | None = None
    user_agent: str | None = None
    sid: str | None = None
    uid: str | None = None
    event_id: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def parse(document: bytes, entry_id: EntryId, window: Window) -> ChunkEvent:
    """Raises InvalidRecord."""
    found = fields.decode(_decode, document)
    fields.check_texts(document, found, TEXTS)
    fields.check_id(found.event_id, "event_id")
    time = fields.parse_time(found.time, "time")
    fields.check_time(time, entry_id, window, "time")
    ip = None if found.ip is None else fields.parse_address(found.ip)
    return ChunkEvent(
        time=time,
        path=found.path,
        ip=ip,
        referer=found.referer,
        user_agent=found.user_agent,
        sid=found.sid,
        uid=found.uid,
        event_id=found.event_id,
    )


CHUNK_REQUESTS = RecordType(
    name="chunk_requests",
    columns=(
        Column("time", "timestamptz"),
        Column("path", "text"),
        Column("ip", "inet"),
        Column("referer", "text"),
        Column("user_agent", "text"),
        Column("sid", "text"),
        Column("uid", "text"),
        Column("event_id", "text"),
    ),
    time="time",
    rule=append(),
    parse=parse,
    row=msgspec.structs.astuple,
    defaults=Defaults(
        batch_size=("CHUNKLOG_BATCH_SIZE", 500),
        interval=("CHUNKLOG_BATCH_TIMEOUT", 0.2),
        max_retries=("CHUNKLOG_MAX_RETRIES", 3),
        retry_delay=("CHUNKLOG_RETRY_DELAY", 0.1),
        capacity=("CHUNKLOG_CHANNEL_CAP", 10_000),
        writers=("CHUNKLOG_WORKERS", 2),
        enabled="CHUNKLOG_ENABLED",
    ),
    stamp=fields.stamp,
)
