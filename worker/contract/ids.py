"""Validates ids: the part of a counter's key after the prefix, the `vodId` of a message, `vod_id` in the tables."""

from __future__ import annotations

import hashlib

from worker.errors import ViewerWorkerError

MAX_ID_BYTES = 256
DIGEST_LENGTH = 32


class InvalidId(ViewerWorkerError):
    """Not a valid id; the text says why."""


def decode_id(raw: bytes, name: str = "id") -> str:
    """Decode an id. Raises InvalidId if it is empty, has more than 256 bytes, is not UTF-8, or has a NUL byte.

    The error calls it `name`.
    """
    if not raw:
        raise InvalidId(f"the {name} is empty")
    if len(raw) > MAX_ID_BYTES:
        raise InvalidId(f"the {name} has more than {MAX_ID_BYTES} bytes")
    if b"\x00" in raw:
        raise InvalidId(f"the {name} has a NUL byte")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidId(f"the {name} is not UTF-8") from None


def check_id(vod_id: object) -> str:
    """The id as text; an integer becomes its decimal string. Raises InvalidId as `decode_id`, or for another type."""
    if isinstance(vod_id, bool) or not isinstance(vod_id, str | int):
        raise InvalidId(f"an id is a str or an int, not a {type(vod_id).__name__}")
    if isinstance(vod_id, int) and vod_id.bit_length() > 8 * MAX_ID_BYTES:  # str() refuses the largest
        raise InvalidId(f"the id has more than {MAX_ID_BYTES} bytes")
    try:
        # For a member of an enumeration, use its value, not its name.
        return decode_id((str.__str__(vod_id) if isinstance(vod_id, str) else int.__repr__(vod_id)).encode())
    except UnicodeEncodeError:
        raise InvalidId("the id is not UTF-8") from None


def fitting_id(text: str) -> str:
    """`text` if it fits into an id, else its beginning, `~` and a digest, so that different texts stay different."""
    raw = text.encode()
    if len(raw) <= MAX_ID_BYTES:
        return text
    digest = "~" + hashlib.sha256(raw).hexdigest()[:DIGEST_LENGTH]
    return raw[: MAX_ID_BYTES - len(digest)].decode(errors="ignore") + digest
