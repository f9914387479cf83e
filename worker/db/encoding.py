"""Which texts a database can store, by its encoding."""

from __future__ import annotations

# Postgres's name → Python's codec with exactly the same characters; a test compares them. UTF8 has all characters. Of
# the other encodings (EUC_JP, EUC_KR, …) the two differ in some, so only Postgres can tell.
CODECS = {
    **{f"LATIN{number}": f"iso8859-{number}" for number in (1, 2, 3, 4)},
    "LATIN5": "iso8859-9",
    "LATIN6": "iso8859-10",
    "LATIN7": "iso8859-13",
    "LATIN8": "iso8859-14",
    "LATIN9": "iso8859-15",
    "LATIN10": "iso8859-16",
    **{f"ISO_8859_{number}": f"iso8859-{number}" for number in (5, 6, 7, 8)},
    **{f"WIN{number}": f"cp{number}" for number in (866, 874, *range(1250, 1259))},
    "KOI8R": "koi8-r",
    "KOI8U": "koi8-u",
    "EUC_CN": "gb2312",
}


def can_encode(text: str, encoding: str | None) -> bool:
    """False when this encoding of Postgres certainly lacks a character of the text."""
    codec = None if text.isascii() or encoding is None else CODECS.get(encoding)
    if codec is None:
        return True
    try:
        text.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
