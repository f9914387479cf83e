"""The commands other than `run`, as users type them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.forked import run_forked
from tests.support.guarded import on_guarded_servers, on_open_and_guarded_servers
from tests.support.world import CliWorker, World, clean_environment
from worker.contract.keys import Keys
from worker.dev.servers import ValkeyServer, free_port
from worker.redis.errors import MASTER

Start = Callable[..., CliWorker]
ROOT = Path(__file__).parents[2]


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_forked(*arguments, environment=clean_environment() | environment)


async def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(cli, *arguments, **environment)


def test_help_lists_the_commands_and_version_is_printed() -> None:
    shown = cli("--help").stdout
    for command in (
        "run",
        "migrate",
        "check",
        "adopt",
        "top",
        "import",
        "forget",
        "publish",
        "config",
        "healthcheck",
        "dev",
    ):
        assert f" {command} " in shown
    assert cli("--version").stdout == "viewer-worker 0.1.0\n"


HEAVY = ("sqlalchemy", "redis", "aiohttp", "pydantic", "alembic", "prometheus_client", "structlog")
COMPLETION = "_VIEWER_WORKER_COMPLETE"


def test_help_loads_nothing_heavy() -> None:
    probe = f"import sys, worker.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_completion_loads_nothing_heavy() -> None:
    """Typer itself loads pydantic, to read what was typed so far."""
    probe = (
        "import atexit, sys; from worker.cli import main; sys.argv = ['viewer-worker'];"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules])); main()"
    )
    typed = {COMPLETION: "complete_bash", "COMP_WORDS": "viewer-worker streams --j", "COMP_CWORD": "2"}
    environment = clean_environment() | typed
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout in ("--json\n[]\n", "--json\n['pydantic']\n")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("str", ["streams"]),
        ("dead-letters ", ["list", "show", "replay", "purge"]),
        ("streams --", ["--set", "--yes", "--json", "--env-file", "--log-level", "--help"]),
    ],
)
def test_bash_completes_commands_and_options(typed: str, expected: list[str]) -> None:
    """Bash loads the script, and calls its function as after Tab."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = typed.split(" ")
    completed = f"""
        eval "$({COMPLETION}=source_bash viewer-worker)"
        COMP_WORDS=(viewer-worker {" ".join(words[:-1])} "{words[-1]}") COMP_CWORD={len(words)}
        function=$(complete -p viewer-worker); function=${{function##*-F }}; ${{function%% *}} viewer-worker
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-euc", completed],
        env=clean_environment() | {"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected


def test_config_prints_effective_values_without_secrets() -> None:
    done = cli("config", DATABASE_URL="postgres://me:hunter2@db/app", BATCH_SIZE="7", VIEW_TOTALS_CHANNEL="views")
    assert done.returncode == 0
    assert "DATABASE_URL=postgres://me:***@db/app\n" in done.stdout
    assert "BATCH_SIZE=7\n" in done.stdout
    assert "VIEW_TOTALS_CHANNEL=views\n" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


def test_misspelled_setting_is_reported_without_its_value(tmp_path: Path) -> None:
    env_file = tmp_path / "worker.env"
    env_file.write_text("BATCH_INTERVAL=hunter2\n")
    done = cli(
        "config", "--env-file", str(env_file), REDIS_URI="redis://:hunter2@redis", DB_USERNAME="of-another-program"
    )
    assert done.returncode == 0
    warnings = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["name"]: line["did_you_mean"] for line in warnings} == {
        "BATCH_INTERVAL": "BATCH_INTERVAL_MS",
        "REDIS_URI": "REDIS_URL",
    }
    assert "hunter2" not in done.stdout + done.stderr
    assert not cli("config", REDIS_URI="redis://redis", REDIS_URL="redis://redis").stderr


@pytest.mark.parametrize("command", ["run", "migrate", "config", "healthcheck"])
def test_wrong_setting_ends_every_command_with_78(command: str) -> None:
    done = cli(command, BATCH_SIZE="many", DATABASE_URL="nosql://me:hunter2@db")
    assert done.returncode == 78
    assert "BATCH_SIZE='many': expected" in done.stderr
    assert "DATABASE_URL='nosql://***': expected" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("run --twice", ["--twice"]),
        ("dev --for soon", ["--for"]),
        ("top --window soon", ["--window"]),
        ("top --limit 0", ["--limit"]),
        ("history a --window soon", ["--window"]),
        ("history a --bucket minute", ["--bucket"]),
        (f"history {'x' * 257}", ["ID"]),
        (f"forget {'x' * 257}", ["ID"]),
        (f"publish {'x' * 257}", ["ID"]),
        ("publish", ["ID", "--from-log"]),
        ("publish a --from-log b", ["ID", "--from-log"]),
        ("publish --from-log /nowhere.log", ["--from-log"]),
        ("import", ["--from-target"]),
        ("adopt --count-pending --discard-pending", ["--count-pending", "--discard-pending"]),
        ("adopt --discard-pending --json", ["--json", "--yes"]),
        ("dead-letters list --older-than soon", ["--older-than"]),
        ("dead-letters replay --pipeline none", ["--pipeline"]),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_option(arguments: str, names: list[str]) -> None:
    done = cli(*arguments.split())
    assert done.returncode == 2
    for name in names:
        assert name in done.stderr.partition("Error")[2]


def test_wrong_setting_of_an_option_names_the_option() -> None:
    done = cli("config", "--log-level", "loud")
    assert done.returncode == 78
    assert "--log-level='loud': expected 'debug'" in done.stderr


def test_short_option_for_help_works_for_every_command() -> None:
    for command in ("", "run", "dead-letters", "dead-letters list"):
        done = cli(*command.split(), "-h")
        assert (done.returncode, "Usage: " in done.stdout) == (0, True)


def test_help_of_run_says_where_settings_come_from() -> None:
    shown = cli("run", "--help").stdout
    for word in ("environment variables", ".env", "--env-file", "NAME_FILE", "viewer-worker config"):
        assert word in shown


def test_missing_env_file_is_reported() -> None:
    done = cli("config", "--env-file", "/nowhere/worker.env")
    assert done.returncode == 78
    assert "/nowhere/worker.env" in done.stderr


@pytest.mark.parametrize("arguments", [("migrate",), ("migrate", "--status"), ("run", "--once")])
def test_command_without_its_servers_exits_with_69(arguments: tuple[str, ...]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    done = cli(*arguments, DATABASE_URL=f"postgresql://me:hunter2@{nowhere}/x", REDIS_URL=f"redis://:hunter2@{nowhere}")
    assert done.returncode == 69
    assert "DATABASE_URL" in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


async def test_migrate_creates_the_tables_and_status_reports_it(empty_database_url: str) -> None:
    status = await run_cli("migrate", "--status", DATABASE_URL=empty_database_url)
    assert status.returncode == 1
    assert "no tables" in status.stdout
    assert "Run: viewer-worker migrate" in status.stderr
    done = await run_cli("migrate", DATABASE_URL=empty_database_url)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "migrated to 0011")
    again = await run_cli("migrate", DATABASE_URL=empty_database_url)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "nothing to do")
    assert (await run_cli("migrate", "--status", DATABASE_URL=empty_database_url)).returncode == 0


@on_open_and_guarded_servers
async def test_run_once_prints_what_it_flushed(world: World) -> None:
    await world.view("a", 3)
    await world.view("b")
    done = await run_cli("run", "--once", **world.environment)
    assert (done.returncode, done.stdout) == (0, "flushed 4 views of 2 ids\n")
    await world.assert_exact()


async def test_run_once_fails_when_the_table_refuses_every_id(world: World) -> None:
    await world.sql.execute("ALTER TABLE view_counts ADD tenant text NOT NULL")
    await world.view("a")
    done = await run_cli("run", "--once", **world.environment)
    assert done.returncode == 1
    assert 'null value in column "tenant" of relation "view_counts"' in done.stderr


async def test_run_once_without_tables_names_the_fix(redis_url: str, empty_database_url: str) -> None:
    done = await run_cli("run", "--once", REDIS_URL=redis_url, DATABASE_URL=empty_database_url)
    assert done.returncode == 1
    assert "Run: viewer-worker migrate" in done.stderr


async def test_healthcheck_asks_the_running_worker(world: World, start: Start) -> None:
    port = str(free_port())
    assert (await run_cli("healthcheck", HEALTH_CHECK_PORT=port)).returncode == 1
    worker = start(world.environment | {"HEALTH_CHECK_PORT": port}, "run")
    await worker.wait_for_log('"started"')
    done = await run_cli("healthcheck", HEALTH_CHECK_PORT=port)
    assert done.returncode == 0
    assert "alive" in done.stdout


def test_healthcheck_asks_the_usual_port_where_kubernetes_sets_the_variable() -> None:
    done = cli("healthcheck", HEALTH_CHECK_PORT="tcp://10.96.12.5:80", HEALTH_CHECK_HOST="127.0.0.2")
    assert done.returncode in (0, 1)  # a worker may be running there
    assert "127.0.0.2:3003" in done.stderr or "alive" in done.stdout


def test_dev_reports_an_exact_result_after_a_kill(tmp_path: Path) -> None:
    done = cli("dev", "--for", "4s", "--rate", "500", "--data", str(tmp_path / "dev"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill -9" in done.stdout
    assert "EXACT: INCRed views (900 ids compared), stream entries and gRPC calls; worker killed once." in done.stdout
    assert len(re.findall(r"\d missed, none (counted|stored) twice$", done.stdout, re.MULTILINE)) == 2
    ids = dict(re.findall(r"^  (INCR and PUBLISH|INCR only|PUBLISH only) +(\d+)", done.stdout, re.MULTILINE))
    assert ids == {"INCR and PUBLISH": "600", "INCR only": "300", "PUBLISH only": "100"}


def test_dev_redraws_its_line_on_a_terminal(tmp_path: Path) -> None:
    ours, its = os.openpty()
    command = [sys.executable, "-m", "worker", "dev", "--for", "2s", "--rate", "100", "--data", str(tmp_path / "dev")]
    process = subprocess.Popen(command, env=clean_environment(), stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0, shown
    assert shown.count(b"\r\x1b[2Ksent ") > 1


def test_dev_replays_an_access_log(tmp_path: Path) -> None:
    log = ROOT / "tests" / "data" / "access.log"
    done = cli("dev", "--for", "3s", "--rate", "200", "--data", str(tmp_path / "dev"), "--traffic", str(log))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "EXACT" in done.stdout
    missing = cli("dev", "--for", "1s", "--data", str(tmp_path / "dev"), "--traffic", "/nowhere.log")
    assert missing.returncode == 1
    assert "/nowhere.log cannot be read" in missing.stderr


def test_wheel_contains_the_migrations(tmp_path: Path) -> None:
    """Installed from the wheel into another folder, `migrate` finds its scripts without the checkout."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    probe = (
        "import worker, worker.db.schema as s; print(worker.__file__); print(s._scripts().get_current_head());"
        "import worker.counters.flush.settle"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=clean_environment() | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "worker" / "__init__.py"), "0011"]


def test_links_work_on_a_package_index_and_in_the_source_distribution(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (packed,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / packed.name.removesuffix(".tar.gz")
    _, _, shown = (root / "PKG-INFO").read_text().partition("\n\n")
    assert shown.startswith("# viewer-worker")
    assert re.findall(r"\]\((?!https://)", shown) == [], "an index has none of our files"
    documents = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), root / "deploy" / "README.md"]
    assert len(documents) > 30
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(root)} → {target}"


@on_open_and_guarded_servers
async def test_check_passes_when_everything_is_in_order(world: World) -> None:
    await world.view("a", 3)
    assert (await run_cli("run", "--once", **world.environment)).returncode == 0
    done = await run_cli("check", **world.environment)
    assert done.returncode == 0, done.stdout
    assert "Redis and Postgres agree; flushes: 1\n" in done.stdout
    assert done.stdout.endswith("\n13 checks: 0 failures, 1 warning\n"), "no worker runs"
    names = [finding["name"] for finding in json.loads((await run_cli("check", "--json", **world.environment)).stdout)]
    assert names == [
        "postgres version",
        "timescaledb",
        "schema",
        "postgres writing",
        "redis version",
        "redis role",
        "redis rights",
        "redis eviction",
        "redis persistence",
        "worker",
        "counters",
        "marker",
        "history",
    ]


async def test_check_fails_where_a_write_fails(world: World) -> None:
    """Rights and rows do not show it: the database is read-only, or another session has locked a table."""
    name = urlsplit(world.database_url).path[1:]
    await world.sql.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    done = await run_cli("check", **world.environment)
    assert done.returncode == 1, done.stdout
    assert "cannot execute INSERT in a read-only transaction" in done.stdout
    assert "lead to the primary" in done.stdout
    await world.sql.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE view_count_sources")
        done = await run_cli("check", PIPELINES="view_counts,chunk_requests", **world.environment)
    assert done.returncode == 1, done.stdout
    assert "lock timeout" in done.stdout
    assert "pg_locks" in done.stdout
    assert (await run_cli("check", **world.environment)).returncode == 0
    assert await world.sql.fetchval("SELECT count(*) FROM view_count_sources") == 0


async def test_check_names_the_worker_and_the_counters_in_quarantine(world: World, start: Start) -> None:
    settings = world.environment | {"PIPELINES": "view_counts,chunk_requests"}
    await world.redis.xadd(world.stream, {"data": '{"path": "/a"}'})
    done = await run_cli("check", "--json", **settings)
    assert done.returncode == 0, done.stderr
    idle = {found["name"]: found for found in json.loads(done.stdout)}
    for name in ("worker", f"stream {world.stream}"):
        assert idle[name]["level"] == "warning"
        assert idle[name]["found"].startswith("no worker holds the lease; ")
        assert "viewer-worker run" in idle[name]["remedy"]
    assert idle["worker"]["found"].endswith("nothing was flushed yet")
    assert (idle["counters"]["level"], idle["counters"]["found"]) == (
        "ok",
        "all can be counted; pending views: 0, pending ids: 0",
    )

    await world.view("good")
    await world.redis.set(world.prefix + "bad", "abc")
    await world.redis.lpush(world.prefix + "list", "1")
    worker = start(settings, "run")
    async with asyncio.timeout(30):
        while await world.totals() != world.truth or not await world.sql.fetchval(
            "SELECT bool_and(carried_at IS NOT NULL AND lease_until > now()) FROM stream_positions"
        ):
            await asyncio.sleep(0.1)
    done = await run_cli("check", **settings)
    assert done.returncode == 0, done.stdout
    holder = rf"\S+:{worker.process.pid}:\S+ runs and holds the lease"
    assert re.search(rf"^ok +worker +{holder}; last flush \d+[sm] ago$", done.stdout, re.MULTILINE)
    assert re.search(rf"^ok +stream \S+ *{holder}; carried to", done.stdout, re.MULTILINE)
    assert re.search(
        "^warning +counters +pending views: 0, pending ids: 0; 2 left as they are: ", done.stdout, re.MULTILINE
    )
    assert f"{world.prefix}bad: the value is not a whole number" in done.stdout
    assert f"{world.prefix}list: the key holds a list, not a number" in done.stdout
    assert "Delete it, or set it to a whole number" in done.stdout
    assert done.stdout.endswith("checks: 0 failures, 1 warning\n")
    assert "quarantined" not in done.stderr


async def test_check_warns_of_a_channel_that_another_source_may_use(world: World) -> None:
    environment = {name: value for name, value in world.environment.items() if name != "VIEW_CHANNEL"}
    for settings, warns in (({}, True), ({"VIEW_CHANNEL": "mine"}, False), ({"VIEW_COUNT_SOURCE": "counters"}, False)):
        done = await run_cli("check", **environment | settings)
        assert done.returncode == 0, done.stdout
        assert ("view channel" in done.stdout) is warns


async def test_check_reports_problems_and_their_fixes(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        assert (await run_cli("run", "--once", **world.environment)).returncode == 0
        await world.redis.set(world.keys.marker, "garbage")
        await world.redis.config_set("maxmemory", "100mb")
        await world.redis.config_set("maxmemory-policy", "allkeys-lru")
        await world.redis.config_set("appendonly", "no")
        done = await run_cli("check", "--json", **world.environment)
        assert done.returncode == 1
        findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
        assert findings["redis eviction"]["level"] == "failure"
        assert "noeviction" in findings["redis eviction"]["remedy"]
        assert findings["redis persistence"]["level"] == "warning"
        assert findings["marker"]["found"] == "the marker in Redis cannot be read"
        assert "viewer-worker adopt" in findings["marker"]["remedy"]


async def test_check_sweeps_once_and_only_where_views_are_counted(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        await world.view("b", 2)
        # One page finds the markers of other sources.
        for pipelines, pages in (("view_counts", 2), ("chunk_requests", 1)):
            await world.redis.config_resetstat()
            done = await run_cli("check", "--json", **world.environment, PIPELINES=pipelines)
            findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
            assert (await world.redis.info("commandstats"))["cmdstat_scan"]["calls"] == pages
            assert ({"counters", "marker", "history"} <= set(findings)) is (pipelines == "view_counts")
            if pipelines == "view_counts":
                assert findings["counters"]["found"] == "all can be counted; pending views: 7, pending ids: 2"


async def test_check_warns_before_redis_is_full(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        for limit, level in ((1 << 40, "ok"), (1 << 20, "warning")):
            await world.redis.config_set("maxmemory", limit)
            done = await run_cli("check", "--json", **world.environment)
            (found,) = [each for each in json.loads(done.stdout) if each["name"] == "redis eviction"]
            assert found["level"] == level
        assert re.fullmatch(r"noeviction, and \d+% of maxmemory is used", found["found"])
        assert "INCR" in found["remedy"]
        await world.redis.config_set("maxmemory", 0)


async def test_check_warns_of_what_exactness_does_not_cover(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world, World(valkey.url, database_url) as unrelated:
        nested = Keys(world.prefix.encode() + b"eu:")
        for keys in (nested, unrelated.keys):
            await world.redis.set(keys.marker, "of another source")
        await world.redis.config_set("replica-read-only", "no")
        await world.redis.config_set("aof-use-rdb-preamble", "no")
        done = await run_cli("check", "--json", **world.environment)
        assert done.returncode == 0, done.stdout
        warnings = {found["name"]: found for found in json.loads(done.stdout) if found["level"] == "warning"}
        assert set(warnings) == {"redis replicas", "redis AOF base", "redis prefixes", "worker"}
        assert "BGREWRITEAOF" in warnings["redis AOF base"]["remedy"]
        overlap = f"{world.prefix} and the prefix of another source overlap: {world.prefix}eu:"
        assert warnings["redis prefixes"]["found"] == overlap
        inner = await run_cli("check", **world.environment | {"VIEW_KEY_PREFIX": nested.prefix.decode() + "de:"})
        assert f"overlap: {world.prefix}eu:\n" in inner.stdout

        await world.redis.delete(nested.marker)
        await world.redis.execute_command("ACL SETUSER default -config")
        done = await run_cli("check", "--json", **world.environment)
        assert [found["name"] for found in json.loads(done.stdout) if found["level"] != "ok"] == ["worker"]
        assert await world.redis.acl_log() == []  # type: ignore[no-untyped-call]


def test_check_continues_when_a_server_is_unreachable() -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    done = cli("check", DATABASE_URL=f"postgresql://me:hunter2@{nowhere}/x", REDIS_URL=f"redis://:hunter2@{nowhere}")
    assert done.returncode == 69
    assert "postgres" in done.stdout
    assert "redis" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr


async def test_commands_that_change_views_refuse_a_writable_replica(valkey: ValkeyServer, database_url: str) -> None:
    async with World(valkey.url, database_url) as world:
        await world.view("a", 5)
        assert (await run_cli("run", "--once", **world.environment)).returncode == 0
        await world.view("a", 2)
        await world.redis.config_set("replica-read-only", "no")
        await world.redis.replicaof("127.0.0.1", str(free_port()))
        for command in ("run --once", "adopt --count-pending --yes", "forget a --yes"):
            done = await run_cli(*command.split(), **world.environment)
            assert done.returncode == 69, command
            assert done.stderr.endswith(f"viewer-worker: 127.0.0.1:{valkey.port}: its role is slave\n{MASTER}\n")
        assert (await world.totals(), await world.pending()) == ({"a": 5}, {"a": 2})
        await world.redis.replicaof("NO", "ONE")


@on_guarded_servers
async def test_adopt_shows_the_hold_asks_and_ends_it(world: World) -> None:
    await world.view("a", 5)
    assert (await run_cli("run", "--once", **world.environment)).returncode == 0
    agreed = await run_cli("adopt", **world.environment)
    assert agreed.returncode == 0
    assert "none: Redis and Postgres agree" in agreed.stdout

    await world.redis.set(world.keys.marker, "garbage")
    await world.view("b", 2)
    shown = await run_cli("adopt", **world.environment)
    assert shown.returncode == 0
    assert "hold      the marker in Redis cannot be read" in shown.stdout
    assert "pending   2 views of 1 id\n" in shown.stdout
    asked = await run_cli("adopt", "--count-pending", **world.environment)
    assert asked.returncode == 1
    assert "Nothing was changed" in asked.stdout
    assert (await run_cli("run", "--once", **world.environment)).returncode == 1
    assert (await run_cli("adopt", "--count-pending", "--discard-pending", **world.environment)).returncode == 2
    assert (await run_cli("adopt", "--count-pending", "--json", **world.environment)).returncode == 2
    found = json.loads((await run_cli("adopt", "--json", **world.environment)).stdout)
    assert found.pop("hold")["cause"] == "the marker in Redis cannot be read"
    assert found == {
        "marker": "garbage",
        "flushes": 1,
        "pending_views": 2,
        "pending_ids": 1,
        "largest": {"b": 2},
        "discarded": None,
    }
    done = await run_cli("adopt", "--count-pending", "--yes", "--json", **world.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["discarded"] == 0
    assert json.loads((await run_cli("adopt", "--json", **world.environment)).stdout)["hold"] is None
    assert (await run_cli("run", "--once", **world.environment)).returncode == 0
    assert await world.totals() == world.truth
    assert await world.pending() == Counter()


TARGET = {"VIEW_TARGET_TABLE": "Vod", "VIEW_TARGET_KEY": "id", "VIEW_TARGET_COLUMN": "viewCount"}


async def test_import_prints_what_it_imported(world: World) -> None:
    nothing = await run_cli("import", "--from-target", **world.environment)
    assert nothing.returncode == 78
    assert "VIEW_TARGET_TABLE is not set" in nothing.stderr
    assert (await run_cli("import", **world.environment | TARGET)).returncode == 2
    missing = await run_cli("import", "--from-target", **world.environment | TARGET)
    assert missing.returncode == 1
    assert "there is no table Vod" in missing.stderr
    await world.sql.execute('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" int)')
    await world.sql.execute("INSERT INTO \"Vod\" VALUES ('a', 40), ('b', 2), ('c', 0)")
    done = await run_cli("import", "--from-target", **world.environment | TARGET)
    assert (done.returncode, done.stdout) == (0, "3 rows of Vod: 2 totals imported, 42 views added\n")
    again = await run_cli("import", "--from-target", **world.environment | TARGET)
    assert again.stdout == "3 rows of Vod: 0 totals imported, 0 views added\n"


async def test_forget_shows_and_asks_first(world: World) -> None:
    await world.view("a", 3)
    await world.view("b", 1)
    assert (await run_cli("run", "--once", **world.environment)).returncode == 0
    await world.view("a", 2)
    asked = await run_cli("forget", "a", **world.environment)
    assert (asked.returncode, asked.stdout.splitlines()[0]) == (1, "a: 3 views in Postgres, 2 pending")
    done = await run_cli("forget", "a", "--yes", **world.environment)
    assert done.returncode == 0, done.stderr
    del world.truth["a"]
    await world.assert_exact()
    again = await run_cli("forget", "a", "--yes", **world.environment)
    assert again.returncode == 1
    assert "there is no id a: no total, no history, no counter" in again.stderr
    await world.redis.set(world.prefix + "in quarantine", "abc")
    known = await run_cli("forget", "in quarantine", **world.environment)
    assert "0 views in Postgres, 0 pending" in known.stdout


@on_open_and_guarded_servers
async def test_top_lists_the_most_viewed_ids(world: World) -> None:
    await world.view("popular", 1200)
    await world.view("evil\x1b[2J", 7)
    assert (await run_cli("run", "--once", **world.environment)).returncode == 0
    await world.view("popular", 34)
    shown = await run_cli("top", "--window", "1h", "--limit", "5", **world.environment)
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()[2:]]
    assert lines == [["views", "total", "id"], ["1,200", "1,234", "popular"], ["7", "7", "evil\\x1b[2J"]]
    document = json.loads((await run_cli("top", "--window", "1h", "--json", **world.environment)).stdout)
    assert [tuple(entry.values()) for entry in document["top"]] == [("popular", 1200, 1234), ("evil\x1b[2J", 7, 7)]
    assert set(document) == {"since", "asOf", "top"}
    await world.redis.set(world.keys.marker, "garbage")
    on_hold = await run_cli("top", **world.environment)
    assert "totals may be wrong" in on_hold.stdout

    shown = await run_cli("history", "popular", **world.environment)
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[2:] for line in shown.stdout.splitlines()[2:]] == [["1,200", "█" * 40]]
    answer = json.loads((await run_cli("history", "popular", "--bucket", "day", "--json", **world.environment)).stdout)
    assert [bucket["views"] for bucket in answer["buckets"]] == [1200]
    assert "no views" in (await run_cli("history", "nobody", **world.environment)).stdout


async def test_check_includes_the_table_of_the_application(world: World) -> None:
    done = await run_cli("check", **world.environment | TARGET)
    assert done.returncode == 1
    assert "there is no table Vod" in done.stdout
    await world.sql.execute('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" int)')
    done = await run_cli("check", **world.environment | TARGET)
    assert done.returncode == 0, done.stdout
    assert "Vod.viewCount fits" in done.stdout


@pytest.mark.parametrize(
    ("redirection", "code", "shown"),
    [(">&-", 0, b""), ("2>&-", 0, b"LOG_LEVEL=info"), ("<&- >&- 2>&-", 0, b""), ("2>&- LOG_LEVEL=loud", 78, b"")],
)
def test_streams_may_be_closed(redirection: str, code: int, shown: bytes) -> None:
    *closed, last = redirection.split()
    setting = last if "=" in last else ""
    shell = f"{setting} exec {sys.executable} -m worker config {' '.join(closed if setting else [*closed, last])}"
    done = subprocess.run(["/bin/sh", "-c", shell], env=clean_environment(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, b"")
    assert shown in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "koi8-r", "cp1252"])
def test_terminal_may_have_another_encoding(encoding: str) -> None:
    environment = clean_environment() | {"PYTHONIOENCODING": encoding, "VIEW_KEY_PREFIX": "видео…日本:"}
    done = subprocess.run([sys.executable, "-m", "worker", "config"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"VIEW_KEY_PREFIX=" in done.stdout
