"""A wrong setting prevents the start and is named; secrets are never shown."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.durations import format_age, format_duration, parse_duration
from worker.errors import InvalidSettings
from worker.settings.environment import load_settings, service_links
from worker.settings.model import Settings

ROOT = Path(__file__).parents[2]


def load(**environ: str) -> Settings:
    return load_settings(environ=environ)


def problem(**environ: str) -> str:
    with pytest.raises(InvalidSettings) as caught:
        load(**environ)
    return str(caught.value)


def test_defaults_are_those_of_the_contract() -> None:
    shown = load().redacted()
    assert shown["DATABASE_URL"].endswith("@localhost:5432/streamix")
    assert shown["REDIS_URL"] == "redis://localhost:6379"
    expected = {
        "DB_MAX_CONNECTIONS": "25",
        "DB_MAX_IDLE_CONNS": "5",
        "DB_CONN_MAX_LIFETIME": "5m",
        "BATCH_SIZE": "100",
        "BATCH_SIZE_MAX": "5000",
        "BATCH_INTERVAL_MS": "30000",
        "HEALTH_CHECK_PORT": "3003",
        "HEALTH_CHECK_HOST": "0.0.0.0",
        "HEALTH_GRACE": "30s",
        "LOG_LEVEL": "info",
        "LOG_FORMAT": "auto",
        "PIPELINES": "view_counts",
        "VIEW_KEY_PREFIX": "vod:views:",
        "VIEW_CHANNEL": "view_count_updates",
        "VIEW_TOTALS_CHANNEL": "view_counts",
        "VIEW_SOURCE_NAME": "default",
        "VIEW_COUNT_SOURCE": "both",
        "VIEW_ON_LOST_MARKER": "hold",
        "VIEW_LEDGER_RETENTION": "30d",
        "SHUTDOWN_TIMEOUT": "8s",
        "MIGRATE_ON_START": "false",
    }
    assert {name: shown[name] for name in expected} == expected


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_every_scheme_of_a_postgres_url_is_accepted(scheme: str) -> None:
    address = load(DATABASE_URL=f"{scheme}://u:p%40ss@db:5433/app?sslmode=require&sslrootcert=/ca.pem").database
    assert (address.user, address.password, address.hosts) == ("u", "p@ss", (("db", 5433),))
    assert address.name == "app"
    assert address.driver == {"sslmode": "require", "sslrootcert": "/ca.pem"}


def test_password_that_was_not_encoded_still_works() -> None:
    assert load(DATABASE_URL="postgresql://u:p@:/%#w@db/app").database.password == "p@:/%#w"
    assert load(REDIS_URL="redis://:p@:/%#w@cache:6380/2").redis.password == "p@:/%#w"
    assert load(DB_PASSWORD="p@:/%#w").database.password == "p@:/%#w"


def test_target_settings_belong_together_and_its_key_is_not_its_total() -> None:
    assert problem(VIEW_TARGET_TABLE="Vod").startswith("VIEW_TARGET_KEY=")
    same = problem(VIEW_TARGET_TABLE="Vod", VIEW_TARGET_KEY="id", VIEW_TARGET_COLUMN="id")
    assert same.startswith("VIEW_TARGET_COLUMN=")


def test_url_of_a_prisma_application_works_unchanged() -> None:
    url = "postgresql://u:p@db/app?schema=My App&connection_limit=5&pool_timeout=2&pgbouncer=true&sslmode=require"
    address = load(DATABASE_URL=url).database
    assert (address.session, address.driver) == ({"search_path": '"My App"'}, {"sslmode": "require"})
    assert address.pooled
    assert address.ignored == ("connection_limit", "pool_timeout")
    assert load(LOG_LEVEL="WARN").log_level == "warning"


def test_db_group_is_used_only_without_database_url() -> None:
    address = load(DB_HOST="db.internal").database
    assert (address.user, address.password, address.name) == ("postgres", "postgres", "stock_scanner")
    assert address.hosts == (("db.internal", 5432),)
    assert address.driver == {"sslmode": "disable"}
    assert load(DB_HOST="db.internal", DATABASE_URL="postgresql://u@other/x").database.place == "other:5432"


def test_redis_urls_are_parsed() -> None:
    tls = load(REDIS_URL="rediss://user:pw@cache:6380/3?ssl_ca_certs=/ca.pem").redis
    assert (tls.hosts, tls.tls, tls.user, tls.password, tls.database) == ((("cache", 6380),), True, "user", "pw", 3)
    assert tls.options == {"ssl_ca_certs": "/ca.pem"}
    assert load(REDIS_URL="unix:///run/redis.sock?db=2").redis.unix_path == "/run/redis.sock"
    assert load(REDIS_URL="redis://[::1]:7000").redis.hosts == (("::1", 7000),)
    sentinel = load(REDIS_URL="redis+sentinel://:pw@a:1,b/mymaster/4").redis
    assert (sentinel.hosts, sentinel.master, sentinel.database) == ((("a", 1), ("b", 26379)), "mymaster", 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATCH_SIZE", "0"),
        ("BATCH_SIZE", "-1"),
        ("BATCH_SIZE", "nan"),
        ("BATCH_SIZE", "1e99"),
        ("BATCH_SIZE", ""),
        ("BATCH_SIZE_MAX", "99999999999999999999"),
        ("BATCH_INTERVAL_MS", "0"),
        ("BATCH_INTERVAL_MS", "30s"),
        ("HEALTH_CHECK_PORT", "65536"),
        ("HEALTH_GRACE", "soon"),
        ("HEALTH_GRACE", "-5s"),
        ("HEALTH_GRACE", "999999y"),
        ("SHUTDOWN_TIMEOUT", "0s"),
        ("SHUTDOWN_TIMEOUT", "8"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "text"),
        ("PIPELINES", "nonsense"),
        ("PIPELINES", ","),
        ("VIEW_KEY_PREFIX", ""),
        ("VIEW_KEY_PREFIX", "viewer-worker:"),
        ("VIEW_KEY_PREFIX", "view"),
        ("VIEW_COUNT_SOURCE", "all"),
        ("VIEW_TOTALS_CHANNEL", "view_count_updates"),
        ("VIEW_ON_LOST_MARKER", "panic"),
        ("MIGRATE_ON_START", "perhaps"),
        ("DB_PORT", "http"),
        ("DB_SSL_MODE", "on"),
        ("DB_MAX_CONNECTIONS", "1"),
        ("DATABASE_URL", "mysql://u@h/x"),
        ("DATABASE_URL", "localhost"),
        ("DATABASE_URL", "postgresql://u@h:port/x"),
        ("DATABASE_URL", "postgresql://u@h/x?sslmode=yes"),
        ("REDIS_URL", "http://h"),
        ("REDIS_URL", "redis://h:99999"),
        ("REDIS_URL", "redis://h/zero"),
        ("REDIS_URL", "redis://h?surprise=1"),
        ("REDIS_URL", "redis+sentinel://h:1"),
        ("REDIS_URL", ""),
    ],
)
def test_wrong_value_is_named_with_what_is_expected(name: str, value: str) -> None:
    message = problem(**{name: value})
    assert message.startswith(f"{name}=")
    assert "expected" in message


def test_all_wrong_values_are_named_at_once() -> None:
    message = problem(BATCH_SIZE="x", LOG_LEVEL="y")
    assert "BATCH_SIZE" in message
    assert "LOG_LEVEL" in message


def test_batch_size_above_the_default_maximum_raises_the_maximum() -> None:
    assert load(BATCH_SIZE="7000").batch_size_max == 7000
    assert load(DB_MAX_CONNECTIONS="3").db_max_idle_conns == 3
    assert problem(BATCH_SIZE="9", BATCH_SIZE_MAX="8").startswith("BATCH_SIZE_MAX=")


def test_empty_optional_variable_counts_as_unset() -> None:
    assert load(DATABASE_URL="", DB_HOST="", VIEW_TARGET_TABLE="").database == load().database


def test_secret_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("postgresql://u:hunter2@db/app\n")
    settings = load(DATABASE_URL_FILE=str(tmp_path / "secret"))
    assert settings.database.password == "hunter2"
    assert "only one of" in problem(DATABASE_URL_FILE=str(tmp_path / "secret"), DATABASE_URL="postgresql://u@h/x")
    env_file = tmp_path / "worker.env"
    env_file.write_text("DATABASE_URL=postgresql://u@other/x")
    wins = load_settings(env_file, {"DATABASE_URL_FILE": str(tmp_path / "secret")})
    assert wins.database.password == "hunter2"
    assert "DATABASE_URL_FILE" in problem(DATABASE_URL_FILE=str(tmp_path / "missing"))


def test_environment_wins_over_env_file_and_flags_win_over_both(tmp_path: Path) -> None:
    env_file = tmp_path / "worker.env"
    env_file.write_text("BATCH_SIZE=11\nLOG_LEVEL=error\nBATCH_INTERVAL_MS=1000\nUNRELATED=1\n")
    settings = load_settings(env_file, {"BATCH_SIZE": "22"}, log_level="debug")
    assert (settings.batch_size, settings.log_level, settings.batch_interval_ms) == (22, "debug", 1000)


CANARY = "c4n4ry/@:%#"


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "DB_PASSWORD", "REDIS_PASSWORD", "SENTINEL_PASSWORD"])
@pytest.mark.parametrize(
    "form",
    [
        "postgresql://u:{}@h/x",
        "redis://:{}@h",
        "http://u:{}@h",
        "{}",
        "postgresql://h:{}/x",
        "redis://default:{}",
        "rediss://:{}",
        "postgresql://u:{}/db",
    ],
)
def test_secrets_are_never_shown(name: str, form: str) -> None:
    try:
        settings = load(**{name: form.format(CANARY)})
    except InvalidSettings as error:
        assert "c4n4ry" not in str(error)
        assert error.__cause__ is None
        return
    assert "c4n4ry" not in "".join(settings.redacted().values()) + repr(settings) + repr(settings.redis)


@given(st.integers(1, 10**9))
def test_printed_duration_is_parsed_to_the_same_value(milliseconds: int) -> None:
    duration = timedelta(milliseconds=milliseconds)
    assert parse_duration(format_duration(duration)) == duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-0.4, "0s"),
        (0.9, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (10_800, "3h"),
        (14_000, "3h"),
        (3e5, "3d"),
    ],
)
def test_age_is_shown_in_a_unit_that_fits(seconds: float, words: str) -> None:
    assert format_age(seconds) == words


def test_env_example_lists_every_variable_with_its_default() -> None:
    text = (ROOT / "env.example").read_text()
    listed = dict(re.findall(r"^#?([A-Z0-9_]+)=(.*)$", text, re.MULTILINE))
    assert list(listed) == [name.upper() for name in Settings.model_fields]
    settings = load_settings(environ={name: value for name, value in listed.items() if value})
    default = load(DATABASE_URL=listed["DATABASE_URL"])
    for field in Settings.model_fields:
        if not field.startswith("db_"):
            assert getattr(settings, field) == getattr(default, field), field


def test_reference_lists_every_variable() -> None:
    text = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert re.findall(r"^\| `([A-Z0-9_]+)`", text, re.MULTILINE) == [name.upper() for name in Settings.model_fields]


def test_database_group_of_the_environment_wins_over_a_url_in_the_file(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("DATABASE_URL=postgresql://me@in-the-file/app\nBATCH_SIZE=7\n")
    assert load_settings(env_file, {}).database.place == "in-the-file:5432"
    settings = load_settings(env_file, {"DB_HOST": "in-the-environment"})
    assert (settings.database.place, settings.batch_size) == ("in-the-environment:5432", 7)
    both = {"DB_HOST": "group", "DATABASE_URL": "postgresql://me@url/app"}
    assert load_settings(env_file, both).database.place == "url:5432"


@pytest.mark.parametrize(
    ("environ", "setting"),
    [
        ({"BATCH_SIZE": "1" * 5000}, "BATCH_SIZE"),
        ({"VIEW_KEY_PREFIX": "v\udcff:"}, "VIEW_KEY_PREFIX"),
        ({"CHUNK_REQUESTS_STREAM": "a,b\udcff"}, "CHUNK_REQUESTS_STREAM"),
        ({"CHUNK_REQUESTS_STREAM_FIELD": "\udcff"}, "CHUNK_REQUESTS_STREAM_FIELD"),
        ({"CHUNK_REQUESTS_STREAM_GROUP": "\udcff"}, "CHUNK_REQUESTS_STREAM_GROUP"),
        ({"DB_PASSWORD": "\udcff"}, "DB_PASSWORD"),
        ({"DB_PASSWORD_FILE": "/dev/null"}, "DB_PASSWORD_FILE"),
    ],
)
def test_unusual_value_is_reported_as_a_wrong_setting(environ: dict[str, str], setting: str) -> None:
    with pytest.raises(InvalidSettings, match=f"^{setting}="):
        load_settings(environ=environ)


def test_env_file_that_is_not_text_is_reported_as_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_bytes(b"BATCH_SIZE=\xff")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSettings, match=r"^\.env="):
        load_settings(environ={})


def test_view_events_read_the_channel_or_streams_and_never_both() -> None:
    def sources(**environ: str) -> tuple[bool, list[str]]:
        settings = load(VIEW_COUNT_SOURCE="counters", VIEW_EVENTS_STREAM="a,b", **environ)
        return settings.stores_messages, settings.streams

    assert sources(PIPELINES="view_events") == (True, [])
    assert sources(PIPELINES="view_events", VIEW_EVENTS_SOURCE="stream") == (False, ["a", "b"])
    assert sources(PIPELINES="view_counts") == (False, [])


def test_the_channel_of_view_events_needs_a_connection_of_its_own() -> None:
    few = {"DB_MAX_CONNECTIONS": "3", "DB_MAX_IDLE_CONNS": "3"}
    assert "4 or more" in problem(PIPELINES="view_counts,view_events", **few)
    assert load(PIPELINES="view_counts", **few).db_max_connections == 3


def test_redis_group_is_used_only_without_redis_url(tmp_path: Path) -> None:
    address = load(REDIS_HOST="cache", REDIS_PASSWORD="p@:/#w", REDIS_DB="3").redis
    assert (address.hosts, address.password, address.database) == ((("cache", 6379),), "p@:/#w", 3)
    assert load(REDIS_PORT="7000").redis.hosts == (("localhost", 7000),)
    assert load(REDIS_HOST="cache", REDIS_URL="redis://other").redis.hosts == (("other", 6379),)
    assert load(REDIS_HOST="cache", REDIS_URL="").redis.hosts == (("cache", 6379),)
    shown = load(REDIS_HOST="cache", REDIS_PASSWORD="hunter2").redacted()
    assert (shown["REDIS_URL"], shown["REDIS_PASSWORD"]) == ("redis://:***@cache:6379", "***")
    env_file = tmp_path / ".env"
    env_file.write_text("REDIS_URL=redis://in-the-file\n")
    assert load_settings(env_file, {"REDIS_HOST": "in-the-environment"}).redis.hosts[0][0] == "in-the-environment"


def test_sentinels_have_settings_for_their_login() -> None:
    login = load(
        REDIS_URL="redis+sentinel://:pw@a/m", SENTINEL_USERNAME="u", SENTINEL_PASSWORD="p", SENTINEL_TLS="true"
    ).redis
    assert (login.sentinel.user, login.sentinel.password, login.sentinel_tls) == ("u", "p", True)


SERVICE_LINKS = {
    "DB_PORT": "tcp://10.96.12.3:5432",
    "REDIS_PORT": "tcp://10.96.12.4:6379",
    "HEALTH_CHECK_PORT": "tcp://10.96.12.5:3003",
    "GRPC_PORT": "udp://10.96.12.6:50051",
}


def test_address_that_kubernetes_sets_for_a_service_is_not_a_setting(tmp_path: Path) -> None:
    assert load(**SERVICE_LINKS) == load()
    assert service_links(SERVICE_LINKS) == ["DB_PORT", "REDIS_PORT", "HEALTH_CHECK_PORT", "GRPC_PORT"]
    assert load(DB_HOST="db", **SERVICE_LINKS).database.place == "db:5432"
    env_file = tmp_path / ".env"
    env_file.write_text("DATABASE_URL=postgresql://me@in-the-file/app\nHEALTH_CHECK_PORT=4000\n")
    settings = load_settings(env_file, SERVICE_LINKS)
    assert (settings.database.place, settings.health_check_port) == ("in-the-file:5432", 4000)


def test_group_is_not_validated_where_the_url_decides(tmp_path: Path) -> None:
    group = {"DB_PORT": "http", "DB_SSL_MODE": "on", "DB_PASSWORD_FILE": str(tmp_path / "missing"), "REDIS_DB": "x"}
    urls = {"DATABASE_URL": "postgresql://u@h/x", "REDIS_URL": "redis://h"}
    assert load(**group, **urls) == load(**urls)
    env_file = tmp_path / ".env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in group.items()))
    assert load_settings(env_file, urls).database.place == "h:5432"
    del group["DB_PASSWORD_FILE"]
    assert "DB_PORT=" in problem(**group)


@pytest.mark.parametrize("written", ["\ufeff{}\r\n", '"{}"\n', "'{}'", '\ufeff"{}"', " {} \n"])
def test_byte_order_mark_and_quotes_around_a_url_in_a_file_do_not_count(tmp_path: Path, written: str) -> None:
    for name, url in (("DATABASE_URL", "postgresql://u:p@db/app"), ("REDIS_URL", "redis://:p@cache/1")):
        (tmp_path / name).write_bytes(written.format(url).encode())
    files = {f"{name}_FILE": str(tmp_path / name) for name in ("DATABASE_URL", "REDIS_URL")}
    plain = load(DATABASE_URL="postgresql://u:p@db/app", REDIS_URL="redis://:p@cache/1")
    assert load(**files) == plain
    quoted = load(DATABASE_URL="'postgresql://u:p@db/app'", REDIS_URL='"redis://:p@cache/1"')
    assert (quoted.database, quoted.redis) == (plain.database, plain.redis)
    assert quoted.redacted() == plain.redacted()


def test_password_in_a_file_loses_its_byte_order_mark_and_keeps_its_quotes(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes('\ufeff"p"\n'.encode())
    assert load(DB_HOST="h", DB_PASSWORD_FILE=str(tmp_path / "password")).database.password == '"p"'


def test_host_may_have_the_brackets_of_a_url() -> None:
    settings = load(HEALTH_CHECK_HOST="[::]", DB_HOST="[::1]")
    assert (settings.health_check_host, settings.database.place) == ("::", "[::1]:5432")


def test_unknown_parameter_of_the_url_stops_the_start_and_is_named() -> None:
    message = problem(DATABASE_URL="postgresql://u:hunter2@h/db?surprise=1")
    assert message.startswith("DATABASE_URL='postgresql://***'")
    assert "unknown parameter 'surprise'" in message
    assert "hunter2" not in message
