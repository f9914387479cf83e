"""Splits the credentials off a URL before its other parts are parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+]*)://(?P<rest>.*)", re.DOTALL)
# The password runs to the last @ before the host, so that a password pasted without encoding (@ : / % #) works.
_CREDENTIALS = re.compile(r"(?:(?P<user>[^:@/]*)(?::(?P<password>.*))?@)?(?P<place>[^@]*)", re.DOTALL)
_HOST = r"(?:\[[^\]]*\]|[^:/@,]*)(?::\d*)?"
_PLACE_WITH_PATH = re.compile(rf"{_HOST}(?:,{_HOST})*/[^@]*")
_PARAMETER = re.compile(r"\w[\w.-]*=")
_SECRET_PARAMETER = re.compile(r"(?i)((?:^|&)[^=&]*(?:pass|secret)[^=&]*=)[^&]*")
QUOTES = "\"'"
MASK = "***"


@dataclass(frozen=True, slots=True)
class SplitUrl:
    """`place` is host and path as they are written, `query` what follows the `?`. No repr shows a secret."""

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    place: str = field(repr=False)
    query: str = field(repr=False)


def without_quotes(text: str) -> str:
    """The text without white space, a byte order mark and a pair of quotes around it: editors and shells leave them."""
    text = text.strip().lstrip("\ufeff").strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES
    return text[1:-1] if quoted else text


def split_url(url: str) -> SplitUrl:
    """Split `scheme://user:password@place?query`.

    Raises ValueError, without the URL in its text, if it is not a URL.
    """
    match = _URL.fullmatch(without_quotes(url))
    if match is None:
        raise ValueError("not a URL")
    rest = match["rest"]
    start = _query_start(rest)
    parts = _CREDENTIALS.fullmatch(rest[:start])
    if parts is None:
        raise ValueError("not a URL")
    user, password = parts["user"], parts["password"]
    return SplitUrl(
        match["scheme"],
        unquote(user) if user else None,
        unquote(password) if password else None,
        parts["place"],
        rest[start + 1 :],
    )


def split_query(query: str) -> list[tuple[str, str]]:
    """Name and value of each parameter, decoded. As in libpq, a plus sign stays one."""
    pairs = (parameter.partition("=") for parameter in query.split("&") if parameter)
    return [(unquote(name), unquote(value)) for name, _, value in pairs]


def mask_url(url: str) -> str:
    """The URL, safe to print: without its password. A text that is not a URL is masked as a whole."""
    try:
        parts = split_url(url)
    except ValueError:
        return MASK
    if "@" in parts.query:  # it may be the rest of a password that was not encoded
        return f"{parts.scheme}://{MASK}"
    query = _SECRET_PARAMETER.sub(rf"\g<1>{MASK}", parts.query)
    # In a Redis URL a user without a password is useless: it is most likely a password without its colon.
    lone_secret = parts.user and not parts.password and parts.scheme.startswith("redis")
    user = MASK if lone_secret else parts.user or ""
    credentials = user + (f":{MASK}" if parts.password else "")
    return f"{parts.scheme}://{credentials}{'@' if credentials else ''}{parts.place}" + (f"?{query}" if query else "")


def _query_start(rest: str) -> int:
    """Where the `?` of the query is, or the length of the text.

    A `?` before an `@` belongs to the password, unless a place with a path is in front of it and a parameter follows.
    """
    for match in re.finditer(r"\?", rest):
        start = match.start()
        place = rest[:start].rpartition("@")[2]
        if "@" not in rest[start:]:
            return start
        if _PLACE_WITH_PATH.fullmatch(place) and _PARAMETER.match(rest, start + 1):
            return start
    return len(rest)
