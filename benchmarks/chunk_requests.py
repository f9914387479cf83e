"""What the benchmarks of chunk requests share: the statements of the contenders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker.db.packed_text import pack

AGENT = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_1) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/32.0.1700.77"
# As one writes it first, a row at a time.
INSERT = "INSERT INTO naive VALUES ($1, $2, $3::text::inet, $4, $5, $6, $7, $8)"
# Our own statement.
PARTS = [f"unnest(CASE WHEN ${n} = '' THEN ARRAY[''] ELSE string_to_array(${n}, $9, $10) END)" for n in range(2, 9)]
PARTS[1] += "::inet"
BARE = f"INSERT INTO naive SELECT unnest($1::timestamptz[]), {', '.join(PARTS)}"


def bare_parameters(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    times, *texts = zip(*rows, strict=True)
    packed = pack(texts)
    return [times, *packed.texts, packed.separator, packed.null]
