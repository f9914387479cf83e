"""Fields that several records have: documents, times, addresses, texts."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from worker.contract import times
from worker.pipelines.model import InvalidRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window

D = TypeVar("D")
S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T", bound="Timed")

MAX_TEXT_BYTES = 64 * 1024
MAX_ID_BYTES = 256
# No address with brackets, zone and port is longer. Addresses are cached, so a long zone would fill the memory.
MAX_ADDRESS_LENGTH = 128
_SURROGATE = re.compile("[\ud800-\udfff]")
_WITH_PORT = re.compile(r"\[(?P<ipv6>[^\[\]]+)\](?::\d{1,5})?|(?P<ipv4>[\d.]+):\d{1,5}", re.ASCII)


class Timed(Protocol):
    """A record that needs a time."""

    @property
    def time(self) -> datetime | None: ...
    @property
    def event_id(self) -> str | None: ...


def decode(decoder: Callable[[bytes], D], document: bytes) -> D:
    """Decode a JSON document. Raises InvalidRecord."""
    try:
        if not document.isascii():
            document.decode()
        return decoder(document)
    except msgspec.ValidationError as error:
        raise InvalidRecord("invalid_field", str(error)) from None
    except UnicodeDecodeError:
        raise InvalidRecord("not_utf8", "the document is not UTF-8") from None
    except msgspec.DecodeError:
        raise InvalidRecord("not_json", "the document is not JSON") from None
    except RecursionError:
        raise InvalidRecord("not_json", "the document is nested too deep") from None


def parse_time(value: str | int, name: str) -> datetime:
    """As `times.parse_time`. Raises InvalidRecord."""
    try:
        return times.parse_time(value)
    except ValueError:
        raise InvalidRecord("invalid_field", f"`{name}` is not a time in RFC 3339 or in milliseconds") from None


def time_of(entry_id: EntryId) -> datetime:
    """The time of arrival. Raises InvalidRecord for an id that a producer chose beyond the calendar."""
    try:
        return times.parse_time(entry_id.ms)
    except ValueError:
        raise InvalidRecord("time_out_of_range", "the id of the entry is not a time") from None


def check_time(time: datetime, entry_id: EntryId, window: Window, name: str) -> None:
    """Raises InvalidRecord unless `time` lies in the window around the arrival of the entry."""
    arrived = entry_id.ms / 1000
    if not arrived - window.past <= time.timestamp() <= arrived + window.future:
        raise InvalidRecord("time_out_of_range", f"`{name}` is too far from the time of arrival")


def check_texts(document: bytes, record: msgspec.Struct, names: tuple[str, ...]) -> None:
    """Raises InvalidRecord for a text with a NUL or of more than 64 KiB."""
    has_nul = b"\\u0000" in document
    if not has_nul and len(document) <= MAX_TEXT_BYTES:
        return
    for name in names:
        text = getattr(record, name)
        if text is None:
            continue
        if "\x00" in text:
            raise InvalidRecord("invalid_field", f"`{name}` has a NUL")
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise InvalidRecord("invalid_field", f"`{name}` has more than 64 KiB")


def check_key(text: str, name: str) -> None:
    """Raises InvalidRecord for a key with a NUL, that is empty, or that has more than 256 bytes."""
    check_id(text, name)
    if "\x00" in text:
        raise InvalidRecord("invalid_field", f"`{name}` has a NUL")


def stamp(record: T, now: Callable[[], datetime]) -> T:
    """Fill in the time of acceptance. An `event_id` needs a time of the application's own: a repeated record must have
    the same.
    """
    if record.time is not None or record.event_id is not None:
        return record
    return msgspec.structs.replace(record, time=now())  # type: ignore[type-var]


def replace_surrogates(record: S) -> S:
    """The record with U+FFFD for what is not Unicode in its texts: bytes of a header, for example."""
    texts = {name: value for name, value in msgspec.structs.asdict(record).items() if isinstance(value, str)}
    return msgspec.structs.replace(record, **{name: _SURROGATE.sub("\ufffd", text) for name, text in texts.items()})


def check_id(text: str | None, name: str) -> None:
    """Raises InvalidRecord for an id that is empty or has more than 256 bytes."""
    if text is not None and not 1 <= len(text.encode()) <= MAX_ID_BYTES:
        raise InvalidRecord("invalid_field", f"`{name}` must have 1 to {MAX_ID_BYTES} bytes")


@lru_cache(maxsize=65_536)
def parse_address(text: str) -> str | None:
    """An IP address with or without a port, as Postgres writes it; None for "" and "-". Raises InvalidRecord."""
    if text in ("", "-"):
        return None
    try:
        if len(text) > MAX_ADDRESS_LENGTH:
            raise ValueError
        if match := _WITH_PORT.fullmatch(text):
            text = match["ipv6"] or match["ipv4"]
        # Without a zone (fe80::1%eth0): Postgres has no place for it.
        return str(ip_address(text.partition("%")[0]))
    except ValueError:
        raise InvalidRecord("invalid_field", "`ip` is not an IP address") from None
