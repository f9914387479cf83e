"""Errors of the Redis library are translated here and nowhere else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from worker.errors import RedisUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def redis_errors() -> Iterator[None]:
    """Raise RedisUnavailable for whatever keeps Redis from doing what is asked."""
    try:
        yield
    except (RedisError, OSError) as error:  # OSError includes TimeoutError
        raise RedisUnavailable(_describe(error)) from error


def _describe(error: BaseException) -> str:
    text = str(error).split("\n", 1)[0].strip()
    return text[:200] or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
