"""Loads Lua scripts. Each is a file next to the code that uses it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ScriptText:
    source: str
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "digest", digest)


@dataclass(frozen=True, slots=True)
class LuaScript:
    """`flagged` begins with the shebang that Redis 7 understands, `plain` is the same script without it."""

    flagged: ScriptText
    plain: ScriptText

    @classmethod
    def load(cls, path: Path) -> LuaScript:
        source = path.read_text(encoding="utf-8")
        shebang, _, rest = source.partition("\n")
        if not shebang.startswith("#!lua"):
            raise ValueError(f"{path.name} must begin with #!lua flags=…")
        # An empty first line keeps the line numbers in error messages correct.
        return cls(ScriptText(source), ScriptText("\n" + rest))
