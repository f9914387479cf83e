"""Translates the errors of the Redis library. No other module does."""

from __future__ import annotations

import os
import re
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hiredis import ReplyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, RedisError, ResponseError

from worker.errors import RedisUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

SENTINEL_LOGIN = "Check SENTINEL_USERNAME and SENTINEL_PASSWORD: the Sentinels have a login of their own."
SENTINEL_MASTER = "Check the Sentinels and the name of the master in REDIS_URL."
ECHO = ", with args beginning with"
LOGIN = "Check user and password in REDIS_URL."
RIGHT = "Give the user of REDIS_URL the right to run it; deploy/redis/users.acl has all that the worker needs."
MASTER = "Point REDIS_URL to the master, or use redis+sentinel://."
CLUSTER = "REDIS_URL leads to a Redis Cluster, which is not supported: use a single server, or Sentinels."
# How to fix what Redis replies, by the code of its error.
REFUSALS = {
    "NOAUTH": LOGIN,
    "WRONGPASS": LOGIN,
    "NOPERM": RIGHT,
    "READONLY": MASTER,
    "UNBLOCKED": MASTER,
    "MASTERDOWN": MASTER,
    "LOADING": "Wait: Redis is loading its data.",
    "OOM": "Redis has reached its maxmemory: raise it, or remove other data.",
    "MISCONF": "Redis cannot save its data and refuses writes: its log says why (often its disk is full).",
    "NOREPLICAS": "Redis refuses writes while it has too few replicas (min-replicas-to-write): check these.",
    "BUSY": "A script of another program blocks Redis: end it with SCRIPT KILL or FUNCTION KILL.",
    "WRONGTYPE": "A key of the worker holds another type: find the program that writes it, and delete or rename it.",
    "CLUSTERDOWN": CLUSTER,
    "CROSSSLOT": CLUSTER,
    "MOVED": CLUSTER,
    "ASK": CLUSTER,
    "ERR max number of clients reached": "Redis has reached its maxclients: raise it, or close other connections.",
    "ERR unknown command": "Redis lacks this command: use Redis 6.2 or newer, or Valkey, and do not rename commands.",
    "ERR DB index is out of range": "Redis has no such database: correct the number at the end of REDIS_URL.",
}
NOT_REDIS = "Check that REDIS_URL leads to Redis, and not to another service."
REFUSED = "Redis can be reached, and refuses: the message says why."
TLS = "Check the TLS options of REDIS_URL: ssl_ca_certs, ssl_certfile, ssl_keyfile, and whether the server speaks TLS."
# Also as the cause that EXECABORT, or a script on Redis 6, names.
_CODE = re.compile(rf"(?:^|: -?)({'|'.join(REFUSALS)})\b")
_ACL_IN_SCRIPT = "ACL failure in script"
# What the library says of a failure to connect, with the cause before or after the place.
_CONNECTING = re.compile(r"Error (?:(?P<errno>-?\d+)|(?P<first>.*))? ?connecting to \S+?\.(?: (?P<last>.*?)\.?)?")
_CONNECT_CALL = "Connect call failed"


class MasterNotFound(RedisConnectionError):
    """No Sentinel leads to the master. `login_refused`: at least one of them refused user or password."""

    def __init__(self, message: str, login_refused: bool) -> None:
        super().__init__(message)
        self.login_refused = login_refused


@contextmanager
def redis_errors(place: str = "") -> Iterator[None]:
    """Raise RedisUnavailable for any error that keeps Redis from doing what is asked. `place` comes before its text."""
    try:
        yield
    except (RedisError, OSError) as error:  # OSError includes TimeoutError
        redact(error)
        text = f"{place}: {_without_place(describe(error))}" if place else describe(error)
        raise RedisUnavailable(text, remedy_for(error)) from error


def remedy_for(error: BaseException) -> str | None:
    """How an operator can fix it; None: the usual, which is for a server that cannot be reached."""
    if isinstance(error, MasterNotFound):
        return SENTINEL_LOGIN if error.login_refused else SENTINEL_MASTER
    if isinstance(error, (ResponseError, ReplyError)) or getattr(error, "status_code", None):
        return _remedy_for_reply(text_of(error))
    if isinstance(error, InvalidResponse):
        return NOT_REDIS
    return TLS if _is_of_tls(error) else None


def _remedy_for_reply(text: str) -> str:
    if _ACL_IN_SCRIPT in text:
        return RIGHT
    code = _CODE.search(text)
    return REFUSED if code is None else REFUSALS[code[1]]


def text_of(error: BaseException) -> str:
    """The error with its code, which the library removes from the text of errors that it knows."""
    code = getattr(error, "status_code", None)
    return f"{code} {error}" if code else str(error)


def _without_place(text: str) -> str:
    match = _CONNECTING.fullmatch(text)
    if match is None:
        return text
    cause = (match["last"] or match["first"] or "cannot connect").strip()
    return os.strerror(int(match["errno"])) if match["errno"] and cause.startswith(_CONNECT_CALL) else cause


def _is_of_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """One line of at most 200 characters."""
    text = str(error).split("\n", 1)[0].strip()
    return text[:200] or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def redact(error: BaseException | None) -> None:
    """Remove from an error and its causes the arguments of a command that Redis repeats: AUTH's contain a password."""
    while error is not None:
        error.args = tuple(str(arg).partition(ECHO)[0] if ECHO in str(arg) else arg for arg in error.args)
        error = error.__cause__ or error.__context__
