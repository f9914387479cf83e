"""Takes the credentials out of a URL before anything else looks at it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

# The password runs to the last @ before the host, so that one which was pasted unencoded (with @ : / % #) still works.
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
    """Split `scheme://user:password@rest`. Raises ValueError (without the URL in its text) when it is no URL."""
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
    """The URL as it may be printed: no password, and nothing at all of what is not a URL."""
    try:
        parts = split_url(url)
    except ValueError:
        return MASK
    secret_query = re.sub(r"(?i)((?:^|[?&])[^=&]*pass[^=&]*=)[^&]*", rf"\g<1>{MASK}", parts.rest)
    # A password without its colon is a usual slip in a Redis URL, where a user alone is good for nothing.
    lone_secret = parts.user and not parts.password and parts.scheme.startswith("redis")
    user = MASK if lone_secret else parts.user or ""
    credentials = user + (f":{MASK}" if parts.password else "")
    return f"{parts.scheme}://{credentials}{'@' if credentials else ''}{secret_query}"
