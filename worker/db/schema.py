"""Reads and migrates the schema's revision, and checks it against the one that this version needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text

from worker.db.errors import database_errors
from worker.db.rights import missing_rights
from worker.errors import SchemaNotCurrent

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy.ext.asyncio import AsyncConnection

    from worker.db.session import Database

# Not Alembic's default name: the application's own migrations may live in the same database.
VERSION_TABLE = "viewer_worker_schema"
GRANT = "Run deploy/postgres/role.sql as the owner of the tables."
_VERSIONS = text(
    "SELECT CAST(current_setting('server_version_num') AS int), current_setting('server_version'), "
    "(SELECT extversion FROM pg_extension WHERE extname = 'timescaledb')"
)
_MIGRATION_LOCK = 0x7669657765722D77  # "viewer-w"; any constant that no other program uses


def migrations_folder() -> Path:
    """The folder of the migrations: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "alembic"
    return packaged if packaged.is_dir() else package.parent / "alembic"


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


@cache
def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


@dataclass(frozen=True, slots=True)
class SchemaState:
    """`current` is the database's revision (None: no tables), `head` the one this version needs.

    `lacking` are the rights on the tables that this session's role needs and does not have.
    """

    current: str | None
    head: str
    known: tuple[str, ...]
    lacking: tuple[str, ...] = ()

    @property
    def is_current(self) -> bool:
        return self.current == self.head

    @property
    def is_behind(self) -> bool:
        """True when the tables are missing or older, so that `upgrade` is needed."""
        return not self.is_current and not self.lacking and (self.current is None or self.current in self.known)

    def require_current(self) -> None:
        """Raise SchemaNotCurrent, with the fix, unless the schema is current and usable."""
        if self.lacking:
            raise SchemaNotCurrent(f"this role lacks {', '.join(self.lacking)}", GRANT)
        if self.is_current:
            return
        if self.current is None:
            raise SchemaNotCurrent("the database has no viewer-worker tables", "Run: viewer-worker migrate")
        if self.is_behind:
            raise SchemaNotCurrent(
                f"the schema is at revision {self.current}, this version needs {self.head}",
                "Run: viewer-worker migrate",
            )
        raise SchemaNotCurrent(
            f"the schema is at revision {self.current}, which this version does not know (it needs {self.head})",
            "Run the version of viewer-worker that migrated this database, or a newer one.",
        )


async def read_schema(connection: AsyncConnection) -> SchemaState:
    """The schema's revision and, if it is current, the rights that this session's role lacks."""
    known = tuple(script.revision for script in _scripts().walk_revisions())
    readable = text("SELECT has_table_privilege(to_regclass(:name), 'SELECT')")
    found: bool | None = (await connection.execute(readable, {"name": VERSION_TABLE})).scalar()
    if found is None:
        return SchemaState(None, known[0], known)
    if not found:
        return SchemaState(None, known[0], known, lacking=(f"SELECT on {VERSION_TABLE}",))
    current = (await connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}"))).scalar()  # noqa: S608
    lacking = await missing_rights(connection) if current == known[0] else ()
    return SchemaState(current, known[0], known, lacking)


async def read_versions(connection: AsyncConnection) -> tuple[int, str, str | None]:
    """Postgres's version as a number (180006) and as text, and TimescaleDB's version or None."""
    number, shown, timescale = (await connection.execute(_VERSIONS)).one()
    return number, shown, timescale


async def upgrade(database: Database, revision: str = "head") -> None:
    """Upgrade the schema to `revision`. Concurrent calls wait for each other. Raises DatabaseUnavailable."""
    from alembic import command

    await _run(database, lambda config: command.upgrade(config, revision))


async def downgrade(database: Database, revision: str) -> None:
    """Downgrade the schema to `revision` (`base` drops all tables). Raises DatabaseUnavailable."""
    from alembic import command

    await _run(database, lambda config: command.downgrade(config, revision))


async def _run(database: Database, migrate: Any) -> None:
    def on_connection(connection: Connection) -> None:
        config = _config()
        config.attributes["connection"] = connection
        migrate(config)

    unlimited = database.without_time_limit()
    try:
        with database_errors():
            async with unlimited.engine.connect() as connection:
                await connection.run_sync(on_connection)
                await connection.commit()
    finally:
        await unlimited.close()


def lock_migrations(connection: Connection) -> None:
    """Take a lock until the transaction ends, so that replicas that migrate at start do it one after the other."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
