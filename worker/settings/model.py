"""All settings of the worker: their names, defaults and limits, and how they are printed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    create_model,
    field_validator,
    model_validator,
)

from worker.contract.durations import format_duration
from worker.contract.keys import DEFAULT_PREFIX, OWN_KEYS
from worker.contract.message import DEFAULT_CHANNEL
from worker.contract.sizes import format_size, parse_size
from worker.contract.urls import MASK, mask_url
from worker.db.address import DatabaseAddress, parse_database_url
from worker.db.counters.count_source import CountSource
from worker.db.target.names import TargetNames, parse_target
from worker.observability.logs import LogFormat
from worker.pipelines.model import RecordType
from worker.pipelines.records import RECORD_TYPES
from worker.pipelines.records.metrics import METRICS
from worker.pipelines.records.view_events import VIEW_EVENTS
from worker.redis.address import RedisAddress, parse_redis_url
from worker.settings.pipelines import (
    BufferSettings,
    Duration,
    PipelineSettings,
    make_fields,
    make_writer_fields,
    read_buffer,
    read_pipeline,
)

VIEW_COUNTS = "view_counts"
PIPELINES = (VIEW_COUNTS, *RECORD_TYPES)
DEFAULT_BUFFER_BYTES = 64 * 2**20
# What the counters, readers and monitors need besides one connection for each source of records.
BASE_CONNECTIONS = 3


def _database_url(value: SecretStr) -> SecretStr:
    try:
        parse_database_url(value.get_secret_value())
    except ValueError as error:
        raise ValueError(f"a URL such as postgresql://user:password@host:5432/database ({error})") from None
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    try:
        parse_redis_url(value.get_secret_value())
    except ValueError as error:
        raise ValueError(f"a URL such as redis://:password@host:6379/0 ({error})") from None
    return value


def _host(value: str) -> str:
    if "://" in value or "@" in value or "," in value:
        raise ValueError("only the name or address of one host")
    return value.removeprefix("[").removesuffix("]")


def _key_prefix(value: str) -> str:
    if not value or "\x00" in value:
        raise ValueError("a non-empty key prefix, such as vod:views:")
    if OWN_KEYS.startswith(value) or value.startswith(OWN_KEYS):
        raise ValueError(f"a prefix that does not overlap the worker's own keys ({OWN_KEYS}…)")
    return value


def _pipelines(value: object) -> object:
    names = tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not names or not set(names) <= set(PIPELINES) or len(set(names)) != len(names):
        raise ValueError(f"one or more of {', '.join(PIPELINES)}, separated by commas, each once")
    return names


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size)]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _level(value: object) -> object:
    level = _lower(value)
    return "warning" if level == "warn" else level


class ConflictingSettings(ValueError):
    """Settings contradict each other. `field` is the one to change, `expected` says to what."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(expected)
        self.field = field
        self.expected = expected


class DatabaseSettings(BaseModel):
    """Where Postgres is. The field `database_url` is the variable `DATABASE_URL`, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(None)
    db_host: Annotated[str, AfterValidator(_host)] | None = Field(None)
    db_port: int | None = Field(None, ge=1, le=65535)
    db_user: str | None = Field(None)
    db_password: SecretStr | None = Field(None)
    db_name: str | None = Field(None)
    db_ssl_mode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None = Field(None)

    @field_validator("*", mode="before")
    @classmethod
    def _check_utf8(cls, value: object) -> object:
        """Bytes of the environment that are not UTF-8 arrive as surrogates."""
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError("text in UTF-8")
        return value

    @property
    def database(self) -> DatabaseAddress:
        """`DATABASE_URL`; else the `DB_*` group if any of it is set; else the documented default."""
        group = [getattr(self, field) for field in DATABASE_GROUP]
        if self.database_url is not None:
            return parse_database_url(self.database_url.get_secret_value())
        if any(value is not None for value in group):
            return DatabaseAddress(
                hosts=((self.db_host or "localhost", self.db_port or 5432),),
                user=self.db_user or "postgres",
                password=self.db_password.get_secret_value() if self.db_password else "postgres",
                name=self.db_name or "stock_scanner",
                driver={"sslmode": self.db_ssl_mode or "disable"},
            )
        return parse_database_url(DEFAULT_DATABASE_URL)


class CoreSettings(DatabaseSettings):
    """The field `batch_size` is the variable `BATCH_SIZE`, and so on. Names and defaults are a public contract."""

    db_max_connections: int = Field(25, ge=3, le=1000)
    db_max_idle_conns: int = Field(5, ge=1, le=1000)
    db_conn_max_lifetime: Duration = Field(timedelta(minutes=5))

    redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] = Field(SecretStr("redis://localhost:6379"))
    redis_host: Annotated[str, AfterValidator(_host)] | None = Field(None)
    redis_port: int | None = Field(None, ge=1, le=65535)
    redis_password: SecretStr | None = Field(None)
    redis_db: int | None = Field(None, ge=0)
    sentinel_username: str | None = Field(None)
    sentinel_password: SecretStr | None = Field(None)
    sentinel_tls: bool | None = Field(None)

    batch_size: int = Field(100, ge=1, le=10_000)
    batch_size_max: int = Field(5000, ge=1, le=10_000)
    batch_interval_ms: int = Field(30_000, ge=10, le=86_400_000)

    health_check_port: int = Field(3003, ge=0, le=65535)
    health_check_host: Annotated[str, AfterValidator(_host)] = Field("0.0.0.0", min_length=1)  # noqa: S104
    health_grace: Duration = Field(timedelta(seconds=30))
    web_page: bool = Field(True)
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_level)] = Field("info")
    log_format: Annotated[LogFormat, BeforeValidator(_lower)] = Field("auto")
    pipelines: Annotated[tuple[str, ...], BeforeValidator(_pipelines)] = Field(("view_counts",))

    view_key_prefix: Annotated[str, AfterValidator(_key_prefix)] = Field(DEFAULT_PREFIX)
    view_channel: str = Field(DEFAULT_CHANNEL, min_length=1)
    view_totals_channel: str = Field("view_counts", min_length=1)
    view_source_name: str = Field("default", min_length=1, max_length=63)
    view_count_source: CountSource = Field("both")
    view_on_lost_marker: Literal["hold", "fresh"] = Field("hold")
    view_target_table: str | None = Field(None)
    view_target_key: str | None = Field(None)
    view_target_column: str | None = Field(None)
    view_ledger_retention: Duration = Field(timedelta(days=30))
    view_events_source: Literal["channel", "stream"] = Field("channel")

    grpc_port: int = Field(50051, ge=0, le=65535)
    grpc_host: Annotated[str, AfterValidator(_host)] = Field("0.0.0.0", min_length=1)  # noqa: S104
    grpc_tls_cert: Path | None = Field(None)
    grpc_tls_key: Path | None = Field(None)

    dead_letter_retention: Duration = Field(timedelta(days=30))
    buffer_max_bytes: Size = Field(DEFAULT_BUFFER_BYTES, ge=2**20)
    shutdown_timeout: Duration = Field(timedelta(seconds=8))
    migrate_on_start: bool = Field(False)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.batch_size > self.batch_size_max:
            raise ConflictingSettings("batch_size_max", "BATCH_SIZE or more")
        if self.db_max_idle_conns > self.db_max_connections:
            raise ConflictingSettings("db_max_idle_conns", "DB_MAX_CONNECTIONS or less")
        if self.view_channel == self.view_totals_channel:
            raise ConflictingSettings("view_totals_channel", "a channel other than VIEW_CHANNEL")
        if (self.grpc_tls_cert is None) != (self.grpc_tls_key is None):
            missing_file = "grpc_tls_key" if self.grpc_tls_key is None else "grpc_tls_cert"
            raise ConflictingSettings(missing_file, "a file: set both GRPC_TLS_CERT and GRPC_TLS_KEY, or neither")
        self._check_streams()
        target = ("view_target_table", "view_target_key", "view_target_column")
        missing = [name for name in target if getattr(self, name) is None]
        if 0 < len(missing) < len(target):
            raise ConflictingSettings(missing[0], "a value: set all of VIEW_TARGET_TABLE, _KEY and _COLUMN, or none")
        if self.view_target_column is not None and self.view_target_column == self.view_target_key:
            raise ConflictingSettings("view_target_column", "a column other than VIEW_TARGET_KEY")
        try:
            _ = self.view_target
        except ValueError as error:
            raise ConflictingSettings("view_target_table", str(error)) from None
        return self

    def _check_streams(self) -> None:
        carried_by: dict[str, str] = {}
        for record in self.records:
            for stream in self.pipeline(record).streams:
                field = f"{record.name}_stream"
                if stream in carried_by:
                    raise ConflictingSettings(field, f"streams that {carried_by[stream]} does not carry")
                if stream.startswith((self.view_key_prefix, OWN_KEYS)):
                    raise ConflictingSettings(field, f"names outside VIEW_KEY_PREFIX and {OWN_KEYS}")
                carried_by[stream] = record.name
        least = BASE_CONNECTIONS + len(carried_by) + self.stores_messages
        if self.db_max_connections < least:
            raise ConflictingSettings(
                "db_max_connections",
                f"{least} or more: {BASE_CONNECTIONS}, and one for each stream and for VIEW_EVENTS_SOURCE=channel",
            )

    @property
    def records(self) -> list[RecordType[Any]]:
        """The records that are carried."""
        return [RECORD_TYPES[name] for name in self.pipelines if name in RECORD_TYPES]

    def pipeline(self, record: RecordType[Any]) -> PipelineSettings:
        """The settings of the pipeline of a record. One that reads a channel has no streams."""
        own = read_pipeline(self, record)
        reads_channel = record is VIEW_EVENTS and self.view_events_source == "channel"
        return replace(own, streams=()) if reads_channel else own

    def buffer(self, record: RecordType[Any]) -> BufferSettings:
        """The settings of the buffer of a record."""
        return read_buffer(self, record)

    @property
    def streams(self) -> list[str]:
        """The streams that are carried."""
        return [stream for record in self.records for stream in self.pipeline(record).streams]

    @property
    def counts_views(self) -> bool:
        return VIEW_COUNTS in self.pipelines

    @property
    def serves_grpc(self) -> bool:
        """Whether metrics are taken over gRPC."""
        return METRICS.name in self.pipelines and self.grpc_port != 0

    @property
    def redis(self) -> RedisAddress:
        """`REDIS_URL`; else the `REDIS_*` group if any of it is set; else the documented default.

        What the URL does not say of the Sentinels is in `SENTINEL_*`.
        """
        group = [getattr(self, field) for field in REDIS_GROUP]
        if "redis_url" not in self.model_fields_set and any(value is not None for value in group):
            return RedisAddress(
                hosts=((self.redis_host or "localhost", self.redis_port or 6379),),
                database=self.redis_db or 0,
                password=self.redis_password.get_secret_value() if self.redis_password else None,
            )
        return parse_redis_url(self.redis_url.get_secret_value()).with_sentinel_login(
            self.sentinel_username,
            self.sentinel_password.get_secret_value() if self.sentinel_password else None,
            self.sentinel_tls,
        )

    @property
    def listens(self) -> bool:
        """Whether to subscribe to VIEW_CHANNEL. With `counters` the sweep finds every view without messages."""
        return self.view_count_source != "counters"

    @property
    def stores_messages(self) -> bool:
        """Whether each message on VIEW_CHANNEL becomes a row of view_events."""
        return VIEW_EVENTS in self.records and self.view_events_source == "channel"

    @property
    def shares_usual_channel(self) -> bool:
        """True if the channel may carry messages about the keys of another database or prefix.

        A channel belongs to the whole Redis server, so sources that keep the default channel share it.
        """
        usual = type(self).model_fields
        if not (self.listens or self.stores_messages) or self.view_channel != usual["view_channel"].default:
            return False
        return self.redis.database != 0 or self.view_key_prefix != usual["view_key_prefix"].default

    @property
    def view_target(self) -> TargetNames | None:
        """The application's own table, or None if it is not set."""
        if self.view_target_table is None:
            return None
        return parse_target(self.view_target_table, str(self.view_target_key), str(self.view_target_column))

    def redacted(self) -> dict[str, str]:
        """Variable → effective value, safe to print: secrets are masked."""
        values = {name.upper(): _show(getattr(self, name)) for name in type(self).model_fields}
        values["BUFFER_MAX_BYTES"] = format_size(self.buffer_max_bytes)
        values |= {name.upper(): MASK if getattr(self, name) else "" for name in PASSWORDS}
        if self.database_url is None:
            values["DATABASE_URL"] = self.database.redacted()
        if "redis_url" not in self.model_fields_set:
            values["REDIS_URL"] = self.redis.redacted()
        return values


if TYPE_CHECKING:

    class Settings(CoreSettings):
        """With the settings of each pipeline, which `pipeline` returns."""

else:
    Settings = create_model("Settings", __base__=CoreSettings, **make_fields())


class WriterSettings(DatabaseSettings):
    """What an application's Writer reads of the environment."""

    db_conn_max_lifetime: Duration = Field(timedelta(minutes=5))
    buffer_max_bytes: Size = Field(DEFAULT_BUFFER_BYTES, ge=2**20)
    shutdown_timeout: Duration = Field(timedelta(seconds=8))

    def buffer(self, record: RecordType[Any]) -> BufferSettings:
        """The settings of the Writer of a record; only that which this model was made for."""
        return read_buffer(self, record)


def writer_settings_of(record: RecordType[Any]) -> type[WriterSettings]:
    """The model with the settings of this record's Writer."""
    return create_model("RecordWriterSettings", __base__=WriterSettings, **make_writer_fields(record))


DEFAULT_DATABASE_URL = "postgresql://username:password@localhost:5432/streamix"
# Together they are the database's address if DATABASE_URL is not set.
DATABASE_GROUP = ("db_host", "db_port", "db_user", "db_password", "db_name", "db_ssl_mode")
# And Redis's, if REDIS_URL is not set.
REDIS_GROUP = ("redis_host", "redis_port", "redis_password", "redis_db")
# Where both the URL and its group are set in the same place, the URL is used, and the group is not read.
ADDRESSES = {"database_url": DATABASE_GROUP, "redis_url": REDIS_GROUP}
PASSWORDS = ("db_password", "redis_password", "sentinel_password")
SECRETS = {*ADDRESSES, *PASSWORDS}


def _show(value: object) -> str:
    match value:
        case None:
            return ""
        case SecretStr():
            return mask_url(value.get_secret_value())
        case timedelta():
            return format_duration(value)
        case tuple():
            return ",".join(value)
        case bool():
            return str(value).lower()
    return str(value)
