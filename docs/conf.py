"""The documentation's site: `make docs` builds it with Sphinx, and any warning is an error.

The pages stay what they are in the repository: plain Markdown, with relative links. Their folder is the repository,
so that README.md is the first page, and a link to a file outside docs/ copies that file into the site.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
NAVIGATION = """
```{toctree}
:hidden:
:caption: Tutorial
docs/tutorial
docs/records
```

```{toctree}
:hidden:
:glob:
:caption: How-to
docs/how-to/*
*/README
```

```{toctree}
:hidden:
:glob:
:caption: Reference
docs/reference/*
```

```{toctree}
:hidden:
:caption: Explanation
docs/protocol
docs/pipelines
docs/architecture
```

```{toctree}
:hidden:
:glob:
:caption: Project
*
docs/decisions/README
docs/seeds/*
```
"""
DECISIONS = """
```{toctree}
:glob:
0*
```
"""

project = "viewer-worker"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"viewer-worker {version}"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["*.md", "*/README.md", "docs/**.md"]
# PACKAGE.md is README.md for a package index. The others are folders that need not be searched.
exclude_patterns = ["PACKAGE.md", ".*", "build", "tests", "worker"]
myst_heading_anchors = 4
# JSON and HTTP in the pages have `…` in places, which no lexer knows.
suppress_warnings = ["misc.highlighting_failure"]
nitpicky = True
html_theme = "furo"
html_copy_source = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_index)


def _add_navigation(_: Sphinx, page: str, text: list[str]) -> None:
    text[0] += {root_doc: NAVIGATION, "docs/decisions/README": DECISIONS}.get(page, "")


def _add_index(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))
