"""Entries of a stream: the document in them, and the letter for an entry without one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Item, Letter, Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent
from worker.pipelines.sources.stream.entries import (
    KEPT_BYTES,
    MAX_ENTRY_BYTES,
    find_document,
    parse_entries,
    read_entries,
)

ID = EntryId(1_764_237_600_000, 3)
ORIGIN = "requests/1764237600000-3"
DOCUMENT = b'{"time":"2025-11-27T10:00:00Z","path":"/a"}'


def read(*fields: bytes, field: bytes = b"data") -> Item[ChunkEvent] | Letter:
    """The only item or letter of one entry."""
    items, letters = read_entries([(ID, list(fields))], CHUNK_REQUESTS, field, Window(60, 60), "requests")
    (found,) = items or letters
    return found


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ([b"data", DOCUMENT], b"data"),
        ([b"bar", DOCUMENT], b"bar"),
        ([b"bar", DOCUMENT], b"data"),
        ([b"", DOCUMENT], b"data"),
        ([b"a", b"1", b"data", DOCUMENT, b"b", b"2"], b"data"),
        ([b"data", b"1", b"bar", DOCUMENT], b"bar"),
        ([b"a", b"1", b"a", b"2", b"data", DOCUMENT], b"data"),
        ([b"data", b"data", b"b\xff", DOCUMENT], b"b\xff"),
    ],
    ids=["default", "renamed", "single other", "empty name", "among others", "not the other", "others twice", "binary"],
)
def test_document_is_found(fields: list[bytes], name: bytes) -> None:
    assert find_document(fields, name) == DOCUMENT
    item = read(*fields, field=name)
    assert isinstance(item, Item)
    assert (f"requests/{item.key}", item.payload, item.record.path) == (ORIGIN, DOCUMENT, "/a")


@pytest.mark.parametrize(
    ("fields", "letter"),
    [
        (
            [b"a", b"1", b"b", b"2"],
            Letter(ORIGIN, "missing_field", "the entry has no field `data`, and several others", b"a: 1\nb: 2"),
        ),
        (
            [b"data", b"1", b"data", b"2"],
            Letter(ORIGIN, "repeated_field", "the entry has the field `data` more than once", b"data: 1\ndata: 2"),
        ),
        (
            [b"data", DOCUMENT, b"a", b"\xff\x00", b"data", DOCUMENT],
            Letter(
                ORIGIN,
                "repeated_field",
                "the entry has the field `data` more than once",
                b"data: " + DOCUMENT + b"\na: \xff\x00\ndata: " + DOCUMENT,
            ),
        ),
        ([b"data", b"\xff\x00\xfe"], Letter(ORIGIN, "not_utf8", "the document is not UTF-8", b"\xff\x00\xfe")),
        ([b"data", b""], Letter(ORIGIN, "not_json", "the document is not JSON", b"")),
        ([b"other", b"x"], Letter(ORIGIN, "not_json", "the document is not JSON", b"x")),
    ],
    ids=["missing", "repeated", "repeated, binary", "binary junk", "empty", "single other"],
)
def test_entry_without_a_valid_document_becomes_a_letter_with_its_bytes(fields: list[bytes], letter: Letter) -> None:
    assert read(*fields) == letter


def test_binary_name_of_a_field_is_shown_escaped() -> None:
    with pytest.raises(InvalidRecord, match=r"no field `d\\xff`"):
        find_document([b"a", b"1", b"b", b"2"], b"d\xff")


def test_entry_of_1_mib_is_read_and_a_larger_one_keeps_its_first_64_kib() -> None:
    largest = DOCUMENT.ljust(MAX_ENTRY_BYTES - len(b"data"))
    assert isinstance(read(b"data", largest), Item)
    large = largest + b" "
    error = "the entry has 1048577 bytes; 1 MiB is the limit"
    assert read(b"data", large) == Letter(ORIGIN, "too_large", error, large[: 64 * 1024])


@pytest.mark.parametrize("fields", [[b"a" * MAX_ENTRY_BYTES, b"1"], [b"a", b"x" * MAX_ENTRY_BYTES, b"data", DOCUMENT]])
def test_names_and_other_fields_count_for_the_size(fields: list[bytes]) -> None:
    letter = read(*fields)
    assert isinstance(letter, Letter)
    assert letter.error_class == "too_large"
    assert len(letter.payload) <= KEPT_BYTES


def test_letter_of_a_document_that_is_not_valid_keeps_all_of_it() -> None:
    document = b"x" * (MAX_ENTRY_BYTES - 4)
    letter = read(b"data", document)
    assert isinstance(letter, Letter)
    assert letter.payload == document


def test_neighbours_of_a_bad_entry_are_records_in_their_order() -> None:
    ids = [EntryId(ID.ms, number) for number in range(5)]
    documents = [DOCUMENT, b"junk", DOCUMENT, b"", DOCUMENT]
    entries = [(entry_id, [b"data", document]) for entry_id, document in zip(ids, documents, strict=True)]
    items, letters = read_entries(entries, CHUNK_REQUESTS, b"data", Window(60, 60), "s")
    assert [f"s/{item.key}" for item in items] == [f"s/{ID.ms}-0", f"s/{ID.ms}-2", f"s/{ID.ms}-4"]
    assert [letter.origin for letter in letters] == [f"s/{ID.ms}-1", f"s/{ID.ms}-3"]


def test_time_is_checked_against_the_arrival_of_the_entry() -> None:
    document = json.dumps({"time": ID.ms + 60_001, "path": "/a"}).encode()
    letter = read(b"data", document)
    assert isinstance(letter, Letter)
    assert letter.error_class == "time_out_of_range"


junk = st.one_of(st.binary(max_size=40), st.sampled_from([b"data", DOCUMENT]))


@given(st.lists(st.tuples(junk, junk), min_size=1, max_size=4), junk)
def test_every_entry_becomes_an_item_or_a_letter(pairs: list[tuple[bytes, bytes]], name: bytes) -> None:
    found = read(*(part for pair in pairs for part in pair), field=name)
    origin = found.origin if isinstance(found, Letter) else f"requests/{found.key}"
    assert origin == ORIGIN
    assert isinstance(found, Letter) or found.payload == DOCUMENT


def test_reply_is_parsed() -> None:
    assert parse_entries([[b"1-0", [b"data", b"{}"]], [b"1-18446744073709551615", [b"a", b"1", b"b", b"2"]]]) == [
        (EntryId(1, 0), [b"data", b"{}"]),
        (EntryId(1, 2**64 - 1), [b"a", b"1", b"b", b"2"]),
    ]
