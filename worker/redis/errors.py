"""Translates the errors of the Redis library. No other module does."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from worker.errors import RedisUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

SENTINEL_LOGIN = "Check SENTINEL_USERNAME and SENTINEL_PASSWORD: the Sentinels have a login of their own."
SENTINEL_MASTER = "Check the Sentinels and the name of the master in REDIS_URL."
ECHO = ", with args beginning with"


class MasterNotFound(RedisConnectionError):
    """No Sentinel leads to the master. `login_refused`: at least one of them refused user or password."""

    def __init__(self, message: str, login_refused: bool) -> None:
        super().__init__(message)
        self.login_refused = login_refused


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise RedisUnavailable for any error that keeps Redis from doing what is asked."""
    try:
        yield
    except (RedisError, OSError) as error:  # OSError includes TimeoutError
        redact(error)
        raise RedisUnavailable(describe(error), remedy_for(error)) from error


def remedy_for(error: BaseException) -> str | None:
    """How an operator can fix it; None: the usual."""
    if isinstance(error, MasterNotFound):
        return SENTINEL_LOGIN if error.login_refused else SENTINEL_MASTER
    if isinstance(error, NoPermissionError) or "ACL failure in script" in str(error):
        return "Give the user of REDIS_URL the right to run it; deploy/redis/users.acl has all that the worker needs."
    return "Check user and password in REDIS_URL." if isinstance(error, AuthenticationError) else None


def describe(error: BaseException) -> str:
    """One line of at most 200 characters."""
    text = str(error).split("\n", 1)[0].strip()
    return text[:200] or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def redact(error: BaseException | None) -> None:
    """Remove from an error and its causes the arguments of a command that Redis repeats: AUTH's contain a password."""
    while error is not None:
        error.args = tuple(str(arg).partition(ECHO)[0] if ECHO in str(arg) else arg for arg in error.args)
        error = error.__cause__ or error.__context__
