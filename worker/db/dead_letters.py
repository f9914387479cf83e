"""Dead letters: records that cannot become rows, kept with their original bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sqlalchemy import insert

from worker.db.tables import dead_letters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection


class LetterShape(Protocol):
    """What is written of a letter. `payload` is bytes; `error` a line without values."""

    @property
    def origin(self) -> str: ...
    @property
    def error_class(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def sqlstate(self) -> str | None: ...


async def write_letters(tx: AsyncConnection, pipeline: str, letters: Sequence[LetterShape]) -> None:
    """In the caller's transaction."""
    if letters:
        await tx.execute(
            insert(dead_letters),
            [
                {
                    "pipeline": pipeline,
                    "origin": letter.origin,
                    "error_class": letter.error_class,
                    "sqlstate": letter.sqlstate,
                    "error": letter.error,
                    "payload": letter.payload,
                }
                for letter in letters
            ],
        )
