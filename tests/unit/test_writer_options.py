"""What a Writer is told: arguments win over the environment, and what is wrong is named as it was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from worker.errors import InvalidSettings
from worker.inprocess.options import WriterOptions
from worker.inprocess.sync_writer import SyncWriter
from worker.inprocess.writer import Writer
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.settings.environment import without_settings

URL = "postgresql://user:secret@db.example:6000/app"
ARGUMENTS: dict[str, Any] = {
    "database_url": URL,
    "capacity": 7,
    "writers": 3,
    "batch_size": 11,
    "batch_timeout": 1.5,
    "max_retries": 0,
    "retry_delay": 0.25,
    "enabled": False,
}
VARIABLES = {
    "DATABASE_URL": "postgresql://other:other@other:7000/other",
    "CHUNKLOG_CHANNEL_CAP": "8",
    "CHUNKLOG_WORKERS": "4",
    "CHUNKLOG_BATCH_SIZE": "12",
    "CHUNKLOG_BATCH_TIMEOUT": "2500ms",
    "CHUNKLOG_MAX_RETRIES": "1",
    "CHUNKLOG_RETRY_DELAY": "1s",
    "CHUNKLOG_ENABLED": "true",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the test without settings."""
    for name in set(os.environ) - set(without_settings(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch


def read(**arguments: Any) -> WriterOptions:
    return WriterOptions.read(CHUNK_REQUESTS, **arguments)


def problems(**arguments: Any) -> dict[str, str]:
    """The wrong names, each with its value as it is shown."""
    with pytest.raises(InvalidSettings) as caught:
        read(**arguments)
    return {problem.name: problem.value for problem in caught.value.problems}


def facts(options: WriterOptions) -> tuple[Any, ...]:
    it = options
    place = it.database.place
    return place, it.capacity, it.writers, it.batch_size, it.batch_timeout, it.max_retries, it.retry_delay, it.enabled


OF_ARGUMENTS = ("db.example:6000", 7, 3, 11, 1.5, 0, 0.25, False)
OF_VARIABLES = ("other:7000", 8, 4, 12, 2.5, 1, 1.0, True)
DEFAULTS = (10_000, 2, 500, 0.2, 3, 0.1, True)


def test_without_both_there_are_defaults() -> None:
    options = read()
    assert facts(options) == ("localhost:5432", *DEFAULTS)
    assert (options.buffer_bytes, options.shutdown_timeout, options.recycle) == (64 * 2**20, 8.0, 300.0)


def test_variables_are_read(environment: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        environment.setenv(name, value)
    assert facts(read()) == OF_VARIABLES


def test_arguments_win_over_variables(environment: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        environment.setenv(name, value)
    assert facts(read(**ARGUMENTS)) == OF_ARGUMENTS
    assert facts(read(**dict.fromkeys(ARGUMENTS))) == OF_VARIABLES


def test_arguments_win_over_variables_that_are_wrong(environment: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        environment.setenv(name, "nonsense")
    environment.setenv("CHUNKLOG_WORKERS_FILE", "/does/not/exist")
    environment.delenv("CHUNKLOG_WORKERS")
    assert facts(read(**ARGUMENTS)) == OF_ARGUMENTS


def test_every_wrong_argument_is_named_as_the_argument_that_it_is() -> None:
    wrong: dict[str, Any] = {
        "database_url": "mysql://user:secret@db/app",
        "capacity": 0,
        "writers": 65,
        "batch_size": "many",
        "batch_timeout": -1.0,
        "max_retries": -1,
        "retry_delay": 0.0,
        "enabled": "perhaps",
    }
    shown = {name: str(value) for name, value in wrong.items()} | {"database_url": "mysql://***"}
    assert problems(**wrong) == shown


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e12])
def test_a_duration_without_an_end_is_wrong(seconds: float) -> None:
    assert list(problems(batch_timeout=seconds)) == ["batch_timeout"]


def test_every_wrong_variable_is_named_as_the_variable_that_it_is(environment: pytest.MonkeyPatch) -> None:
    wrong = {
        "CHUNKLOG_CHANNEL_CAP": "0",
        "CHUNKLOG_BATCH_TIMEOUT": "1",
        "CHUNK_REQUESTS_ACCEPT_PAST": "soon",
        "BUFFER_MAX_BYTES": "64 MB",
        "SHUTDOWN_TIMEOUT": "0s",
    }
    for name, value in wrong.items():
        environment.setenv(name, value)
    assert problems() == wrong
    del wrong["CHUNKLOG_CHANNEL_CAP"]
    assert problems(capacity=-1) == wrong | {"capacity": "-1"}


@pytest.mark.parametrize("url", ["postgresql://user:secret@db:port/app", "user:secret@db/app", "secret"])
def test_secrets_are_in_no_message_and_no_text_of_the_options(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("DATABASE_URL", url)
    for arguments in ({}, {"database_url": url}):
        with pytest.raises(InvalidSettings) as caught:
            read(**arguments)
        assert "secret" not in str(caught.value)
    assert "secret" not in repr(read(database_url=URL))


OF_OTHERS = {
    "REDIS_URL": "x",
    "HEALTH_CHECK_PORT": "tcp://10.0.0.1:3003",
    "PIPELINES": "none",
    "BATCH_SIZE": "lots",
    "CHUNK_REQUESTS_STREAM": ",",
    "VIEW_KEY_PREFIX": "",
}
GROUP = {"DB_PORT": "tcp://10.0.0.1:5432", "DB_SSL_MODE": "maybe", "DB_PASSWORD_FILE": "/does/not/exist"}


def test_variables_that_a_writer_does_not_need_may_be_wrong(environment: pytest.MonkeyPatch) -> None:
    for name, value in OF_OTHERS.items():
        environment.setenv(name, value)
    assert facts(read())[1:] == DEFAULTS


@pytest.mark.parametrize("way", ["argument", "DATABASE_URL", "DATABASE_URL_FILE"])
def test_the_url_wins_over_a_group_that_is_wrong(environment: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    for name, value in GROUP.items():
        environment.setenv(name, value)
    (tmp_path / "url").write_text(URL + "\n")
    if way != "argument":
        environment.setenv(way, URL if way == "DATABASE_URL" else str(tmp_path / "url"))
    assert read(database_url=URL if way == "argument" else None).database.place == "db.example:6000"


def test_without_a_url_the_group_counts(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DATABASE_URL", "")
    environment.setenv("DB_HOST", "db.example")
    assert read().database.place == "db.example:5432"
    environment.setenv("DB_PORT", "tcp://10.0.0.1:5432")  # set by Kubernetes for a service `db`
    assert read().database.place == "db.example:5432"
    environment.setenv("DB_PORT", "http")
    assert list(problems()) == ["DB_PORT"]


def test_parameters_of_the_url_that_have_no_effect_are_logged_once(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv("DATABASE_URL", f"{URL}?connection_limit=1&channel_binding=require")
    with caplog.at_level("INFO", logger="worker.inprocess.options"):
        read()
    (record,) = caplog.records
    assert "connection_limit" in record.getMessage()
    assert "channel_binding" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "size"), [("1MiB", 2**20), ("1024KiB", 2**20), ("2GiB", 2**31), ("1048576", 2**20), (" 64MiB ", 2**26)]
)
def test_the_size_of_the_buffer_has_units(environment: pytest.MonkeyPatch, text: str, size: int) -> None:
    environment.setenv("BUFFER_MAX_BYTES", text)
    assert read().buffer_bytes == size


@pytest.mark.parametrize("text", ["1023KiB", "0", "-1", "64MB", "64mib", "1.5GiB", "many"])
def test_a_size_that_is_too_small_or_none_is_wrong(environment: pytest.MonkeyPatch, text: str) -> None:
    environment.setenv("BUFFER_MAX_BYTES", text)
    assert problems() == {"BUFFER_MAX_BYTES": text}


def test_an_env_file_is_left_to_the_application(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("CHUNKLOG_WORKERS=9\n")
    environment.chdir(tmp_path)
    assert read().writers == 2


@pytest.mark.parametrize("kind", [Writer, SyncWriter])
def test_both_writers_report_wrong_arguments_when_they_are_made(kind: Any) -> None:
    with pytest.raises(InvalidSettings, match="capacity='0'"):
        kind.chunk_requests(URL, capacity=0)
