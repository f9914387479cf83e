"""The documentation matches the code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from prometheus_client import Metric
from typer.main import get_command

from worker.cli import cli
from worker.db.address import parse_database_url
from worker.db.parameters import HONOURED
from worker.db.tables import metadata
from worker.observability.metrics import Metrics
from worker.pipelines.records import RECORD_TYPES
from worker.redis.address import SENTINEL_OPTIONS, TLS_OPTIONS
from worker.settings.environment import load_settings

DOCS = Path(__file__).parents[2] / "docs"
DEPLOY = DOCS.parent / "deploy"
EXAMPLES = [DOCS.parent / "examples" / folder / "README.md" for folder in (".", "python", "node")]


def test_reference_lists_every_metric() -> None:
    own = Metrics().registry
    exported = {full_name(metric) for metric in own.collect() if not metric.name.startswith(("process_", "python_"))}
    text = (DOCS / "reference" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `([a-z_]+)`", text, re.MULTILINE)) == exported


def full_name(metric: Metric) -> str:
    return metric.name + ("_total" if metric.type == "counter" else "")


def test_reference_lists_every_table_with_its_columns() -> None:
    text = (DOCS / "reference" / "tables.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\| (.*?) \|", text, re.MULTILINE))
    columns = {name: {column.name for column in table.columns} for name, table in metadata.tables.items()}
    columns |= {name: {column.name for column in record.columns} for name, record in RECORD_TYPES.items()}
    assert set(rows) == set(columns)
    for name, expected in columns.items():
        assert set(re.findall(r"`(\w+)`", rows[name])) == expected, name


def test_links_between_documents_point_to_files_that_exist() -> None:
    root = DOCS.parent
    names = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "deploy/README.md")
    for document in [*(root / name for name in names), *EXAMPLES, *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} → {target}"


FRONT = [DOCS.parent / name for name in ("README.md", "PACKAGE.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCUMENTS = [*FRONT, *EXAMPLES, *DOCS.rglob("*.md"), *DEPLOY.rglob("*")]


def code_in(document: Path) -> str:
    """The code in a document: code blocks and inline code of Markdown, all text of other files."""
    text = document.read_text()
    if document.suffix != ".md":
        return text
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def test_every_command_and_option_in_the_documents_exists() -> None:
    commands = get_command(cli).commands  # type: ignore[attr-defined]
    named = 0
    for document in filter(Path.is_file, DOCUMENTS):
        for name, rest in re.findall(r"\bviewer-worker ([a-z-]+)((?: +[^\s`|#]+)*)", code_in(document)):
            if name not in commands:
                assert not re.match(r"(run|migrate|dev)", name), f"{document.name}: {name}"
                continue
            options = {option for parameter in commands[name].params for option in parameter.opts}
            for option in re.findall(r"(?<= )--[a-z-]+", rest):
                assert option in options | {"--help"}, f"{document.name}: viewer-worker {name} {option}"
            named += 1
    assert named > 30
    assert set(commands) <= {*re.findall(r"viewer-worker ([a-z-]+)", (DOCS.parent / "README.md").read_text())}


def test_every_test_in_the_documents_exists() -> None:
    root = DOCS.parent
    named = 0
    for document in (path for path in DOCUMENTS if path.suffix == ".md"):
        for path, name in re.findall(r"`(tests/[\w/.-]+\.py)::(\w+)", document.read_text()):
            assert re.search(rf"^ *(async )?def {name}\(", (root / path).read_text(), re.MULTILINE), (
                f"{document.name}: {name}"
            )
            named += 1
    assert named > 20


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (DOCS.parent / "Makefile").read_text(), re.MULTILINE))
    for document in (path for path in DOCUMENTS if path.suffix == ".md"):
        named = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", code_in(document), re.MULTILINE))
        assert {first or second for first, second in named} <= targets, document.name


def test_documents_name_the_packaged_version_and_its_extras() -> None:
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = 0
    for document in filter(Path.is_file, DOCUMENTS):
        text = document.read_text()
        for version in re.findall(r"viewer[-_]worker[-:](\d+\.\d+\.\d+)", text):
            assert version == project["version"], document
        for listed in re.findall(r"viewer-worker\[([a-z,]+)\]", text):
            assert set(listed.split(",")) <= extras, document
            named += 1
    assert named > 3
    releases = re.findall(
        r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", (DOCS.parent / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert releases[0] == project["version"]


PROVIDERS = {
    "Neon",
    "Supabase",
    "Amazon RDS and Aurora",
    "Cloud SQL",
    "Azure",
    "Amazon ElastiCache",
    "Upstash",
    "Heroku",
}
MANAGED = DOCS / "how-to" / "managed-services.md"


def test_every_url_of_a_provider_is_accepted_as_it_is() -> None:
    titles_and_texts = re.split(r"^## (.+)$", MANAGED.read_text(), flags=re.MULTILINE)[1:]
    sections = dict(zip(titles_and_texts[::2], titles_and_texts[1::2], strict=True))
    assert set(sections) > PROVIDERS
    for title, text in sections.items():
        found = re.findall(r"^(DATABASE_URL|REDIS_URL)='(.+)'$", text, re.MULTILINE)
        assert found, title
        for name, url in found:
            settings = load_settings(environ={name: url})
            assert "secret" not in settings.redacted()[name], url
            if name == "DATABASE_URL":
                assert settings.database.ignored == (), url
                assert not settings.database.session, url
            else:
                assert settings.redis.tls, url


def test_parameters_that_the_page_calls_ignored_or_mapped_are() -> None:
    tails = {
        "sslmode=require&channel_binding=require": ("channel_binding",),
        "pgbouncer=true&connection_limit=1": ("connection_limit",),
        "supa=base-pooler.x": ("supa",),
    }
    text = MANAGED.read_text()
    for tail, ignored in tails.items():
        assert f"{tail}`" in text
        assert parse_database_url(f"postgresql://u:p@h/db?{tail}").ignored == ignored


def test_reference_names_the_parameters_that_have_an_effect() -> None:
    text = (DOCS / "reference" / "settings.md").read_text()
    named = set(re.findall(r"`([\w-]+)", text.partition("## DATABASE_URL")[2].partition("## REDIS_URL")[0]))
    assert named >= HONOURED
    assert {*TLS_OPTIONS, *SENTINEL_OPTIONS} <= set(re.findall(r"`(\w+)`", text.partition("## REDIS_URL")[2]))
