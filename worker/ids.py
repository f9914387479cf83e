"""What may be an id: the part of a counter's key after the prefix, the `vodId` of a message, `vod_id` in the tables."""

from __future__ import annotations

from worker.errors import ViewerWorkerError

MAX_ID_BYTES = 256


class InvalidId(ViewerWorkerError):
    """Not an id that Postgres can have; the text says why."""


def decode_id(raw: bytes) -> str:
    """The id. Raises InvalidId: empty, over 256 bytes, not UTF-8, or with a NUL."""
    if not raw:
        raise InvalidId("the id is empty")
    if len(raw) > MAX_ID_BYTES:
        raise InvalidId(f"the id has more than {MAX_ID_BYTES} bytes")
    if b"\x00" in raw:
        raise InvalidId("the id has a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidId("the id is not UTF-8") from None
