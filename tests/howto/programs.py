"""Snippets as programs: each written to a file, prepared once, and run with the tools that a reader would use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.howto.pages import Snippet
from tests.support.tools import NODE, install_node_packages, missing, tool
from tests.support.world import clean_environment

FOLDER = Path(__file__).parent
GO_PACKAGES = Path("/usr/share/gocode")
TIMEOUT_S = 30.0


class Programs:
    """Turns snippets into commands, in its own folder. Missing tools fail a test in CI and skip it elsewhere."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[Snippet, list[str]] = {}
        self._languages: dict[str, Callable[[Path], list[str]]] = {
            "go": self._go,
            "js": self._js,
            "php": self._php,
            "python": self._python,
            "sh": self._sh,
            "sql": self._sql,
        }

    def command(self, snippet: Snippet) -> list[str]:
        """The command that runs a snippet. Go is compiled once."""
        if snippet not in self._made:
            path = self._folder / f"{len(self._made)}-{snippet.title}"
            path.write_text(snippet.code)
            self._made[snippet] = self._languages[snippet.language](path)
        return self._made[snippet]

    def run(self, snippet: Snippet, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(snippet),
            cwd=self._folder,
            env=self.environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    @contextmanager
    def started(self, snippet: Snippet, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
        """Start a snippet with its output piped, and kill it at the end of the block."""
        program = subprocess.Popen(
            self.command(snippet),
            cwd=self._folder,
            env=self.environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield program
        finally:
            program.kill()
            program.wait()
            if program.stdout is not None:
                program.stdout.close()

    def environment(self, given: dict[str, str]) -> dict[str, str]:
        """Without TLS unless the environment sets it; `viewer-worker` is the one of this checkout."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {"PGSSLMODE": "disable"} | clean_environment() | {"PATH": path, "PYTHONUNBUFFERED": "1"} | given

    def _js(self, path: Path) -> list[str]:
        if not (self._folder / "node_modules" / ".package-lock.json").exists():
            install_node_packages(FOLDER, self._folder)
        return [str(NODE), str(path)]

    def _python(self, path: Path) -> list[str]:
        return [sys.executable, str(path)]

    def _go(self, path: Path) -> list[str]:
        go = tool("go", "golang-go")
        if not (GO_PACKAGES / "src" / "github.com").is_dir():
            missing("no Go packages: apt-get install golang-github-gomodule-redigo-dev golang-github-lib-pq-dev")
        binary = path.with_suffix("")
        environment = os.environ | {"GO111MODULE": "off", "GOPATH": str(GO_PACKAGES), "CGO_ENABLED": "0"}
        built = subprocess.run(
            [go, "build", "-o", binary, path], env=environment, capture_output=True, text=True, check=False
        )
        assert built.returncode == 0, built.stderr
        return [str(binary)]

    def _php(self, path: Path) -> list[str]:
        php = tool("php", "php-cli")
        modules = subprocess.run([php, "-m"], capture_output=True, text=True, check=True).stdout.split()
        if not {"redis", "pdo_pgsql"} <= set(modules):
            missing("PHP lacks an extension: apt-get install php-redis php-pgsql")
        return [php, str(path)]

    def _sh(self, path: Path) -> list[str]:
        tool("redis-cli", "redis-tools")
        tool("psql", "postgresql-client")
        tool("curl", "curl")
        if "jq " in path.read_text():
            tool("jq", "jq")
        return ["sh", "-eu", str(path)]

    def _sql(self, path: Path) -> list[str]:
        return ["sh", "-c", f'{tool("psql", "postgresql-client")} "$DATABASE_URL" -qAt -v ON_ERROR_STOP=1 -f {path}']
