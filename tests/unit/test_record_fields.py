"""Times and addresses: every form that is accepted, and what is not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records.fields import check_time, parse_address, parse_time

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
ARRIVED = EntryId(1_764_237_600_000, 0)


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2025-11-27T10:00:00Z", TEN),
        ("2025-11-27t10:00:00z", TEN),
        ("2025-11-27 10:00:00", TEN),
        ("2025-11-27T10:00:00", TEN),
        ("2025-11-27T10:00:00-00:00", TEN),
        ("2025-11-27T15:30:00+05:30", TEN),
        ("2025-11-26T22:00:00-12:00", TEN),
        ("2025-11-28T00:00:00+14:00", TEN),
        ("2025-11-27T10:00:00.5Z", TEN.replace(microsecond=500_000)),
        ("2025-11-27T10:00:00.1234Z", TEN.replace(microsecond=123_400)),
        ("2025-11-27T10:00:00.123456Z", TEN.replace(microsecond=123_456)),
        ("2025-11-27T10:00:00.1234567Z", TEN.replace(microsecond=123_456)),
        ("2025-11-27t15:30:00.999999999+05:30", TEN.replace(microsecond=999_999)),
        ("1969-12-31T23:59:59.999999999Z", datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
        ("2024-02-29T00:00:00Z", datetime(2024, 2, 29, tzinfo=UTC)),
        (1_764_237_600_000, TEN),
        (1_764_237_600_123, TEN.replace(microsecond=123_000)),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
    ],
)
def test_time_is_parsed(value: str | int, time: datetime) -> None:
    parsed = parse_time(value, "time")
    assert parsed == time
    assert parsed.tzinfo is not None


@pytest.mark.parametrize(
    "value",
    [
        "",
        "now",
        "1764237600000",
        "2025-11-27",
        "2025-11-27T10:00Z",
        "2025-11-27T10:00:00.Z",
        "2025-11-27T10:00:00,5Z",
        "2025-11-27T10:00:00.1234567890Z",
        "2025-11-27T10:00:00 Z",
        "2025-11-27T10:00:00Z\n",
        " 2025-11-27T10:00:00Z",
        "2025-11-27T10:00:00UTC",
        "2025-11-27T10:00:00+0530",
        "2025-11-27T10:00:00+05",
        "2025-11-27T10:00:00+24:00",
        "2025-11-27T10:00:00+05:99",
        "2025-11-27X10:00:00Z",
        "20251127T100000Z",
        "2025-W48-4T10:00:00Z",
        "2025-02-29T10:00:00Z",
        "2025-13-01T10:00:00Z",
        "2025-11-27T24:00:00Z",
        "2025-11-27T10:60:00Z",
        "2016-12-31T23:59:60Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "-2025-11-27T10:00:00Z",
        "\u00b2025-11-27T10:00:00Z",
        "\u0662\u0660\u0662\u0665-11-27T10:00:00Z",
        "2025-11-27T10:00:00\x00",
        "x" * 100_000,
        10**15,
        -(10**15),
        10**300,
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_a_time_is_refused(value: str | int) -> None:
    with pytest.raises(InvalidRecord, match="`at` is not a time") as caught:
        parse_time(value, "at")
    assert caught.value.error_class == "invalid_field"


offsets = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59))
zones = offsets.map(lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1))))


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=zones))
def test_every_time_survives_its_text(time: datetime) -> None:
    assert parse_time(time.isoformat(), "time") == time


@given(st.one_of(st.text(), st.integers(), st.from_regex(r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d\Z")))
def test_anything_is_a_time_with_an_offset_or_refused(value: str | int) -> None:
    try:
        time = parse_time(value, "time")
        assert time.utcoffset() is not None
        check_time(time, ARRIVED, Window(1e12, 1e12), "time")
    except InvalidRecord as error:
        assert error.error_class == "invalid_field"


@pytest.mark.parametrize(
    ("seconds", "accepted"),
    [(0, True), (-60, True), (300, True), (-60.001, False), (300.001, False), (300.000_001, False)],
)
def test_window_lies_around_the_arrival_with_its_ends(seconds: float, accepted: bool) -> None:
    time = TEN + timedelta(seconds=seconds)
    if accepted:
        check_time(time, ARRIVED, Window(60.0, 300.0), "time")
    else:
        with pytest.raises(InvalidRecord, match="`time` is too far") as caught:
            check_time(time, ARRIVED, Window(60.0, 300.0), "time")
        assert caught.value.error_class == "time_out_of_range"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", None),
        ("-", None),
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7:443", "203.0.113.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0:0:0:0:0:1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::", "::"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]:443", "fe80::1"),
    ],
)
def test_address_is_parsed(text: str, address: str | None) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "--",
        " ",
        "%",
        "localhost",
        "unix:",
        "1.2.3",
        "01.2.3.4",
        "256.2.3.4",
        "1.2.3.4/24",
        "1.2.3.4:",
        "1.2.3.4:http",
        "1.2.3.4:123456",
        " 1.2.3.4",
        "1.2.3.4\n",
        "1.2.3.4, 5.6.7.8",
        "1.2.3.4\x00",
        "\u0661.2.3.4",
        ":443",
        "[::1",
        "::1]",
        "[[::1]]",
        "[]:443",
        "[::1]443",
        "12345::",
        "1" * 100_000,
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord, match="`ip` is not an IP address"):
        parse_address(text)


def test_long_zone_is_refused_and_not_cached() -> None:
    before = parse_address.cache_info().currsize
    with pytest.raises(InvalidRecord):
        parse_address("fe80::1%" + "x" * 100_000)
    assert parse_address.cache_info().currsize == before


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_every_address_is_parsed_with_and_without_a_port(address: object, port: int) -> None:
    shown = f"[{address}]" if ":" in str(address) else str(address)
    for text in (str(address), shown, f"{shown}:{port}"):
        parsed = parse_address(text)
        assert parsed is not None
        assert ip_address(parsed) == address


@given(st.one_of(st.text(), st.text("0123456789abcdef.:[]%-/")))
def test_any_text_is_an_address_or_nothing_or_refused(text: str) -> None:
    try:
        parsed = parse_address(text)
    except InvalidRecord:
        return
    assert parsed is None or str(ip_address(parsed)) == parsed
