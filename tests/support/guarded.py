"""Redis and Postgres as a careful operator runs them: TLS, passwords, and only the rights in deploy/ for the worker."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from shutil import copytree, ignore_patterns
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis

from tests.support.tls import Certificates, TlsFront
from tests.support.world import World, database_url_for
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import PostgresServer, Server, ValkeyServer

DEPLOY = Path(__file__).parents[2] / "deploy"
# The first line lets the tests connect as administrators.
HBA = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"

on_open_and_guarded_servers = pytest.mark.parametrize("world", ["open", "guarded"], indirect=True)
# For slow tests. They run on open servers only if TEST_DATABASE_URL names those: the guarded ones are always embedded.
on_guarded_servers = (
    on_open_and_guarded_servers
    if "TEST_DATABASE_URL" in os.environ
    else pytest.mark.parametrize("world", ["guarded"], indirect=True)
)


class GuardedServers:
    """Valkey with deploy/redis/users.acl and Postgres with deploy/postgres/role.sql, each behind TLS.

    They start when the first world is requested.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._resources = ExitStack()
        self._template: str | None = None
        self.authority = folder / "authority.pem"

    @asynccontextmanager
    async def world(self, database: int = 0) -> AsyncIterator[World]:
        """A world. The tests connect as administrators, the workers as limited users over verified TLS."""
        if self._template is None:
            await self._start()
        name = f"vw_{uuid4().hex[:12]}"
        await self.administrate(f"CREATE DATABASE {name} TEMPLATE {self._template}")
        world = World(
            f"{self._admin_redis_url}/{database}",
            database_url_for(self.postgres.url, name),
            prefix="vod:views:",
            REDIS_URL=f"{self._limited_redis_url}/{database}?ssl_ca_certs={self.authority}",
            DATABASE_URL=f"{self._limited_postgres_url}/{name}?sslmode=verify-full&sslrootcert={self.authority}",
        )
        try:
            async with world:
                yield world
        finally:
            await self._clean_up(name)

    async def _clean_up(self, name: str) -> None:
        """Drop this world's database, and restore the users' rights for the next world."""
        async with aioredis.from_url(f"{self._admin_redis_url}/0") as redis:
            await redis.execute_command("ACL LOAD")
            await redis.execute_command("ACL LOG RESET")
        await self.administrate(f"DROP DATABASE {name} WITH (FORCE)")

    async def administrate(self, statement: str, database_url: str | None = None) -> None:
        connection = await asyncpg.connect(database_url or self.postgres.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def close(self) -> None:
        self._resources.close()

    async def _start(self) -> None:
        copytree(DEPLOY, self._folder, dirs_exist_ok=True, ignore=ignore_patterns("secrets"))
        await asyncio.to_thread(subprocess.run, [self._folder / "make-secrets"], check=True)
        hba = self._folder / "pg_hba.conf"
        hba.write_text(HBA)
        users = self._folder / "secrets" / "redis_users.acl"
        self.valkey = ValkeyServer(self._folder / "valkey", options=("--aclfile", str(users)))
        self.postgres = PostgresServer(self._folder / "postgresql", options=("fsync=off", f"hba_file={hba}"))
        certificates = Certificates()
        certificates.authority.cert_pem.write_to_path(str(self.authority))
        redis_port = self._start_behind_tls(self.valkey, certificates)
        postgres_port = self._start_behind_tls(self.postgres, certificates, postgres=True)
        redis_password, password = self._password("redis_viewer_worker"), self._password("postgres_viewer_worker")
        self._admin_redis_url = f"redis://admin:{self._password('redis_admin')}@127.0.0.1:{self.valkey.port}"
        self._limited_redis_url = f"rediss://viewer-worker:{redis_password}@127.0.0.1:{redis_port}"
        application_password = self._password("redis_application")
        self.application_redis_url = f"rediss://application:{application_password}@127.0.0.1:{redis_port}"
        self._limited_postgres_url = f"postgresql://viewer_worker:{password}@127.0.0.1:{postgres_port}"
        self._template = await self._prepare(password)

    def _start_behind_tls(self, server: Server, certificates: Certificates, *, postgres: bool = False) -> int:
        server.start()
        self._resources.callback(server.kill)
        front = TlsFront(certificates, server.port, postgres=postgres)
        self._resources.callback(front.close)
        return front.port

    async def _prepare(self, password: str) -> str:
        """Create and migrate a database as its owner, and create the limited role. Returns the name of the database."""
        name = "vw_guarded"
        await self.administrate(f"CREATE DATABASE {name}")
        url = database_url_for(self.postgres.url, name)
        owner = Database(parse_database_url(url))
        await schema.upgrade(owner)
        await owner.close()
        await self.administrate((DEPLOY / "postgres" / "role.sql").read_text(), url)
        await self.administrate(f"ALTER ROLE viewer_worker PASSWORD '{password}'")
        return name

    def _password(self, name: str) -> str:
        return (self._folder / "secrets" / f"{name}_password").read_text()
