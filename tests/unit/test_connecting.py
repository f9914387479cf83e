"""Connecting to one of several hosts of a Postgres, with TLS or without."""

from __future__ import annotations

import ssl
from typing import Any

import asyncpg
import pytest

from worker.db import connecting
from worker.db.address import parse_database_url


class Server:
    """Answers each attempt with the next of `answers`, an error or a connection; notes how it was asked."""

    def __init__(self, *answers: Any) -> None:
        self._answers = list(answers)
        self.encrypted: list[bool] = []
        self.hosts: list[str | None] = []

    async def connect(self, **options: Any) -> Any:
        self.encrypted.append(isinstance(options["ssl"], ssl.SSLContext))
        self.hosts.append(options["host"])
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


async def connect(server: Server, monkeypatch: pytest.MonkeyPatch, rest: str) -> Any:
    monkeypatch.setattr(asyncpg, "connect", server.connect)
    return await connecting.connect(parse_database_url(f"postgresql://u:p@{rest}"), 5.0)


NO_TLS = ConnectionError("PostgreSQL server rejected SSL upgrade")
NOT_THIS_WAY = asyncpg.InvalidAuthorizationSpecificationError("no pg_hba.conf entry")


@pytest.mark.parametrize(
    ("mode", "refusal", "encrypted"),
    [
        ("prefer", NO_TLS, [True, False]),
        ("prefer", ssl.SSLError("handshake"), [True, False]),
        ("prefer", NOT_THIS_WAY, [True, False]),
        ("allow", NOT_THIS_WAY, [False, True]),
    ],
)
async def test_modes_that_leave_tls_open_try_the_other_way(
    monkeypatch: pytest.MonkeyPatch, mode: str, refusal: Exception, encrypted: list[bool]
) -> None:
    server = Server(refusal, "connection")
    assert await connect(server, monkeypatch, f"h/db?sslmode={mode}") == "connection"
    assert server.encrypted == encrypted


@pytest.mark.parametrize("mode", ["require", "verify-full&sslrootcert=system"])
async def test_modes_that_demand_tls_never_do_without(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    server = Server(NO_TLS, "connection")
    with pytest.raises(ConnectionError):
        await connect(server, monkeypatch, f"h/db?sslmode={mode}")
    assert server.encrypted == [True]


async def test_wrong_password_is_sent_to_one_host_and_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(asyncpg.InvalidPasswordError("wrong"), "connection")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await connect(server, monkeypatch, "a,b/db")
    assert server.hosts == ["a"]


async def test_socket_is_never_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server("connection")
    await connect(server, monkeypatch, "%2Frun%2Fpg/db?sslmode=require")
    assert (server.hosts, server.encrypted) == (["/run/pg"], [False])


async def test_host_that_starts_or_is_a_standby_or_is_away_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = (
        asyncpg.CannotConnectNowError("starting up"),
        asyncpg.TargetServerAttributeNotMatched("standby"),
        TimeoutError(),
    )
    server = Server(*failures, "connection")
    assert await connect(server, monkeypatch, "a,b,c,d/db?sslmode=disable") == "connection"
    with pytest.raises(ConnectionError) as caught:
        await connect(Server(*failures), monkeypatch, "a,b,c/db?sslmode=disable")
    assert str(caught.value) == ("a:5432: starting up; b:5432: it does not accept writes; c:5432: no answer in time")


async def test_hosts_share_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    async def note(_address: object, _host: object, timeout: float, _options: object) -> None:
        limits.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(connecting, "_connect", note)
    with pytest.raises(ConnectionError):
        await connecting.connect(parse_database_url("postgresql://a,b/db"), 5.0)
    assert limits == [2.5, 2.5]
