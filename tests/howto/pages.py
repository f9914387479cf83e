"""The code blocks of the how-to pages. A block is named by the title in its info string: ```js title="count.mjs"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
BLOCK = re.compile(r"^```(?P<info>.*)\n(?P<code>(?:.*\n)*?)```$", re.MULTILINE)
INFO = re.compile(r'(?P<language>\w+) title="(?P<title>[\w.-]+)"')


@dataclass(frozen=True, slots=True)
class Snippet:
    """One block: `language` is the name that GitHub uses, `title` the name of its file."""

    title: str
    language: str
    code: str


def snippets(page: str) -> dict[str, Snippet]:
    """All blocks of a page by title, in the page's order. Raises ValueError for a missing or repeated title."""
    found: dict[str, Snippet] = {}
    for block in BLOCK.finditer((HOW_TO / f"{page}.md").read_text()):
        info = INFO.fullmatch(block["info"])
        if info is None or info["title"] in found:
            raise ValueError(f"{page}.md: a block needs a unique title, not ```{block['info']}")
        found[info["title"]] = Snippet(info["title"], info["language"], block["code"])
    return found


def joined(*parts: Snippet, then: str = "") -> Snippet:
    """Shell blocks, one after the other in one shell as a reader types them, and then a command of the test."""
    return Snippet("joined.sh", "sh", "".join(part.code for part in parts) + then)
