"""Parses the messages of the channel, and sums them by id."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from worker.contract.message_reading import InvalidMessage, Message, read_message
from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.observability.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

LOG_PERIOD_S = 60.0
# The kinds of InvalidMessage that `parse_message` raises.
KINDS = ("too_long", "not_utf8", "not_json", "nested_too_deep", "not_an_object", "duplicate_field", "vod_id", "count")

_decode = msgspec.json.Decoder(Message).decode


def parse_message(raw: bytes) -> tuple[str, int]:
    """Id and count of one message; further fields are ignored. Raises InvalidMessage."""
    vod_id, message = read_message(_decode, raw)
    return vod_id, message.count


class MessageSummer:
    """Messages that cannot be counted are measured by kind, and logged once per kind and minute."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._throttle = Throttle(LOG_PERIOD_S, clock.monotonic)
        for kind in KINDS:  # the series exist from the start
            metrics.invalid_messages.labels(kind)

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
