"""The names of keys in Redis, and what may stand in them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from worker.errors import ViewerWorkerError

MAX_COUNT = 2**63 - 1
MAX_ID_BYTES = 256
DIGEST_LENGTH = 32
_CANONICAL = re.compile(rb"0|[1-9][0-9]{0,18}")
_GLOB = re.compile(rb"([*?\[\]\\^-])")


class InvalidId(ViewerWorkerError):
    """This cannot be an id in Postgres; the text says why."""


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys of one prefix. The marker's name follows from it: two workers on one prefix cannot miss each other."""

    prefix: bytes

    @property
    def marker(self) -> bytes:
        return b"viewer-worker:settled:" + self.prefix

    @property
    def probe(self) -> bytes:
        return b"viewer-worker:probe:" + self.prefix

    @property
    def pattern(self) -> bytes:
        """For SCAN: every counter, whatever special characters the prefix has."""
        return _GLOB.sub(rb"\\\1", self.prefix) + b"*"

    def identity(self, replid: str | None) -> str | None:
        """What a data set is recognised by: its history, and which of its keys are meant. None if Redis hides it."""
        return None if replid is None else f"{replid} {self.prefix.decode(errors='backslashreplace')}"

    def counter(self, vod_id: str) -> bytes:
        return self.prefix + vod_id.encode()

    def vod_id(self, key: bytes) -> str:
        """The id that a counter's key names. Raises InvalidId."""
        return decode_id(key[len(self.prefix) :])


def decode_id(raw: bytes) -> str:
    """The id as text. Raises InvalidId: empty, over 256 bytes, not UTF-8, or with a NUL."""
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


def check_id(vod_id: object) -> str:
    """The id as text; an integer means its decimal string. Raises InvalidId, as `decode_id` and for any other type."""
    if isinstance(vod_id, bool) or not isinstance(vod_id, str | int):
        raise InvalidId(f"an id is a str or an int, not a {type(vod_id).__name__}")
    if isinstance(vod_id, int) and vod_id.bit_length() > 8 * MAX_ID_BYTES:  # str() refuses the largest
        raise InvalidId(f"the id has more than {MAX_ID_BYTES} bytes")
    try:
        return decode_id(str(vod_id).encode())
    except UnicodeEncodeError:
        raise InvalidId("the id is not UTF-8") from None


def fitting_id(text: str) -> str:
    """`text` where it fits into an id; else its beginning, `~` and a digest, so that different texts stay different."""
    raw = text.encode()
    if len(raw) <= MAX_ID_BYTES:
        return text
    digest = "~" + hashlib.sha256(raw).hexdigest()[:DIGEST_LENGTH]
    return raw[: MAX_ID_BYTES - len(digest)].decode(errors="ignore") + digest


def parse_count(value: bytes) -> int | None:
    """A counter's value as a number; None unless it is 0 … 2^63-1, written as Redis writes it."""
    if _CANONICAL.fullmatch(value) is None:
        return None
    count = int(value)
    return count if count <= MAX_COUNT else None
