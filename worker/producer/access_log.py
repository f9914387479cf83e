"""Reads access logs in the *combined* format of Apache and nginx, line by line in constant memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import BinaryIO

MAX_LINE_BYTES = 65_536
EXCERPT_LENGTH = 64

_QUOTED = r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
# Anything after the last field, such as nginx's $http_x_forwarded_for, is ignored.
_FIELDS = {
    "address": r"(\S+)",
    # Bounded in length, to limit backtracking on a line that could match in many ways.
    "identity or user": r" \S{1,1024} .{1,1024}?(?= \[)",
    "time": r" \[([^\[\]]{1,64})\]",
    "request": " " + _QUOTED,
    "status": r" (\d{3})",
    "size": r" (?:\d+|-)",
    "referer": " " + _QUOTED,
    "user agent": " " + _QUOTED + "(?: |$)",
}
_LINE = re.compile("".join(_FIELDS.values()), re.ASCII)
_TIME = re.compile(r"(\d\d)/(\w{3})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)", re.ASCII)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_REQUEST = re.compile(r"(\S+) (\S.*?)(?: HTTP/\d[\d.]*)?")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")


@dataclass(frozen=True, slots=True)
class Request:
    """One line. `path` is as in the log, without the query. A `-` becomes None. `ip` may be a host name."""

    time: datetime
    ip: str | None
    method: str
    path: str
    status: int
    referer: str | None
    user_agent: str | None


@dataclass(frozen=True, slots=True)
class MalformedLine:
    """`number` counts from 1; `excerpt` is the line's beginning, escaped, at most 64 characters."""

    number: int
    reason: str
    excerpt: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}: {self.excerpt}"


def read_access_log(stream: BinaryIO, first_line: int = 1) -> Iterator[Request | MalformedLine]:
    """Yield one item for each line from `first_line` on, in order. Bytes that are not UTF-8 become `\\xhh`.

    Raises OSError when the stream does.
    """
    for number, line in enumerate(_lines(stream), start=1):
        if number >= first_line:
            try:
                yield parse_line(line)
            except ValueError as error:
                yield MalformedLine(number, str(error), _excerpt(line))


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the lines without their line ends. A line that is too long is cut to one byte more than the limit."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
        yield line.rstrip(b"\r\n")


def parse_line(line: bytes) -> Request:
    """Parse one line. Raises ValueError saying what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    if b"\x00" in line:
        raise ValueError("it has a NUL byte")
    text = line.decode(errors="backslashreplace")
    match = _LINE.match(text)
    if match is None:
        raise ValueError(_first_that_is_missing(text))
    ip, time, request, status, referer, user_agent = match.groups()
    method, path = _parse_request(request)
    return Request(_parse_time(time), _or_none(ip), method, path, int(status), _or_none(referer), _or_none(user_agent))


def _first_that_is_missing(text: str) -> str:
    position = 0
    for name, pattern in _FIELDS.items():
        match = re.compile(pattern, re.ASCII).match(text, position)
        if match is None:
            return f"the {name} is missing or not complete"
        position = match.end()
    raise AssertionError("unreachable")


def _parse_time(text: str) -> datetime:
    match = _TIME.fullmatch(text)
    if match is None or match[2] not in _MONTHS:
        raise ValueError("the time is not like 17/May/2015:10:05:03 +0000")
    day, month, year, hour, minute, second, sign, hours, minutes = match.groups()
    offset = timedelta(hours=int(hours), minutes=int(minutes))
    zone = timezone(-offset if sign == "-" else offset)
    return datetime(int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=zone)


def _parse_request(text: str) -> tuple[str, str]:
    match = _REQUEST.fullmatch(text)
    if match is None:
        raise ValueError("the request has no path")
    target = match[2]
    origin = _ORIGIN.match(target)
    if origin is not None:
        target = target[origin.end() :]
    return match[1], target.partition("?")[0] or "/"


def _or_none(field: str) -> str | None:
    return None if field == "-" else re.sub(r'\\(["\\])', r"\1", field)


def _excerpt(line: bytes) -> str:
    text = line[:EXCERPT_LENGTH].decode(errors="backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)[
        :EXCERPT_LENGTH
    ]
