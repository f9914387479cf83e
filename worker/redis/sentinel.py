"""Finds the master through Sentinels, and says in words why none of them led to it."""

from __future__ import annotations

from typing import Any

from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.sentinel import Sentinel

from worker.redis.errors import MasterNotFound, describe, redact

Master = tuple[str, int]
DOWN_FLAGS = ("is_sdown", "is_odown")


class AsyncSentinels(AsyncSentinel):
    """Asks each in turn. The one that answered is asked first from then on."""

    async def discover_master(self, service_name: str) -> Master:
        """Raises MasterNotFound."""
        search = _Search(service_name)
        for index, sentinel in enumerate(self.sentinels):
            try:
                found = search.read(sentinel, await sentinel.sentinel_masters())
            except (RedisError, OSError) as error:
                search.note(sentinel, error)
                continue
            if found is not None:
                self.sentinels[0], self.sentinels[index] = sentinel, self.sentinels[0]
                return found
        raise search.failure()


class Sentinels(Sentinel):
    """`AsyncSentinels`, but for threads."""

    def discover_master(self, service_name: str) -> Master:
        """Raises MasterNotFound."""
        search = _Search(service_name)
        for index, sentinel in enumerate(self.sentinels):
            try:
                found = search.read(sentinel, sentinel.sentinel_masters())
            except (RedisError, OSError) as error:
                search.note(sentinel, error)
                continue
            if found is not None:
                self.sentinels[0], self.sentinels[index] = sentinel, self.sentinels[0]
                return found
        raise search.failure()


class _Search:
    """What the Sentinels answered about one master."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._answers: list[str] = []
        self._login_refused = False

    def read(self, sentinel: Any, masters: Any) -> Master | None:
        """The master's address, unless this Sentinel does not know it or takes it to be down."""
        state = masters.get(self._name)
        if state is None:
            known = ", ".join(sorted(masters)) or "none"
            self._answers.append(f"{_place(sentinel)} knows no master {self._name!r}, but {known}")
        elif not state["is_master"] or any(state[flag] for flag in DOWN_FLAGS):
            self._answers.append(f"{_place(sentinel)} takes the master to be down")
        else:
            return state["ip"], state["port"]
        return None

    def note(self, sentinel: Any, error: Exception) -> None:
        redact(error)
        refused = isinstance(error, (AuthenticationError, NoPermissionError))
        self._login_refused |= refused
        self._answers.append(f"{_place(sentinel)} {'refuses the log-in: ' if refused else ''}{describe(error)}")

    def failure(self) -> MasterNotFound:
        return MasterNotFound(f"no Sentinel leads to the master: {'; '.join(self._answers)}", self._login_refused)


def _place(sentinel: Any) -> str:
    options = sentinel.connection_pool.connection_kwargs
    host, port = options["host"], options["port"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
