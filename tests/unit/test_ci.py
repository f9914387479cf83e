"""The workflow of a public forge runs what .ci/run runs, on the versions of Python that the project supports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".github" / "workflows" / "ci.yaml"
SCRIPT = (ROOT / ".ci" / "run").read_text()


def workflow() -> dict[str, Any]:
    # YAML 1.1 reads the key `on` as true.
    return {"on" if key is True else key: value for key, value in yaml.safe_load(FILE.read_text()).items()}


def test_workflow_follows_its_schema() -> None:
    command = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [command, "--builtin-schema", "vendor.github-workflows", FILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_runs_the_script_on_every_push_and_pull_request() -> None:
    found = workflow()
    assert set(found["on"]) == {"push", "pull_request"}
    assert found["permissions"] == {"contents": "read"}
    (job,) = found["jobs"].values()
    assert job["timeout-minutes"] <= 60
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1].endswith(".ci/run")
    # Nothing is repeated here that the script does: the two cannot come apart.
    assert not any(word in FILE.read_text() for word in ("make ", "apt-get", "pip install"))


def test_script_runs_the_two_commands_of_the_readme() -> None:
    chapter = (ROOT / "README.md").read_text().partition("\n## ")[0]
    shown = re.findall(r"^(make \w+)", chapter, re.MULTILINE)
    assert shown == ["make demo", "make test"]
    assert re.findall(r"^make \w+", SCRIPT, re.MULTILINE) == ["make lint", *shown]


def test_workflow_uses_the_oldest_and_the_newest_python_that_are_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    versions = [text.rpartition(" ")[2] for text in project["classifiers"] if "Python :: 3." in text]
    (job,) = workflow()["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == [oldest, versions[-1]]
