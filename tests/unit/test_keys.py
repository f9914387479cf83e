"""Key names and counter values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.ids import InvalidId
from worker.contract.keys import MAX_COUNTER, Keys, parse_count

KEYS = Keys(b"vod:views:")


def test_marker_key_is_derived_from_the_prefix() -> None:
    assert KEYS.marker == b"viewer-worker:settled:vod:views:"
    assert not KEYS.marker.startswith(KEYS.prefix)


def test_prefixes_are_nested_where_one_begins_with_the_other() -> None:
    for other, nested in ((b"vod:", True), (b"vod:views:eu:", True), (b"vod:views:", False), (b"vod:likes:", False)):
        assert KEYS.nested_prefix(Keys(other).marker) == (other if nested else None)


@given(st.text(min_size=1).filter(lambda text: "\x00" not in text and len(text.encode()) <= 256))
def test_every_valid_id_survives_the_conversion_to_a_key_and_back(vod_id: str) -> None:
    assert KEYS.vod_id(KEYS.counter(vod_id)) == vod_id


@pytest.mark.parametrize("raw", [b"", b"\x00", b"a\x00b", b"\xff", b"\xed\xa0\x80", b"x" * 257])
def test_ids_that_postgres_cannot_hold_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidId):
        KEYS.vod_id(KEYS.prefix + raw)


@given(st.integers(0, MAX_COUNTER))
def test_counts_are_read_as_redis_writes_them(count: int) -> None:
    assert parse_count(str(count).encode()) == count


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"abc",
        b"12.5",
        b"+5",
        b" 12",
        b"12 ",
        b"12\n",
        b"-1",
        b"007",
        b"00",
        b"1e3",
        b"\xd9\xa1",
        b"9223372036854775808",
    ],
)
def test_values_that_are_not_counts_are_refused(value: bytes) -> None:
    assert parse_count(value) is None
