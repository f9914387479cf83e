"""`viewer-worker publish`, as users type it, on real servers."""

from __future__ import annotations

import asyncio
import gzip
import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.proxy import Proxy
from tests.support.tools import missing
from tests.support.world import World, clean_environment
from worker.dev.servers import free_port

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "tests" / "data" / "access.log"
VIEWED = {"/watch/vod_1": 3, "/watch/vod_2": 2, "/with space/and%20escape": 1, "/old": 1, "/": 1}
LINE = '203.0.113.7 - - [17/May/2015:10:05:03 +0000] "GET {} HTTP/1.1" 200 1 "-" "-"\n'


async def publish(*arguments: str, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "worker", "publish", *arguments],
        env=clean_environment() | environment,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
async def proxied(world: World) -> AsyncIterator[tuple[World, Proxy, dict[str, str]]]:
    """A world, a proxy to its Redis, and the environment of a command that goes through it."""
    async with Proxy(world.redis_url) as proxy:
        yield world, proxy, world.environment | {"REDIS_URL": proxy.url}


async def test_one_view_is_counted_and_announced(world: World) -> None:
    async with world.redis.pubsub(ignore_subscribe_messages=True) as subscription:
        await subscription.subscribe(f"{world.prefix}channel")
        await subscription.get_message(ignore_subscribe_messages=False, timeout=5)
        environment = world.environment | {"VIEW_CHANNEL": f"{world.prefix}channel"}
        done = await publish("vod_1", "--count", "3", **environment)
        assert (done.returncode, done.stdout) == (0, "published 3 views of vod_1\n")
        message = await subscription.get_message(timeout=5)
    assert message is not None
    assert message["data"] == b'{"vodId":"vod_1","count":3}'
    assert await world.pending() == {"vod_1": 3}


@pytest.mark.parametrize("source", ["file", "stdin"])
async def test_log_is_published_and_summarised(world: World, source: str) -> None:
    if source == "file":
        done = await publish("--from-log", str(SAMPLE), **world.environment)
    else:
        done = await publish("--from-log", "-", stdin=SAMPLE.read_bytes(), **world.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert await world.pending() == VIEWED
    summary, *malformed = done.stdout.splitlines()[3:]
    assert re.findall(r"(\w+) +([\d,]+)\n", done.stdout) == [
        ("lines", "15"),
        ("views", "8"),
        ("ids", "5"),
        ("malformed", "7"),
    ]
    assert summary.split() == ["malformed", "7"]
    assert [line.split(":")[0] for line in malformed] == [f"  line {number}" for number in (7, 8, 9, 10, 11)]


async def test_terminal_gets_a_progress_bar(world: World) -> None:
    terminal, its_other_end = pty.openpty()
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "worker", "publish", "--from-log", str(SAMPLE)],
        env=clean_environment() | world.environment | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.DEVNULL,
        stderr=its_other_end,
        check=False,
        timeout=60,
    )
    os.close(its_other_end)
    assert done.returncode == 0
    assert b"100%" in os.read(terminal, 65536)
    os.close(terminal)


async def test_uncertain_lines_are_reported_even_if_stdout_is_full(
    proxied: tuple[World, Proxy, dict[str, str]], tmp_path: Path
) -> None:
    _, proxy, environment = proxied
    log = tmp_path / "access.log"
    log.write_text("".join(LINE.format(f"/{number}") for number in range(500)))
    proxy.reset_at(b"*1000\r\n")
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-c", 'exec "$@" > /dev/full', "sh", sys.executable, "-m", "worker", "publish", "--from-log", str(log)],
        env=clean_environment() | environment,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"lines 1 to 500 may or may not be counted" in done.stderr
    assert b"stopped before" not in done.stderr


async def test_log_without_a_request_is_a_failure(world: World, tmp_path: Path) -> None:
    log = tmp_path / "access.log.gz"
    log.write_bytes(gzip.compress(SAMPLE.read_bytes()))
    done = await publish("--from-log", str(log), **world.environment)
    assert done.returncode == 1
    assert "not compressed" in done.stderr
    done = await publish("--from-log", str(SAMPLE), "--from-line", "1000", **world.environment)
    assert done.returncode == 1
    assert "the log has no line 1000" in done.stderr


async def test_publish_stops_at_an_uncertain_batch_and_can_continue_after_it(
    proxied: tuple[World, Proxy, dict[str, str]], tmp_path: Path
) -> None:
    world, proxy, environment = proxied
    log = tmp_path / "access.log"
    paths = ["/popular"] * 500 + [f"/{number}" for number in range(501, 1201)]
    log.write_text("".join(map(LINE.format, paths)))
    proxy.reset_at(b"*1000\r\n")  # EXEC of the second batch: 500 ids, two commands each
    done = await publish("--from-log", str(log), **environment)
    assert done.returncode == 1
    assert "lines 501 to 1000 may or may not be counted: " in done.stderr
    assert "continue with --from-line 1001; to repeat it, --from-line 501." in done.stderr
    assert re.search(r"views +500\n", done.stdout)
    assert await world.pending() == Counter(paths[:1000])

    done = await publish("--from-log", str(log), "--from-line", "1001", **environment)
    assert done.returncode == 0
    assert await world.pending() == Counter(paths)


@pytest.mark.parametrize("arguments", [("vod_1",), ("--from-log", str(SAMPLE))])
async def test_unreachable_redis_exits_with_69_and_no_secret_is_shown(arguments: tuple[str, ...]) -> None:
    done = await publish(*arguments, REDIS_URL=f"redis://:hunter2@127.0.0.1:{free_port()}")
    assert done.returncode == 69
    assert "Check that Redis runs" in done.stderr
    assert ("Continue with --from-line 1." in done.stderr) is ("--from-log" in arguments)
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("vod_1", "--from-log", str(SAMPLE)),
        ("vod_1", "--count", "0"),
        ("x" * 257,),
        ("--from-log", "/nowhere/access.log"),
        ("--from-log", "/"),
        ("--from-log", str(SAMPLE), "--from-line", "0"),
    ],
)
async def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert (await publish(*arguments)).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_publish_reports_where_it_stopped(world: World, number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", "publish", "--from-log", "-"),
        env=clean_environment() | world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write("".join(LINE.format("/a") for _ in range(700)).encode())
    await process.stdin.drain()
    while not await world.pending():
        assert process.returncode is None
        await asyncio.sleep(0.02)
    process.send_signal(number)
    _, printed = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 128 + number
    assert b"stopped before line 501: interrupted\nContinue with --from-line 501." in printed
    assert await world.pending() == {"/a": 500}


def real_log() -> Path:
    """An access log of a real server with 10,000 requests. It is not part of the project."""
    log = Path(os.environ.get("ACCESS_LOG") or ROOT.parent / "shared" / "data" / "access.log")
    if not log.is_file():
        missing(f"no access log at {log}; ACCESS_LOG names one")
    return log


async def test_every_request_of_a_real_log_reaches_postgres(world: World) -> None:
    log = real_log()
    viewed: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        quoted = line.split('"')
        if len(quoted) >= 7:
            viewed[quoted[1].split(" ")[1].split("?")[0]] += 1
    assert viewed.total() == 9999
    (long,) = (path for path in viewed if len(path) > 256)

    done = await publish("--from-log", str(log), **world.environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"lines +10,000\nviews +9,999\n", done.stdout)
    assert re.search(r"malformed +1\n  line 8899: the user agent is missing or not complete: ", done.stdout)
    once = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "worker", "run", "--once"],
        env=clean_environment() | world.environment,
        check=True,
        capture_output=True,
    )
    assert once.stdout.decode() == f"flushed 9999 views of {len(viewed)} ids\n"

    totals = await world.totals()
    (shortened,) = totals.keys() - viewed.keys()
    assert len(shortened.encode()) <= 256
    assert long.startswith(shortened.rpartition("~")[0])
    viewed[shortened] = viewed.pop(long)
    assert totals == viewed
    world.truth = viewed
    await world.assert_exact()
