"""Shows the state of a stream, and sets its position by an operator's decision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from redis.exceptions import NoPermissionError, ResponseError

from worker.contract.entry_id import BEGINNING, MAX_PART, EntryId
from worker.errors import PositionNotSet, RedisUnavailable
from worker.pipelines.metrics import count_backlog
from worker.pipelines.sources.stream.evidence import Evidence
from worker.pipelines.sources.stream.judge import Hold, Subject, Wait, judge
from worker.pipelines.sources.stream.look import LOOK_TIMEOUT_S, RIGHTS_FIX, LooksDisagree, NotAllowed
from worker.pipelines.sources.stream.owner import find_owner
from worker.redis.errors import describe
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from worker.db.positions import Position, StreamPosition
    from worker.db.session import Database
    from worker.pipelines.sources.stream.look import Looker

SET = LuaScript.load(Path(__file__).with_name("set.lua"))
PAGE = 100
COUNTED = 100_000
_ID = re.compile(r"(\d{1,20})(?:-(\d{1,20}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class StreamState:
    """A stream as `viewer-worker streams` shows it. `backlog` is None where the stream cannot be seen.

    `problem` is why entries are not carried, empty where nothing is in the way; `remedy` what to do.
    """

    stream: str
    pipeline: str
    row: Position
    backlog: int | None
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a position that is not made yet. `entries` lie between, `more` if that is not all of them."""

    before: EntryId
    after: EntryId
    entries: int
    more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """One stream. Every method raises Unavailable."""

    database: Database
    position: StreamPosition
    looker: Looker
    pipeline: str

    async def look(self) -> StreamState:
        """Reads both sides and changes nothing."""
        async with self.database.transaction() as tx:
            row = await self.position.read(tx)
        stream, backlog = self.position.stream, None
        try:
            seen = await self.looker.peek(row)
        except NotAllowed as error:
            return StreamState(stream, self.pipeline, row, None, error.cause, error.remedy)
        except LooksDisagree:
            return StreamState(stream, self.pipeline, row, None, "the looks at the stream do not agree")
        if isinstance(seen.first, Evidence):
            backlog = count_backlog(row, seen.first)
            if self._is_new(row, seen.first):
                return StreamState(stream, self.pipeline, row, backlog)
        owner = await find_owner(self.database, self.position, row, seen)
        verdict = judge(row, seen.first, seen.ids, owner, Subject(stream, self.pipeline.upper()))
        if isinstance(verdict, Hold):
            return StreamState(stream, self.pipeline, row, backlog, f"on hold: {verdict.cause}", verdict.remedy)
        if isinstance(verdict, Wait):
            return StreamState(stream, self.pipeline, row, backlog, verdict.cause)
        return StreamState(stream, self.pipeline, row, backlog)

    @staticmethod
    def _is_new(row: Position, evidence: Evidence) -> bool:
        """The worker creates the mark at its first look."""
        return evidence.consumers == 0 and (evidence.first_entry is None or evidence.first_entry > row.last)

    async def preview(self, target: str) -> Change:
        """Where `target` (an id, `0`, `$`, `group:<name>`) is, and how many entries lie between.

        Raises PositionNotSet for a target that does not exist.
        """
        async with self.database.transaction() as tx:
            row = await self.position.read(tx)
        after = await self._find(target)
        end = await self._find("$")
        if after > end:
            raise PositionNotSet(f"{after} is beyond the end of the stream ({end}): use $ to continue at its end")
        low, high = min(row.last, after), max(row.last, after)
        entries = 0
        while entries < COUNTED and low < high:
            page = await self._ask("XRANGE", self.position.stream, f"({low}", str(high), "COUNT", PAGE)
            entries += len(page)
            if len(page) < PAGE:
                return Change(row.last, after, entries, more=False)
            low = EntryId.parse(page[-1][0])
        return Change(row.last, after, entries, more=low < high)

    async def set(self, change: Change) -> None:
        """Postgres first: a crash before Redis is changed leaves a hold, which loses nothing.

        Raises PositionNotSet when there is no stream.
        """
        if await self._ask("TYPE", self.position.stream) != b"stream":
            raise PositionNotSet(f"there is no stream {self.position.stream}")
        mark = uuid4().hex
        async with self.database.transaction() as tx:
            await self.position.ensure(tx)
            await self.position.set(tx, change.after, mark)
        done = await self._ask(
            *("EVAL", SET.flagged.source, 1, self.position.stream, self.looker.group, str(change.after), mark)
        )
        if done != b"set":
            raise PositionNotSet(f"there is no stream {self.position.stream} any more; it is on hold now")

    async def _find(self, target: str) -> EntryId:
        if target == "0":
            return BEGINNING
        if target == "$":
            return EntryId.parse(
                _by_name(await self._ask("XINFO", "STREAM", self.position.stream))[b"last-generated-id"]
            )
        if target.startswith("group:"):
            name = target.removeprefix("group:").encode()
            for group in await self._ask("XINFO", "GROUPS", self.position.stream):
                found = _by_name(group)
                if found[b"name"] == name:
                    return EntryId.parse(found[b"last-delivered-id"])
            raise PositionNotSet(f"the stream has no group {target.removeprefix('group:')}")
        match = _ID.fullmatch(target)
        found_id = EntryId(int(match[1]), int(match[2] or 0)) if match else None
        if found_id is None or not found_id.fits:
            raise PositionNotSet(f"expected the id of an entry (each part at most {MAX_PART}), 0, $ or group:<name>")
        return found_id

    async def _ask(self, *command: str | int) -> Any:
        (reply,) = await self.looker.connection.send([command], LOOK_TIMEOUT_S)
        if isinstance(reply, NoPermissionError):
            raise RedisUnavailable(f"{self.looker.connection.place}: {describe(reply)}", RIGHTS_FIX) from reply
        if isinstance(reply, ResponseError):
            raise PositionNotSet(f"{self.position.stream}: {describe(reply)}") from reply
        return reply


def _by_name(flat: list[Any] | dict[Any, Any]) -> dict[Any, Any]:
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
