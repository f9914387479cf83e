"""The application of the pages about its own table: its database, its table, and the role for the worker."""

from __future__ import annotations

from dataclasses import dataclass

import asyncpg

from tests.howto.pages import Snippet, snippets

TABLE: Snippet = snippets("use-your-own-table")["table.sql"]
ROLE: Snippet = snippets("use-your-own-table")["role.sql"]


@dataclass(frozen=True, slots=True)
class Application:
    """`sql` is a connection of the table's owner; `worker_url` is the DATABASE_URL of the worker."""

    sql: asyncpg.Connection
    worker_url: str

    async def upload(self, vod_id: str, views: int = 0) -> None:
        await self.sql.execute('INSERT INTO "Vod" VALUES ($1, $1, $2)', vod_id, views)

    async def columns(self) -> dict[str, int]:
        return {row["id"]: row["viewCount"] for row in await self.sql.fetch('SELECT * FROM "Vod"')}
