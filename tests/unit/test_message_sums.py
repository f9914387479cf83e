"""Valid and invalid messages, and the sums that are kept until they are written."""

from __future__ import annotations

import json
from sys import getsizeof
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.support.fakes import FakeClock
from worker.contract.message_reading import InvalidMessage
from worker.counters.intake.announced import OVERHEAD_BYTES, Announced
from worker.counters.intake.messages import MessageSummer, parse_message
from worker.observability.metrics import Metrics


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"vodId":"vod_123","count":1}', ("vod_123", 1)),
        (b' {"count": 1000000000, "title": {"vodId": ["count"]}, "vodId": "a b"} ', ("a b", 10**9)),
        (b'{"vodId":42,"count":2}', ("42", 2)),
        (b'{"vodId":-7,"count":2}', ("-7", 2)),
        ('{"vodId":"ünï","count":2,"ts":"2024-01-01T00:00:00Z"}'.encode(), ("ünï", 2)),
        (b'{"\\u0076odId":"escaped","count":3}', ("escaped", 3)),
        (b'{"vodId":"say \\"count\\"","count":3,"note":"\\"vodId\\" twice"}', ('say "count"', 3)),
        (b'{"vodId":"' + b"x" * 256 + b'","count":1}', ("x" * 256, 1)),
    ],
)
def test_valid_message_is_parsed(raw: bytes, expected: tuple[str, int]) -> None:
    assert parse_message(raw) == expected


BAD = {
    "not_json": [b"", b"hello", b'{"vodId":"a","count":1', b'{"vodId":"a","count":1}x', b'{"vodId":"a","count":NaN}'],
    "not_utf8": [b"\xff\xfe", b'{"vodId":"\xff","count":1}', b'{"vodId":"a","count":1,"x":"\xed\xa0\x80"}'],
    "too_long": [b'{"vodId":"a","count":1,"x":"' + b"x" * 65536 + b'"}'],
    "nested_too_deep": [b'{"vodId":"a","count":1,"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"],
    "not_an_object": [b"[1]", b'"a"', b"1", b"null", b"[" * 10_000],
    "duplicate_field": [b'{"vodId":"a","vodId":"b","count":1}', b'{"vodId":"a","count":1,"count":1}'],
    "vod_id": [
        b'{"count":1}',
        b'{"vodId":null,"count":1}',
        b'{"vodId":true,"count":1}',
        b'{"vodId":{},"count":1}',
        b'{"vodId":1.5,"count":1}',
        b'{"vodId":"","count":1}',
        b'{"vodId":"' + b"x" * 257 + b'","count":1}',
        b'{"vodId":"a\\u0000b","count":1}',
    ],
    "count": [
        b'{"vodId":"a"}',
        b'{"vodId":"a","count":"1"}',
        b'{"vodId":"a","count":1.5}',
        b'{"vodId":"a","count":1.0}',
        b'{"vodId":"a","count":true}',
        b'{"vodId":"a","count":null}',
        b'{"vodId":"a","count":0}',
        b'{"vodId":"a","count":-1}',
        b'{"vodId":"a","count":1000000001}',
        b'{"vodId":"a","count":9223372036854775808}',
        b'{"vodId":"a","count":1e400}',
    ],
}


@pytest.mark.parametrize(("kind", "raw"), [(kind, raw) for kind, raws in BAD.items() for raw in raws])
def test_invalid_message_is_refused_with_a_reason(kind: str, raw: bytes) -> None:
    with pytest.raises(InvalidMessage, match=f"^{kind}$"):
        parse_message(raw)


def test_number_too_long_for_python_is_accepted_in_an_ignored_field() -> None:
    number = b'"n":' + b"1" * 5000
    assert parse_message(b'{"vodId":"a","count":1,"x":{"count":0},' + number + b"}") == ("a", 1)


def test_lone_surrogate_is_not_an_id() -> None:
    with pytest.raises(InvalidMessage):
        parse_message(b'{"vodId":"\\ud800","count":1}')


@given(st.binary())
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    try:
        vod_id, count = parse_message(raw)
    except InvalidMessage:
        return
    assert vod_id
    assert 1 <= count <= 10**9


SCALARS = st.none() | st.booleans() | st.floats() | st.text()


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_other_json_is_refused(value: object) -> None:
    with pytest.raises(InvalidMessage):
        parse_message(json.dumps(value).encode())


def test_invalid_messages_are_measured_and_logged_once_a_minute_and_valid_ones_count() -> None:
    metrics, clock = Metrics(), FakeClock()
    messages = MessageSummer(metrics, clock)
    good = b'{"vodId":"a","count":2}'
    with capture_logs() as logs:
        for _ in range(3):
            assert messages.sum([b"junk\n\x1b[31m" + b"x" * 100, good, b"junk", good, good]) == {"a": 6}
        clock.advance(61)
        assert messages.sum([b"junk"]) == {}
    value = metrics.registry.get_sample_value
    assert value("view_count_updates_invalid_total", {"reason": "not_json"}) == 7
    assert value("view_count_updates_total") == 9
    assert [line["message"] for line in logs] == [("junk\\n\\x1b[31m" + "x" * 100)[:64], "junk"]


def announced(metrics: Metrics | None = None, clock: FakeClock | None = None) -> Announced:
    made = Announced(metrics or Metrics(), clock or FakeClock())
    made.begin(1)
    return made


def test_sums_belong_to_one_epoch() -> None:
    sums = announced()
    sums.add({"a": 2, "b": 1})
    assert sums.copy(["a", "c"], epoch=1) == {"a": 2}
    assert sums.copy(["a"], epoch=2) == {}
    sums.begin(1)
    assert sums.copy(["a"], epoch=1) == {"a": 2}
    sums.begin(2)
    assert sums.copy(["a"], epoch=2) == {}


def test_written_sums_are_subtracted_and_others_are_kept() -> None:
    sums, nonce = announced(), uuid4()
    sums.add({"a": 2, "b": 1})
    sums.mark_sent(nonce, {"a": 2, "b": 1})
    sums.add({"a": 5})
    sums.resolve_sent(uuid4())
    assert sums.copy(["a", "b"], 1) == {"a": 7, "b": 1}
    sums.resolve_sent(nonce)  # too late: it was found not to be written
    assert sums.copy(["a", "b"], 1) == {"a": 7, "b": 1}
    sums.mark_sent(nonce, {"a": 7, "b": 1})
    sums.add({"a": 1})
    sums.resolve_sent(nonce)
    assert sums.copy(["a", "b"], 1) == {"a": 1}
    assert sums.hand_over() == ["a"]


def test_age_is_that_of_the_oldest_views_that_were_not_handed_over() -> None:
    clock = FakeClock()
    sums = announced(clock=clock)
    assert sums.oldest_seconds() == 0
    sums.add({"a": 1})
    clock.advance(5)
    sums.add({"b": 1})
    assert sums.oldest_seconds() == 5
    sums.hand_over()
    assert sums.oldest_seconds() == 0
    sums.add({"a": 1})
    clock.advance(2)
    assert sums.oldest_seconds() == 2
    sums.begin(2)
    assert sums.oldest_seconds() == 0


def test_memory_is_bounded_and_dropped_views_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.counters.intake.announced.MAX_BYTES", 2 * OVERHEAD_BYTES + 4 * getsizeof("a"))
    metrics = Metrics()
    sums = announced(metrics)
    sums.add({"long" * 60: 1, "a": 1, "b": 1, "c": 5})
    sums.add({"a": 1, "d": 2})
    assert sums.copy(sums.hand_over(), 1) == {"a": 2, "b": 1}
    assert metrics.registry.get_sample_value("view_count_announced_dropped_total") == 8
    written = uuid4()
    sums.mark_sent(written, {"b": 1})
    sums.resolve_sent(written)
    sums.add({"d": 2})
    assert sums.copy(sums.hand_over(), 1) == {"a": 2, "d": 2}
    sums.begin(2)
    assert metrics.registry.get_sample_value("view_count_announced_dropped_total") == 12
