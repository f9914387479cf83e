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
    """One block: `language` as GitHub knows it, `title` as the name of its file."""

    title: str
    language: str
    code: str


def snippets(page: str) -> dict[str, Snippet]:
    """All blocks of a page by title, in the page's order. Raises ValueError for a block that has none, or another's."""
    found: dict[str, Snippet] = {}
    for block in BLOCK.finditer((HOW_TO / f"{page}.md").read_text()):
        info = INFO.fullmatch(block["info"])
        if info is None or info["title"] in found:
            raise ValueError(f"{page}.md: a block needs a title of its own, not ```{block['info']}")
        found[info["title"]] = Snippet(info["title"], info["language"], block["code"])
    return found


def joined(*parts: Snippet, then: str = "") -> Snippet:
    """Shell blocks as a reader types them: one after the other in one shell, and then a command of the test's."""
    return Snippet("joined.sh", "sh", "".join(part.code for part in parts) + then)
