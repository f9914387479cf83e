"""The names of the application's own table and its columns, from `VIEW_TARGET_*`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from worker.db.quoting import quote_identifier

_PART = r'"(?:[^"]|"")+"|[^".]+'
_NAME = re.compile(rf"(?:(?P<schema>{_PART})\.)?(?P<table>{_PART})")


@dataclass(frozen=True, slots=True)
class TargetNames:
    """Names without quotes, as in Postgres's catalog. Without a `schema`, the search path decides."""

    schema: str | None
    table: str
    key: str
    column: str

    def __str__(self) -> str:
        return self.table if self.schema is None else f"{self.schema}.{self.table}"

    @property
    def regclass(self) -> str:
        """The table's quoted name, as `to_regclass` reads it."""
        parts = [self.table] if self.schema is None else [self.schema, self.table]
        return ".".join(map(quote_identifier, parts))


def parse_target(table: str, key: str, column: str) -> TargetNames:
    """Parse `Vod`, `app.Vod` or `"odd.name"` (quotes keep a dot in a name).

    Raises ValueError saying what is expected.
    """
    match = _NAME.fullmatch(table)
    if match is None:
        raise ValueError("the exact name of a table, such as Vod or app.Vod")
    return TargetNames(_bare(match["schema"]), str(_bare(match["table"])), key, column)


def _bare(name: str | None) -> str | None:
    return name[1:-1].replace('""', '"') if name and name.startswith('"') else name
