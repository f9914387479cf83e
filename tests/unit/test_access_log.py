"""Access logs: the fields of a line, and how malformed lines are reported."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from pathlib import Path

import pytest

from worker.producer.access_log import MAX_LINE_BYTES, MalformedLine, Request, read_access_log

LOG = Path(__file__).parents[1] / "data" / "access.log"
GOOD = b'203.0.113.7 - - [17/May/2015:10:05:03 +0000] "GET /a HTTP/1.1" 200 1 "-" "-"\n'


def lines_of(log: bytes, first_line: int = 1) -> list[Request | MalformedLine]:
    return list(read_access_log(io.BytesIO(log), first_line))


def only(log: bytes) -> Request | MalformedLine:
    (line,) = lines_of(log)
    return line


@pytest.fixture
def sample() -> list[Request | MalformedLine]:
    return lines_of(LOG.read_bytes())


def test_every_field_is_read(sample: list[Request | MalformedLine]) -> None:
    assert sample[0] == Request(
        time=datetime(2015, 5, 17, 10, 5, 3, tzinfo=UTC),
        ip="203.0.113.7",
        method="GET",
        path="/watch/vod_1",
        status=200,
        referer="http://example.org/list",
        user_agent="Mozilla/5.0 (X11; Linux x86_64)",
    )


def test_every_line_is_a_request_or_malformed_with_a_reason(sample: list[Request | MalformedLine]) -> None:
    assert [line.path if isinstance(line, Request) else line.reason for line in sample] == [
        "/watch/vod_1",
        "/watch/vod_1",
        "/watch/vod_2",
        "/with space/and%20escape",
        "/watch/vod_2",
        "/old",
        "the request has no path",
        "the request has no path",
        "day is out of range for month",
        "the referer is missing or not complete",
        "the address is missing or not complete",
        "the user agent is missing or not complete",
        "/watch/vod_1",
        "/",
        "the identity or user is missing or not complete",
    ]
    assert [line.number for line in sample if isinstance(line, MalformedLine)] == [7, 8, 9, 10, 11, 12, 15]


def test_addresses_time_zones_and_escaped_quotes_are_read(sample: list[Request | MalformedLine]) -> None:
    _, ipv6, quoted, zone, no_address, name, *_ = sample
    assert isinstance(ipv6, Request)
    assert (ipv6.ip, ipv6.time, ipv6.referer, ipv6.user_agent) == (
        "2001:db8::17",
        datetime(2015, 5, 17, 8, 5, 4, tzinfo=UTC),
        None,
        None,
    )
    assert isinstance(quoted, Request)
    assert (quoted.referer, quoted.user_agent) == ('http://example.org/?q="quoted"', 'a "strange" agent \\o/')
    assert isinstance(zone, Request)
    assert (zone.time, zone.method) == (datetime(2016, 3, 1, 1, 29, 59, tzinfo=UTC), "HEAD")
    assert isinstance(no_address, Request)
    assert no_address.ip is None
    assert isinstance(name, Request)
    assert name.ip == "cache.example.org"


def test_reading_can_start_at_any_line(sample: list[Request | MalformedLine]) -> None:
    assert lines_of(LOG.read_bytes(), first_line=9) == sample[8:]
    assert lines_of(GOOD, first_line=2) == []


def test_bytes_that_are_not_utf8_are_escaped_in_the_path() -> None:
    line = only(GOOD.replace(b"/a", b"/\xff\xc3\xa9"))
    assert isinstance(line, Request)
    assert line.path == "/\\xffé"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_every_line_ending_is_accepted(end: bytes) -> None:
    assert isinstance(only(GOOD.rstrip() + end), Request)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD.replace(b"2015", b"0000"), "year 0 is out of range"),
        (GOOD.replace(b"+0000", b"+9900"), "offset must be"),
        (GOOD.replace(b"May", b"Mai"), "the time is not like"),
        (GOOD.replace(b"200", b"OK"), "the status is missing"),
        (GOOD.replace(b"/a", b"/\x00"), "it has a NUL byte"),
        (b"\x00" * (3 * MAX_LINE_BYTES), "longer than 65,536 bytes"),
        (GOOD.replace(b"/a", b"/" + b"a" * MAX_LINE_BYTES), "longer than 65,536 bytes"),
    ],
)
def test_malformed_line_is_reported_and_the_lines_around_it_are_read(line: bytes, reason: str) -> None:
    before, malformed, after = lines_of(GOOD + line.rstrip(b"\n") + b"\n" + GOOD)
    assert isinstance(before, Request)
    assert isinstance(after, Request)
    assert isinstance(malformed, MalformedLine)
    assert malformed.number == 2
    assert malformed.reason.startswith(reason)
    assert len(malformed.excerpt) <= 64
    assert malformed.excerpt.isprintable()


@pytest.mark.timeout(10)
@pytest.mark.parametrize("repeated", [b" [", b" [x", b'"'])
def test_hostile_line_is_refused_without_backtracking(repeated: bytes) -> None:
    """It took 18 seconds with backtracking."""
    line = b"1.1.1.1 - " + repeated * (MAX_LINE_BYTES // len(repeated) - 10)
    (found,) = read_access_log(io.BytesIO(line))
    assert isinstance(found, MalformedLine)
