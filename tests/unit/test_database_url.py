"""DATABASE_URL as libpq, Prisma and other drivers write it: each parameter is honoured, mapped, ignored or refused."""

from __future__ import annotations

import re

import pytest

from worker.contract.urls import mask_url
from worker.db.address import DatabaseAddress, parse_database_url
from worker.db.parameters import HONOURED, IGNORED, MAPPED, REFUSED, SESSION


def parse(rest: str) -> DatabaseAddress:
    return parse_database_url(f"postgresql://u:p@{rest}")


def refusal(rest: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(rest)
    return str(caught.value)


@pytest.mark.parametrize("parameter", sorted(IGNORED))
def test_parameter_of_another_program_is_ignored_and_never_a_setting_of_the_session(parameter: str) -> None:
    address = parse(f"h/db?{parameter}=false&application_name=app")
    assert address.ignored == (parameter,)
    assert address.session == {"application_name": "app"}
    assert address.driver == {}


@pytest.mark.parametrize(
    ("query", "driver"),
    [
        ("ssl=true", {"sslmode": "require"}),
        ("ssl=0", {"sslmode": "disable"}),
        ("ssl=verify-full", {"sslmode": "verify-full"}),
        ("sslmode=no-verify&sslrootcert=/ca.pem", {"sslmode": "require"}),
        ("requiressl=1", {"sslmode": "require"}),
        ("sslrootcert=system", {"sslmode": "verify-full", "sslrootcert": "system"}),
        ("sslmode=require&sslaccept=strict", {"sslmode": "verify-full", "sslrootcert": "system"}),
        ("sslaccept=strict&sslcert=/ca.pem", {"sslmode": "verify-full", "sslrootcert": "/ca.pem"}),
        ("sslmode=require&sslaccept=accept_invalid_certs&sslcert=/ca.pem", {"sslmode": "require"}),
        ("sslmode=require&sslnegotiation=direct", {"sslmode": "require", "sslnegotiation": "direct"}),
        ("sslmode=require&sslrootcert=", {"sslmode": "require"}),
        ("sslmode=disable&sslmode=require", {"sslmode": "require"}),
        ("targetServerType=primary", {"target_session_attrs": "primary"}),
        ("passfile=/pgpass&krbsrvname=pg", {"passfile": "/pgpass", "krbsrvname": "pg"}),
    ],
)
def test_parameter_for_tls_and_log_in_has_libpqs_meaning(query: str, driver: dict[str, str]) -> None:
    assert parse(f"h/db?{query}").driver == driver


@pytest.mark.parametrize(
    ("query", "session"),
    [
        ("schema=My App", {"search_path": '"My App"'}),
        ("currentSchema=a,b", {"search_path": "a,b"}),
        ("schema_search_path=a", {"search_path": "a"}),
        ("options=-c%20geqo=off", {"options": "-c geqo=off"}),
        ("ApplicationName=app", {"application_name": "app"}),
    ],
)
def test_setting_that_is_asked_for_by_name_begins_the_session(query: str, session: dict[str, str]) -> None:
    assert parse(f"h/db?{query}").session == session


def test_schema_behind_a_pooler_is_marked_as_one_that_the_session_cannot_begin_with() -> None:
    assert parse("h/db?schema=app&pgbouncer=true&connection_limit=1").pooled
    assert not parse("h/db?schema=app&pgbouncer=false").pooled


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("surprise=1", "unknown parameter 'surprise'"),
        ("ssl_mode=require", "'ssl_mode'; did you mean sslmode?"),
        ("sslmode=yes", "sslmode must be one of disable"),
        ("ssl=perhaps", "ssl must be true or false"),
        ("pgbouncer=perhaps", "pgbouncer must be true or false"),
        ("sslaccept=lax", "sslaccept must be strict or"),
        ("sslrootcert=system&sslmode=require", "sslrootcert=system needs sslmode=verify-full"),
        ("sslnegotiation=direct", "sslnegotiation=direct needs"),
        ("ssl_min_protocol_version=SSLv3", "ssl_min_protocol_version must be one of TLSv1"),
        ("target_session_attrs=standby", "target_session_attrs must be one of any"),
        ("targetServerType=secondary", "targetServerType must be any or primary"),
        ("gssencmode=require", "gssencmode=require is not supported"),
        ("replication=database", "replication must be false"),
        ("hostaddr=10.0.0.1&sslmode=verify-full", "hostaddr does not go with sslmode=verify-full"),
        ("port=1,2", "the parameter port must have one port"),
        *((f"{name}=x", f"the parameter {name} is not supported: {REFUSED[name]}") for name in sorted(REFUSED)),
    ],
)
def test_parameter_that_cannot_be_honoured_is_refused_by_name(query: str, message: str) -> None:
    assert message in refusal(f"h/db?{query}")


def test_each_parameter_has_one_meaning() -> None:
    assert not HONOURED & IGNORED
    assert not set(REFUSED) & (HONOURED | IGNORED | set(MAPPED))
    assert set(SESSION) < HONOURED


@pytest.mark.parametrize(
    ("rest", "hosts"),
    [
        ("%2Fvar%2Frun%2Fpg/db", (("/var/run/pg", None),)),
        ("%2Fvar%2Frun%2Fpg:6000/db", (("/var/run/pg", 6000),)),
        ("/db?host=/cloudsql/project:region:instance", (("/cloudsql/project:region:instance", None),)),
        ("localhost:5433/db?host=/run/pg", (("/run/pg", 5433),)),
        ("[::1]/db", (("::1", None),)),
        ("[fe80::1%25eth0]:6000/db", (("fe80::1%eth0", 6000),)),
        ("h/db?host=::1&port=6000", (("::1", 6000),)),
        ("h/db?hostaddr=10.0.0.1", (("10.0.0.1", None),)),
        ("a:1,[::2]:2,c/db", (("a", 1), ("::2", 2), ("c", None))),
        ("a,b/db?port=6000", (("a", 6000), ("b", 6000))),
        ("/db?host=a,b&port=1,2", (("a", 1), ("b", 2))),
        ("/db?host=a:1,b:2", (("a", 1), ("b", 2))),
        (":6000/db", (("localhost", 6000),)),
        ("/db", ()),
    ],
)
def test_hosts_are_read_from_the_url_and_its_parameters(rest: str, hosts: tuple[tuple[str, int | None], ...]) -> None:
    assert parse(rest).hosts == hosts


@pytest.mark.parametrize("rest", ["a,,b/db", "[::1/db", "::1/db", "a:x/db", "a:0/db", "a:65536/db", "a:1:2/db"])
def test_host_that_cannot_be_read_is_refused(rest: str) -> None:
    assert "host" in refusal(rest) or "port" in refusal(rest)


def test_of_several_hosts_the_one_that_accepts_writes_is_meant_unless_the_url_says_otherwise() -> None:
    assert parse("a,b/db").driver == {"target_session_attrs": "read-write"}
    assert parse("a,b/db?target_session_attrs=any").driver == {"target_session_attrs": "any"}
    assert parse("a/db").driver == {}
    assert parse("a:1,[::2]/db").place == "a:1, [::2]:5432"


def test_parameter_wins_over_the_same_part_of_the_url() -> None:
    address = parse("h/db?user=me&password=a%26b+c&dbname=other")
    assert (address.user, address.password, address.name) == ("me", "a&b+c", "other")


@pytest.mark.parametrize(
    ("url", "password", "host", "options"),
    [
        ("postgresql://u:p@h/db?options=a@b", "p", "h", "a@b"),
        ("postgresql://u:p@[::1]:1,h:2/db?options=a@b", "p", "::1", "a@b"),
        ("postgresql://u:p?x=y@h/db?options=a", "p?x=y", "h", "a"),
        ("postgresql://u:p@q?r@h/db?options=a@b", "p@q?r", "h", "a@b"),
        ("postgresql://h/db?options=a@b", None, "h", "a@b"),
        ("\ufeff'postgresql://u:p@h/db?options=a' ", "p", "h", "a"),
    ],
)
def test_at_sign_may_be_in_the_password_and_in_the_query(
    url: str, password: str | None, host: str, options: str
) -> None:
    address = parse_database_url(url)
    assert (address.password, address.hosts[0][0], address.session["options"]) == (password, host, options)
    assert f":{password}@" not in mask_url(url)


def test_password_that_looks_like_a_place_with_a_query_is_never_shown() -> None:
    assert mask_url("postgresql://u:one@two/three?four=five@h/db") == "postgresql://***"


@pytest.mark.parametrize("parameter", ["password", "sslpassword"])
def test_secret_in_a_parameter_is_never_shown(parameter: str) -> None:
    url = f"postgresql://h/db?application_name=app&{parameter}=hunter2"
    assert mask_url(url) == f"postgresql://h/db?application_name=app&{parameter}=***"
    assert "hunter2" not in repr(parse_database_url(url))


def test_url_of_another_driver_of_python_is_accepted() -> None:
    assert parse_database_url("postgresql+psycopg2://u@h/db").hosts == (("h", None),)
    with pytest.raises(ValueError, match=re.escape("the scheme must be postgresql")):
        parse_database_url("mysql+pymysql://u@h/db")
