"""A running worker answers as `/openapi.json` says."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from tests.support.openapi import DOCUMENT
from tests.support.world import CliWorker, World

# Without positive_data_acceptance: OpenAPI cannot say how parameters depend on each other.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)


async def test_every_answer_is_as_documented(world: World, start: Callable[..., CliWorker], tmp_path: Path) -> None:
    await world.view("vod_123", 3)
    now = datetime.now(UTC)
    await world.sql.execute("INSERT INTO bars_1m VALUES ('BTC/USD', $1, 1.5, 2, 'NaN', 1.25, 7, 0)", now)
    await world.sql.execute("INSERT INTO session_events VALUES ('session-1', 'e1', 1, 1, $1)", now)
    await world.sql.execute("INSERT INTO metrics VALUES ($1, 'checkout', 'cpu_usage', 0.5)", now)
    worker = start(world.environment, "run")
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    arguments = [
        *("run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--continue-on-failure"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--generation-deterministic"),
        *("--no-color", "--warnings", "off"),
    ]
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), *arguments),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    report = output.decode()
    assert process.returncode == 0, report
    # It does not request the document itself again.
    assert re.search(rf"Tested: {len(DOCUMENT['paths']) - 1}\b", report), report
