"""What producers say on the channel `view_count_updates`: `{"vodId": "vod_123", "count": 1}`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import msgspec

from worker.contract.ids import InvalidId, check_id
from worker.counters.intake.quarantine import printable
from worker.observability.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

log = get_logger(__name__)

MAX_BYTES = 64 * 1024
MAX_COUNT = 10**9
LOG_AGAIN_S = 60.0


class InvalidUpdate(Exception):
    """A message that says nothing that can be counted; the text is the kind of mistake, the label of its metric."""


class _Update(msgspec.Struct):
    vod_id: str | int = msgspec.field(name="vodId")
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COUNT)]


_decode = msgspec.json.Decoder(_Update).decode


def parse_update(raw: bytes) -> tuple[str, int]:
    """Id and count of one message; fields that it has besides are ignored. Raises InvalidUpdate."""
    if len(raw) > MAX_BYTES:
        raise InvalidUpdate("too_long")
    try:
        if not raw.isascii():
            raw.decode()
        update = _decode(raw)
        # The decoder takes the last of two equal names. Which of them the producer meant, nobody knows.
        if raw.count(b'"vodId"') != 1 or raw.count(b'"count"') != 1:
            _refuse_duplicates(raw)
        return check_id(update.vod_id), update.count
    except msgspec.ValidationError as error:
        raise InvalidUpdate(_kind(str(error))) from None
    except msgspec.DecodeError:
        raise InvalidUpdate("not_json") from None
    except UnicodeDecodeError:
        raise InvalidUpdate("not_utf8") from None
    except RecursionError:
        raise InvalidUpdate("nested_too_deep") from None
    except InvalidId:
        raise InvalidUpdate("vod_id") from None
    except ValueError:  # what the two parsers disagree about must not end the listener
        raise InvalidUpdate("not_json") from None


def _refuse_duplicates(raw: bytes) -> None:
    pairs: list[tuple[str, object]] = json.loads(
        raw,
        object_pairs_hook=lambda pairs: pairs,
        parse_int=str,  # of any length: only the names matter here
    )
    if max(Counter(name for name, _ in pairs if name in ("vodId", "count")).values()) > 1:
        raise InvalidUpdate("duplicate_field")


def _kind(error: str) -> str:
    for place, kind in (("vodId", "vod_id"), ("count", "count")):
        if error.endswith((f"`$.{place}`", f"field `{place}`")):
            return kind
    return "not_an_object"


class Updates:
    """Sums up messages; what cannot be counted is measured by kind, and logged once per kind and minute."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._silent_until: dict[str, float] = {}

    def sum(self, messages: Sequence[bytes]) -> dict[str, int]:
        """Views by id."""
        views: dict[str, int] = {}
        counted = 0
        # Most messages of a busy moment are alike: each kind of them is parsed once.
        for raw, times in Counter(messages).items():
            try:
                vod_id, count = parse_update(raw)
            except InvalidUpdate as error:
                self._report(str(error), raw, times)
                continue
            views[vod_id] = views.get(vod_id, 0) + count * times
            counted += times
        self._metrics.updates.inc(counted)
        return views

    def _report(self, kind: str, raw: bytes, times: int) -> None:
        self._metrics.updates_invalid.labels(kind).inc(times)
        now = self._clock.monotonic()
        if now >= self._silent_until.get(kind, now):
            self._silent_until[kind] = now + LOG_AGAIN_S
            log.warning("message cannot be counted", kind=kind, message=printable(raw))
