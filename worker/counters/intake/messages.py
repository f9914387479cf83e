"""Parses the messages of the channel, and sums them by id."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import msgspec

from worker.contract.ids import InvalidId, check_id
from worker.contract.message import MAX_COUNT, MAX_MESSAGE_BYTES
from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.observability.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

LOG_PERIOD_S = 60.0


class InvalidMessage(Exception):
    """A message that cannot be counted. The text is the kind of mistake, which is the label of its metric."""


class _Message(msgspec.Struct):
    vod_id: str | int = msgspec.field(name="vodId")
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]


_decode = msgspec.json.Decoder(_Message).decode


def parse_message(raw: bytes) -> tuple[str, int]:
    """Id and count of one message; further fields are ignored. Raises InvalidMessage."""
    if len(raw) > MAX_MESSAGE_BYTES:
        raise InvalidMessage("too_long")
    try:
        if not raw.isascii():
            raw.decode()
        message = _decode(raw)
        # The decoder takes the last of two equal names, and the producer may have meant the first.
        if raw.count(b'"vodId"') != 1 or raw.count(b'"count"') != 1:
            _refuse_duplicates(raw)
        return check_id(message.vod_id), message.count
    except msgspec.ValidationError as error:
        raise InvalidMessage(_kind(str(error))) from None
    except msgspec.DecodeError:
        raise InvalidMessage("not_json") from None
    except UnicodeDecodeError:
        raise InvalidMessage("not_utf8") from None
    except RecursionError:
        raise InvalidMessage("nested_too_deep") from None
    except InvalidId:
        raise InvalidMessage("vod_id") from None
    except ValueError:  # a document that only one of the two parsers accepts must not end the listener
        raise InvalidMessage("not_json") from None


def _refuse_duplicates(raw: bytes) -> None:
    pairs: list[tuple[str, object]] = json.loads(
        raw,
        object_pairs_hook=lambda pairs: pairs,
        parse_int=str,  # of any length: only the names matter here
    )
    if max(Counter(name for name, _ in pairs if name in ("vodId", "count")).values()) > 1:
        raise InvalidMessage("duplicate_field")


def _kind(error: str) -> str:
    for field, kind in (("vodId", "vod_id"), ("count", "count")):
        if error.endswith((f"`$.{field}`", f"field `{field}`")):
            return kind
    return "not_an_object"


class MessageSummer:
    """Messages that cannot be counted are measured by kind, and logged once per kind and minute."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._throttle = Throttle(LOG_PERIOD_S, clock.monotonic)

    def sum(self, messages: Sequence[bytes]) -> dict[str, int]:
        """Id → views."""
        views: dict[str, int] = {}
        counted = 0
        # Under load most messages are equal: parse each different one once.
        for raw, times in Counter(messages).items():
            try:
                vod_id, count = parse_message(raw)
            except InvalidMessage as error:
                self._report(str(error), raw, times)
                continue
            views[vod_id] = views.get(vod_id, 0) + count * times
            counted += times
        self._metrics.messages.inc(counted)
        return views

    def _report(self, kind: str, raw: bytes, times: int) -> None:
        self._metrics.invalid_messages.labels(kind).inc(times)
        if self._throttle.allows(kind):
            log.warning("message cannot be counted", kind=kind, message=excerpt(raw))
