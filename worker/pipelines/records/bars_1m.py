"""Bars of one minute: prices and volume of a symbol (seed 002)."""

from __future__ import annotations

from datetime import datetime
from math import isfinite
from typing import TYPE_CHECKING

import msgspec

from worker.pipelines.model import Column, Defaults, InvalidRecord, RecordType, Rule
from worker.pipelines.records import fields

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window

MAX_VOLUME = 2**63 - 1
PRICES = ("open", "high", "low", "close", "vwap")


class Bar(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One bar. The fields are the columns of the table, in their order. `timestamp` is the beginning of the minute."""

    symbol: str
    timestamp: datetime
    open: float
    high: float
    low: float
    close: float
    volume: int
    vwap: float


class _Document(msgspec.Struct, gc=False):
    symbol: str
    timestamp: str | int
    open: float
    high: float
    low: float
    close: float
    volume: int | float
    vwap: float


_decode = msgspec.json.Decoder(_Document).decode


def parse(document: bytes, entry_id: EntryId, window: Window) -> Bar:
    """Raises InvalidRecord."""
    found = fields.decode(_decode, document)
    fields.check_key(found.symbol, "symbol")
    timestamp = fields.parse_time(found.timestamp, "timestamp")
    fields.check_time(timestamp, entry_id, window, "timestamp")
    for name in PRICES:
        if not isfinite(getattr(found, name)):
            raise InvalidRecord("invalid_field", f"`{name}` is not a finite number")
    if found.high < found.low:
        raise InvalidRecord("invalid_field", "`high` is less than `low`")
    return Bar(
        symbol=found.symbol,
        timestamp=timestamp,
        open=found.open,
        high=found.high,
        low=found.low,
        close=found.close,
        volume=_parse_volume(found.volume),
        vwap=found.vwap,
    )


def _parse_volume(value: float) -> int:
    """A whole number, also written `36494.0`. Raises InvalidRecord."""
    if isinstance(value, float) and not value.is_integer():
        raise InvalidRecord("invalid_field", "`volume` is not a whole number")
    if not 0 <= value <= MAX_VOLUME:
        raise InvalidRecord("invalid_field", "`volume` is negative or above 2^63 - 1")
    return int(value)


BARS_1M = RecordType(
    name="bars_1m",
    columns=(
        Column("symbol", "text"),
        Column("timestamp", "timestamptz"),
        *(Column(name, "double precision") for name in ("open", "high", "low", "close")),
        Column("volume", "bigint"),
        Column("vwap", "double precision"),
    ),
    time="timestamp",
    rule=Rule(key=("symbol", "timestamp"), action="replace"),
    parse=parse,
    row=msgspec.structs.astuple,
    defaults=Defaults(
        batch_size=("BARS_DB_WRITE_BATCH_SIZE", 1000),
        interval=("BARS_DB_WRITE_INTERVAL", 1.0),
        max_retries=("BARS_DB_MAX_RETRIES", 3),
        retry_delay=("BARS_DB_RETRY_DELAY", 0.1),
        capacity=("BARS_DB_WRITE_QUEUE_SIZE", 10_000),
        accept_past=100 * 365 * 86_400.0,
    ),
)
