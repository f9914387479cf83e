"""Looks at a stream: evidence, entries, evidence again, in one round trip on one connection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from worker.errors import RedisUnavailable
from worker.pipelines.sources.stream.entries import Entry, parse_entries
from worker.pipelines.sources.stream.evidence import Evidence, NoStream, parse_evidence
from worker.redis.errors import MASTER, describe, remedy_for
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.db.positions import Position
    from worker.redis.stream import Command, StreamConnection

LOOK = LuaScript.load(Path(__file__).with_name("look.lua"))
LOOK_TIMEOUT_S = 4.0
MAX_DISAGREEMENTS = 10
PEEK_COUNT = 20
RIGHTS_FIX = "Give the user of REDIS_URL the rights in deploy/redis/users.acl."


class NotAllowed(Exception):
    """A right is missing, or the server is too old: no look can be taken until that is changed."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy


class LooksDisagree(Exception):
    """The looks before and after the entries do not agree, several times in a row."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Two looks that agree, and the entries between them, at most `count`. `opened` names the connection."""

    first: Evidence | NoStream
    second: Evidence | NoStream
    entries: list[Entry]
    count: int
    opened: int

    @property
    def ids(self) -> list[EntryId]:
        return [entry_id for entry_id, _ in self.entries]


@dataclass(frozen=True, slots=True, kw_only=True)
class Looker:
    """Looks at one stream. `keep_ms`: how long carried entries are kept; None: they are never trimmed."""

    connection: StreamConnection
    stream: str
    group: str
    keep_ms: int | None = None

    async def look(self, row: Position, after: EntryId, count: int, new_mark: str) -> Seen:
        """At most `count` entries after `after`. `row` is committed: it is mirrored into the group.

        Raises RedisUnavailable, NotAllowed, LooksDisagree.
        """
        for _ in range(MAX_DISAGREEMENTS):
            seen = await self._look(row, after, count, new_mark)
            if seen is not None:
                return seen
        raise LooksDisagree

    async def peek(self, row: Position) -> Seen:
        """As `look`, after the position, without writing anything. Raises as `look`."""
        for _ in range(MAX_DISAGREEMENTS):
            seen = await self._look(row, row.last, PEEK_COUNT, "", look_only=True)
            if seen is not None:
                return seen
        raise LooksDisagree

    async def _look(
        self, row: Position, after: EntryId, count: int, new_mark: str, *, look_only: bool = False
    ) -> Seen | None:
        commands: list[Command] = [
            self._script(row, after, new_mark, look_only=look_only),
            ("XRANGE", self.stream, f"({after}", "+", "COUNT", count),
            self._script(row, after, new_mark, look_only=True),
        ]
        first, entries, second = await self.connection.send(commands, LOOK_TIMEOUT_S)
        if isinstance(first, NoScriptError) or isinstance(second, NoScriptError):
            await self._load()
            return None
        for reply in (first, second):
            if isinstance(reply, ResponseError):
                await self._refuse(reply)
        seen = Seen(await self._evidence(first), await self._evidence(second), [], count, self.connection.opened)
        if not isinstance(seen.first, Evidence):
            return seen
        if isinstance(entries, ResponseError):
            await self._refuse(entries)
        found = parse_entries(entries)
        if not isinstance(seen.second, Evidence) or not seen.second.confirms(seen.first):
            return None
        return replace(seen, entries=found) if _is_complete(seen.first, found, count) else None

    def _script(self, row: Position, after: EntryId, new_mark: str, *, look_only: bool) -> Command:
        return (
            *("EVALSHA", LOOK.flagged.digest, 1, self.stream, self.group, "1" if look_only else "0"),
            *(str(after), str(row.last), row.incarnation or ""),
            "" if row.entries_read is None else row.entries_read,
            new_mark,
            "" if self.keep_ms is None else self.keep_ms,
        )

    async def _evidence(self, reply: Any) -> Evidence | NoStream:
        role, evidence = parse_evidence(reply)
        if role != "master":
            await self.connection.drop()
            raise RedisUnavailable(f"{self.connection.place}: its role is {role}", MASTER)
        return evidence

    async def _load(self) -> None:
        (reply,) = await self.connection.send([("SCRIPT", "LOAD", LOOK.flagged.source)], LOOK_TIMEOUT_S)
        if isinstance(reply, ResponseError):
            if "ompiling script" in str(reply):
                raise NotAllowed("the server is too old for streams", "Use Redis 7.0 or newer, or Valkey.")
            await self._refuse(reply)

    async def _refuse(self, error: ResponseError) -> None:
        """What the server says is no evidence. On another connection the right server may answer."""
        await self.connection.drop()
        if isinstance(error, NoPermissionError) or "ACL failure in script" in str(error):
            raise NotAllowed(describe(error), RIGHTS_FIX)
        raise RedisUnavailable(f"{self.connection.place}: {describe(error)}", remedy_for(error)) from error


def _is_complete(evidence: Evidence, entries: list[Entry], count: int) -> bool:
    """Whether XRANGE returned what the evidence says is there: a proxy may have asked a replica."""
    if evidence.next_entry is None:
        # Entries that were added since the first look are left for the next one.
        return True
    if not entries or entries[0][0] != evidence.next_entry:
        return False
    return len(entries) == count or (evidence.last_entry is not None and entries[-1][0] >= evidence.last_entry)
