"""Reads the settings from the environment, `.env` and `<NAME>_FILE`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dotenv import dotenv_values
from pydantic import BaseModel, ValidationError

from worker.contract.urls import MASK, without_quotes
from worker.errors import InvalidSettings, SettingProblem
from worker.settings.model import ADDRESSES, PASSWORDS, SECRETS, ConflictingSettings, Settings, writer_settings_of

if TYPE_CHECKING:
    from worker.pipelines.model import RecordType
    from worker.settings.model import WriterSettings

M = TypeVar("M", bound=BaseModel)

# Names this similar count as misspelt. BATCH_INTERVAL is this similar to BATCH_INTERVAL_MS. DB_USERNAME, which an
# application may use itself, is less similar to DB_USER.
ALIKE = 0.87
_SHORT_NUMBER = re.compile("[0-9]{1,9}")
_SERVICE_LINK = re.compile(r"(?:tcp|udp|sctp)://")
_SCHEME = re.compile(r"[a-z][a-z0-9+]*://")


def load_settings(
    env_file: Path | None = None, environ: Mapping[str, str] | None = None, **overrides: str | None
) -> Settings:
    """Read the settings. `overrides` (flags) win over `environ`, which wins over `env_file` (default: `.env`, if any).

    Raises InvalidSettings naming every variable, and every flag, that is wrong.
    """
    if env_file is not None and not env_file.is_file():
        raise InvalidSettings([SettingProblem("--env-file", str(env_file), "an existing file")])
    dotenv = read_dotenv(env_file)
    given = {name: value for name, value in overrides.items() if value is not None}
    raw = _read(Settings, [os.environ if environ is None else environ, dotenv], set(given)) | given
    _follow(raw, "batch_size", "batch_size_max", more=True)
    _follow(raw, "db_max_connections", "db_max_idle_conns", more=False)
    return _validate(Settings, raw, flags=given)


def load_writer_settings(record: RecordType[Any], arguments: Mapping[str, Any]) -> WriterSettings:
    """Read what an application's Writer needs, and nothing else. `arguments` (variable → value; durations in seconds)
    win over the environment. An `.env` file is the application's own to read. Raises InvalidSettings.
    """
    model = writer_settings_of(record)
    given = {name.lower(): value for name, value in arguments.items()}
    return _validate(model, _read(model, [os.environ], set(given)) | given)


def read_dotenv(env_file: Path | None) -> dict[str, str]:
    """The variables of `env_file`, by default of `.env` if it exists. Raises InvalidSettings."""
    path = env_file or Path(".env")
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        problem = SettingProblem("--env-file" if env_file else ".env", str(path), f"a readable text file ({error})")
        raise InvalidSettings([problem]) from None


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without settings, for a worker that reads them from a file: the environment's would win."""
    own = {field.upper() for field in Settings.model_fields}
    return {name: value for name, value in environ.items() if name.removesuffix("_FILE") not in own}


def misspelt(names: Collection[str]) -> dict[str, str]:
    """Variables that are not settings, each with the unset setting that it resembles."""
    settings = {field.upper() for field in Settings.model_fields}
    settings |= {f"{name}_FILE" for name in settings}
    missing = sorted(settings.difference(names))
    alike = {name: get_close_matches(name, missing, n=1, cutoff=ALIKE) for name in names if name not in settings}
    return {name: found[0] for name, found in sorted(alike.items()) if found}


def service_links(names: Mapping[str, str]) -> list[str]:
    """The settings that have no value because Kubernetes, or Docker, set their names for a service's address."""
    return [field.upper() for field in Settings.model_fields if _is_service_link(field, names.get(field.upper()))]


def _is_service_link(field: str, value: str | None) -> bool:
    """For a service `db`, Kubernetes sets DB_PORT=tcp://10.96.12.3:5432 in every container of its namespace."""
    return field.endswith("_port") and value is not None and _SERVICE_LINK.match(value) is not None


def _read(model: type[BaseModel], places: Sequence[Mapping[str, str]], unread: set[str]) -> dict[str, str]:
    """The variables of all places that are settings; the first place wins. `unread` are fields to skip.

    A URL that is given, or was read before, overrules its group in the same place and in further ones: the group is not
    read, because its names may be those of other programs. A group overrules a URL only in further places.
    """
    raw: dict[str, str] = {}
    unread = unread.union(*(group for url, group in ADDRESSES.items() if url in unread))
    for place in places:
        for url, group in ADDRESSES.items():
            if url not in unread and _is_given(url, place):
                unread.update(group)
            elif any(field not in unread and _is_given(field, place) for field in group):
                unread.add(url)
        raw = _collect(place, model, unread) | raw
    return raw


def _is_given(field: str, place: Mapping[str, str]) -> bool:
    value = place.get(field.upper())
    return bool(place.get(f"{field.upper()}_FILE") or (value and not _is_service_link(field, value)))


def _follow(raw: dict[str, str], given: str, other: str, *, more: bool) -> None:
    """If the value given for one setting lies beyond the default of the other, use it for the other too."""
    value, default = raw.get(given, ""), Settings.model_fields[other].default
    if _SHORT_NUMBER.fullmatch(value) and (int(value) > default) is more and int(value) != default:
        raw.setdefault(other, value)


def _validate(model: type[M], raw: Mapping[str, Any], flags: Collection[str] = ()) -> M:
    """`flags`: fields whose values are those of options."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InvalidSettings([_problem(dict(details), raw, model, flags) for details in error.errors()]) from None


def _collect(given: Mapping[str, str], model: type[BaseModel], unread: Collection[str]) -> dict[str, str]:
    """The variables that are settings. An empty one without a default counts as unset."""
    raw: dict[str, str] = {}
    for field, info in model.model_fields.items():
        if field in unread:
            continue
        name = field.upper()
        value, path = given.get(name), given.get(f"{name}_FILE")
        if _is_service_link(field, value):
            value = None
        if path:
            if value:
                raise InvalidSettings([SettingProblem(f"{name}_FILE", path, f"only one of {name} and {name}_FILE")])
            value = _read_file(f"{name}_FILE", path)
            if field not in PASSWORDS:  # a password may have quotes
                value = without_quotes(value)
            if value == "":
                raise InvalidSettings([SettingProblem(f"{name}_FILE", path, "a non-empty file")])
        if value is not None and (value != "" or info.default is not None):
            raw[field] = value
    return raw


def _read_file(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings([SettingProblem(name, path, f"a readable text file ({type(error).__name__})")]) from None


def _problem(
    details: dict[str, Any], raw: Mapping[str, Any], model: type[BaseModel], flags: Collection[str]
) -> SettingProblem:
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, ConflictingSettings):
        field, expected = cause.field, cause.expected
    else:
        message = str(details["msg"]).removeprefix("Value error, ")
        field, expected = str(details["loc"][0]), message.removeprefix("Input should be ")
    value = str(raw.get(field, model.model_fields[field].default or ""))
    name = f"--{field.replace('_', '-')}" if field in flags else field.upper()
    return SettingProblem(name, _show_wrong(field, value), expected)


def _show_wrong(field: str, value: str) -> str:
    """The value, or only its scheme and a mask if it may contain a secret.

    A URL in a setting that is not a secret may be a secret in the wrong place.
    """
    if field in SECRETS or "@" in value or "://" in value:
        scheme = _SCHEME.match(value)
        return f"{scheme[0]}{MASK}" if scheme else MASK
    return value[:64]
