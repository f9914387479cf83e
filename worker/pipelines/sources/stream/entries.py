"""Takes the document out of an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Item, Letter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.pipelines.model import RecordType, Window

MAX_ENTRY_BYTES = 1024 * 1024
KEPT_BYTES = 64 * 1024
TOO_LARGE = "too_large"

Entry = tuple[EntryId, "list[bytes]"]


def parse_entries(reply: Sequence[Any]) -> list[Entry]:
    """The reply to XRANGE: ids, and fields and values in turn."""
    return [(EntryId(int(ms), int(seq)), fields) for raw_id, fields in reply for ms, _, seq in [raw_id.partition(b"-")]]


def find_document(fields: list[bytes], name: bytes) -> bytes:
    """The value of the field `name`; without that field, the value of the only one. Raises InvalidRecord."""
    if len(fields) == 2:
        return fields[1]
    found = [fields[i + 1] for i in range(0, len(fields), 2) if fields[i] == name]
    if len(found) == 1:
        return found[0]
    shown = name.decode(errors="backslashreplace")
    if found:
        raise InvalidRecord("repeated_field", f"the entry has the field `{shown}` more than once")
    raise InvalidRecord("missing_field", f"the entry has no field `{shown}`, and several others")


def read_entries(
    entries: Sequence[Entry], record: RecordType[Any], field: bytes, window: Window, stream: str
) -> tuple[list[Item[Any]], list[Letter]]:
    """Valid records, and letters for the other entries; both in order."""
    items: list[Item[Any]] = []
    letters: list[Letter] = []
    parse = record.parse
    for entry_id, fields in entries:
        document, size = _joined(fields), sum(map(len, fields))
        try:
            if size > MAX_ENTRY_BYTES:
                raise InvalidRecord(TOO_LARGE, f"the entry has {size} bytes; 1 MiB is the limit")
            document = find_document(fields, field)
            items.append(Item(entry_id, document, parse(document, entry_id, window)))
        except InvalidRecord as error:
            kept = document if size <= MAX_ENTRY_BYTES else document[:KEPT_BYTES]
            letters.append(Letter(f"{stream}/{entry_id}", error.error_class, str(error), kept))
    return items, letters


def _joined(fields: list[bytes]) -> bytes:
    """An entry whose document is not known, as `field: value` lines; of a single field only its value."""
    if len(fields) == 2:
        return fields[1]
    return b"\n".join(fields[i] + b": " + fields[i + 1] for i in range(0, len(fields), 2))
