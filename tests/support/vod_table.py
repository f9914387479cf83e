"""The application's own table in the tests, as Prisma creates it for a model with an integer column."""

from __future__ import annotations

from typing import Any

from tests.support.world import InProcessWorker, World

PRISMA = """
    CREATE TABLE "Vod" (
        id text PRIMARY KEY,
        title text NOT NULL DEFAULT 'untitled',
        "viewCount" integer NOT NULL DEFAULT 0
    )
"""
SETTINGS = {"VIEW_TARGET_TABLE": "Vod", "VIEW_TARGET_KEY": "id", "VIEW_TARGET_COLUMN": "viewCount"}


async def create(world: World, ddl: str = PRISMA, ids: str = "a,b,c") -> None:
    await world.sql.execute(ddl)
    for vod_id in ids.split(","):
        await world.sql.execute('INSERT INTO "Vod" (id) VALUES ($1)', vod_id)


async def shown(world: World) -> dict[Any, int]:
    return {row["id"]: row["viewCount"] for row in await world.sql.fetch('SELECT id, "viewCount" FROM "Vod"')}


def skipped(worker: InProcessWorker) -> dict[str, float]:
    reasons = ("unknown", "not_a_key", "refused")
    found = {reason: worker.metric("view_count_target_skipped_total", reason=reason) for reason in reasons}
    return {reason: views for reason, views in found.items() if views}
