"""Splits the credentials off a URL before its other parts are parsed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

# The password runs to the last @ before the host, so that a password pasted without encoding (@ : / % #) works.
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+]*)://"
    r"(?:(?P<user>[^:@/]*)(?::(?P<password>.*))?@)?"
    r"(?P<rest>[^@]*)",
    re.DOTALL,
)
MASK = "***"


@dataclass(frozen=True, slots=True)
class SplitUrl:
    """`rest` is everything after the credentials: host, path, query. The password never shows in the repr."""

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    rest: str


def split_url(url: str) -> SplitUrl:
    """Split `scheme://user:password@rest`. Raises ValueError, without the URL in its text, if it is not a URL."""
    match = _URL.fullmatch(url.strip())
    if match is None:
        raise ValueError("not a URL")
    user, password = match["user"], match["password"]
    return SplitUrl(
        match["scheme"],
        unquote(user) if user else None,
        unquote(password) if password else None,
        match["rest"],
    )


def mask_url(url: str) -> str:
    """The URL, safe to print: without its password. A text that is not a URL is masked as a whole."""
    try:
        parts = split_url(url)
    except ValueError:
        return MASK
    secret_query = re.sub(r"(?i)((?:^|[?&])[^=&]*pass[^=&]*=)[^&]*", rf"\g<1>{MASK}", parts.rest)
    # In a Redis URL a user without a password is useless: it is most likely a password without its colon.
    lone_secret = parts.user and not parts.password and parts.scheme.startswith("redis")
    user = MASK if lone_secret else parts.user or ""
    credentials = user + (f":{MASK}" if parts.password else "")
    return f"{parts.scheme}://{credentials}{'@' if credentials else ''}{secret_query}"
