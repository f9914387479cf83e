"""What the monitors ask of the two servers."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from worker.db.errors import database_errors
from worker.db.schema import read_schema, upgrade
from worker.errors import SchemaNotCurrent, TargetUnusable, Unavailable, cause_of
from worker.observability.logs import get_logger
from worker.observability.status import POSTGRES, SCHEMA

if TYPE_CHECKING:
    from worker.db.schema import SchemaState
    from worker.db.session import Database
    from worker.db.target.table import TargetTable
    from worker.observability.status import Status
    from worker.redis.client import RedisClient

log = get_logger(__name__)

PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RedisProbe:
    redis: RedisClient

    async def __call__(self) -> None:
        await self.redis.check(PROBE_TIMEOUT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresProbe:
    """Also sets the check `schema`, and with `migrate` upgrades a schema that is missing or old.

    `target`, the application's own table, is part of what must fit.
    """

    database: Database
    status: Status
    target: TargetTable | None
    migrate: bool

    async def __call__(self) -> None:
        schema, unusable = await self._look()
        if self.migrate and schema.is_behind:
            if not await self._migrate(schema):
                return
            schema = replace(schema, current=schema.head)
        try:
            schema.require_current()
            if unusable is not None:
                raise unusable
        except (SchemaNotCurrent, TargetUnusable) as error:
            self.status.failing(SCHEMA, str(error), error.remedy)
        else:
            self.status.ok(SCHEMA, revision=schema.head)

    async def _look(self) -> tuple[SchemaState, TargetUnusable | None]:
        with database_errors():
            async with asyncio.timeout(PROBE_TIMEOUT_S), self.database.transaction() as tx:
                schema = await read_schema(tx)
                if self.target is not None:
                    try:
                        await self.target.check(tx)
                    except TargetUnusable as error:
                        return schema, error
        return schema, None

    async def _migrate(self, schema: SchemaState) -> bool:
        """True when the schema is current afterwards; else the check `schema` says why not."""
        log.info("migrating", found=schema.current, to=schema.head)
        self.status.expect_beat(POSTGRES, within=math.inf)  # as long as it takes
        try:
            await upgrade(self.database)
        except Unavailable:
            raise
        except Exception as error:
            self.status.failing(
                SCHEMA, f"migration failed: {cause_of(error)}", "Run: viewer-worker migrate, as its owner."
            )
            return False
        return True
