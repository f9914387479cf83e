"""`make docs` builds the site of the documentation: every page, a search, nothing from outside, no broken link."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"(?:https?:)?//")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    options = ["--quiet", "--fail-on-warning", "--conf-dir", str(ROOT / "docs")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(site)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert (built.returncode, built.stderr) == (0, "")
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 40
    assert [page for page in pages if not (site / page).with_suffix(".html").exists()] == []
    assert (site / "index.html").read_text() == (site / "README.html").read_text()


def test_search_finds_words_of_the_protocol(site: Path) -> None:
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").removesuffix(")"))
    page = index["docnames"].index("docs/protocol")
    assert page in index["terms"]["lineag"]  # a stem
    assert page in index["titleterms"]["marker"]


class Loaded(HTMLParser):
    """What a browser loads for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = ("src", "srcset", "data", "poster") if tag != "link" else ("href",)
        self.addresses += [value for name, value in attrs if name in names and value]


def test_site_loads_nothing_from_outside(site: Path) -> None:
    loaded = Loaded()
    for page in site.rglob("*.html"):
        loaded.feed(page.read_text())
    assert any(address.endswith("searchtools.js") or "searchtools.js?" in address for address in loaded.addresses)
    for sheet in site.rglob("*.css"):
        loaded.addresses += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", sheet.read_text())
    for script in site.rglob("*.js"):
        loaded.addresses += re.findall(r"(?:fetch|import)\(\s*[\"'`]([^\"'`]+)", script.read_text())
    assert [address for address in loaded.addresses if OUTSIDE.match(address)] == []


def test_broken_link_broken_anchor_and_page_without_a_place_fail_the_build(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A\n\n[b](missing.md) [c](docs/page.md#missing) [d](docs/page.md#here)\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("# B\n\n## Here\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    warnings = built.stderr
    assert "target not found: 'missing.md'" in warnings
    assert "'missing'" in warnings
    assert "'here'" not in warnings
    assert "page.md: WARNING: document isn't included in any toctree" in warnings
