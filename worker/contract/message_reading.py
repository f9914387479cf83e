"""Reads a message of the channel, and refuses an invalid one. The producer does not need it."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from worker.contract.ids import InvalidId, check_id
from worker.contract.message import MAX_COUNT, MAX_MESSAGE_BYTES
from worker.errors import ViewerWorkerError

if TYPE_CHECKING:
    from collections.abc import Callable


class InvalidMessage(ViewerWorkerError):
    """Not a valid message. The text is the kind of mistake, a label of a few words; `detail` says what is wrong."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind)
        self.detail = detail


class Message(msgspec.Struct):
    """The fields that every reader needs. `vod_id` is not checked yet."""

    vod_id: str | int = msgspec.field(name="vodId")
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]


M = TypeVar("M", bound=Message)


def read_message(decode: Callable[[bytes], M], raw: bytes) -> tuple[str, M]:
    """The id of a message, and its fields as `decode` reads them from JSON. Raises InvalidMessage."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise InvalidMessage("too_long", f"the message has more than {MAX_MESSAGE_BYTES} bytes")
    try:
        if not raw.isascii():
            raw.decode()
        message = decode(raw)
        # The decoder takes the last of two equal names, and the producer may have meant the first.
        if raw.count(b'"vodId"') != 1 or raw.count(b'"count"') != 1:
            _refuse_duplicates(raw)
        return check_id(message.vod_id), message
    except msgspec.ValidationError as error:
        raise InvalidMessage(_kind(str(error)), str(error)) from None
    except msgspec.DecodeError:
        raise InvalidMessage("not_json", "the message is not JSON") from None
    except UnicodeDecodeError:
        raise InvalidMessage("not_utf8", "the message is not UTF-8") from None
    except RecursionError:
        raise InvalidMessage("nested_too_deep", "the message is nested too deep") from None
    except InvalidId as error:
        raise InvalidMessage("vod_id", f"`vodId`: {error}") from None
    except ValueError:  # a document that only one of the two parsers accepts must not end its reader
        raise InvalidMessage("not_json", "the message is not JSON") from None


def _refuse_duplicates(raw: bytes) -> None:
    pairs: list[tuple[str, object]] = json.loads(
        raw,
        object_pairs_hook=lambda pairs: pairs,
        parse_int=str,  # of any length: only the names matter here
    )
    if max(Counter(name for name, _ in pairs if name in ("vodId", "count")).values()) > 1:
        raise InvalidMessage("duplicate_field", "`vodId` or `count` is there twice")


def _kind(error: str) -> str:
    for field, kind in (("vodId", "vod_id"), ("count", "count")):
        if error.endswith((f"`$.{field}`", f"field `{field}`")):
            return kind
    return "invalid_field" if "at `$." in error else "not_an_object"
