"""Is the suite awake? Plants one mistake after another in a copy of the code, and sees whether the tests catch it.

Run by `make mutants`. Exit code 1 if a mistake survives. Each is a remedy of the flush protocol taken away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The quick and certain first; the property test finds what they do not think of.
TESTS = (
    "tests/unit/test_counters.py",
    "tests/integration/test_flush.py",
    "tests/integration/test_recovery.py",
    "tests/integration/test_lease.py",
    "tests/integration/test_adopt.py",
    "tests/integration/test_messages.py",
    "tests/integration/test_target.py",
    "tests/integration/test_target_fit.py",
    "tests/integration/test_total_import.py",
    "tests/integration/test_display.py",
    "tests/property",
)


@dataclass(frozen=True)
class Mutant:
    """In `file`, `old` (which must be there once) becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "settle before commit",
        "worker/counters/flush/flusher.py",
        "        return Committed(before, flush, changes, skipped)\n",
        "        committed = Committed(before, flush, changes, skipped)\n"
        "        await self.settler.settle(before, committed.marker, flush.counted)\n"
        "        return committed\n",
    ),
    Mutant(
        "no marker test in settle",
        "worker/counters/flush/settle.lua",
        "if marker ~= ARGV[1] then return {'moved', marker} end\n",
        "",
    ),
    Mutant(
        "no clamp in settle",
        "worker/counters/flush/settle.lua",
        "      if value ~= '0' then table.insert(take, {KEYS[i], value}) end\n      table.insert(zero, KEYS[i])\n",
        "      table.insert(take, {KEYS[i], taken})\n      if value == taken then table.insert(zero, KEYS[i]) end\n",
    ),
    Mutant(
        "no nonce",
        "worker/counters/flush/flusher.py",
        "flush = Flush(source.last_flush_id + 1, uuid4(),",
        "flush = Flush(source.last_flush_id + 1, source.last_nonce,",
    ),
    Mutant(
        "birth at last_flush_id",
        "worker/counters/flush/recovery.py",
        "        return Marker(lineage, source.settled_id, nonce)",
        "        return Marker(lineage, source.last_flush_id, source.last_nonce or nonce)",
    ),
    Mutant(
        "no row lock",
        "worker/db/counters/source_row.py",
        ".where(_this).with_for_update(skip_locked=True)\n_LOCK_PATIENTLY",
        ".where(_this)\n_LOCK_PATIENTLY",
    ),
    Mutant(
        "writes before looks in settle",
        "worker/counters/flush/settle.lua",
        "      table.insert(take, {KEYS[i], taken})\n    else",
        "      redis.call('DECRBY', KEYS[i], taken)\n    else",
    ),
    Mutant(
        "no probe before birth",
        "worker/counters/flush/birth.lua",
        "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'moved' end\n",
        "",
    ),
    Mutant(
        "deltas are not counted against the header",
        "worker/db/counters/ledger.py",
        "        if len(rows) != keys:\n            return None\n",
        "",
    ),
    Mutant(
        "an AOF restart is taken for an empty start",
        "worker/redis/client.py",
        'and (facts.get("aof_enabled") == 0 or facts.get("aof_base_size") == 0)',
        "and True",
    ),
    Mutant(
        "the refusal is not remembered",
        "worker/counters/flush/flusher.py",
        "await self.source_row.refuse(tx, str(verdict.refused))",
        "pass",
    ),
    Mutant(
        "two data sets share a lineage",
        "worker/counters/flush/recovery.py",
        "lineage, nonce, last_nonce = uuid4(), uuid4(), source",
        "lineage, nonce, last_nonce = source.lineage or uuid4(), source.last_nonce or uuid4(), source",
    ),
    Mutant(
        "identity asked for after the evidence",
        "worker/counters/flush/recovery.py",
        "self._start_lineage(judged, evidence.identity)",
        "self._start_lineage(judged, self.keys.identity(await self.redis.probe()))",
    ),
    Mutant(
        "settle is refused at maxmemory",
        "worker/counters/flush/settle.lua",
        "#!lua flags=allow-oom\n",
        "#!lua\n",
    ),
    Mutant(
        "no sign of life before the lock",
        "worker/counters/flush/flusher.py",
        "identity = self.keys.identity(await self.redis.probe())",
        "identity = None",
    ),
    Mutant(
        "sorted first, then the first hundred",
        "worker/counters/intake/pending.py",
        "return sorted(itertools.islice(self._found, count))",
        "return sorted(self._found)[:count]",
    ),
    Mutant(
        "retention goes by age alone",
        "worker/db/counters/ledger.py",
        ', _flush.flush_id < bindparam("settled"))',
        ', bindparam("settled") >= 0)',
    ),
    Mutant(
        "no epoch under the lock",
        "worker/counters/flush/flusher.py",
        "if not self.lease.covers(source):",
        "if False:",
    ),
    Mutant(
        "sums of messages copied after Redis is read",
        "worker/counters/flush/flusher.py",
        "            announced = self.announced.copy(ids, source.lease_epoch)\n"
        "            reading = await self.reader.read(ids)\n",
        "            reading = await self.reader.read(ids)\n"
        "            announced = self.announced.copy(ids, source.lease_epoch)\n",
    ),
    Mutant(
        "sums of another epoch are written",
        "worker/counters/intake/announced.py",
        "        if epoch != self._epoch:\n            return {}\n",
        "",
    ),
    Mutant(
        "takeover keeps the sums",
        "worker/counters/intake/announced.py",
        "            self.drop()\n            self._epoch = epoch\n",
        "            self._epoch = epoch\n",
    ),
    Mutant(
        "an ambiguous commit is taken for one that failed",
        "worker/counters/flush/flusher.py",
        "self.announced.confirm(source.announced_nonce)",
        "self.announced.confirm(None)",
    ),
    Mutant(
        "an ambiguous commit is taken for one that took place",
        "worker/counters/intake/announced.py",
        "        if nonce != written:\n            return\n",
        "",
    ),
    Mutant(
        "an ambiguous commit is looked up before the lock",
        "worker/counters/flush/flusher.py",
        "            source = await self.source_row.lock(tx)\n",
        "            unlocked = await self.source_row.read(tx)\n"
        "            self.announced.confirm(unlocked.announced_nonce if unlocked else None)\n"
        "            source = await self.source_row.lock(tx)\n",
    ),
    Mutant(
        "a row that refuses fails the flush",
        "worker/db/target/table.py",
        "            if not is_refused_by_row(error):\n                raise\n            if len(batch) == 1:\n",
        "            raise\n            if len(batch) == 1:\n",
    ),
    Mutant(
        "a trigger that fails in an unusual way fails the flush",
        "worker/db/errors.py",
        "not state.startswith(TRANSACTION_PREFIXES) and state not in TRANSACTION_STATES\n",
        "state.startswith(REFUSED_DATA_PREFIXES)\n",
    ),
    Mutant(
        "an import locks the rows that are there",
        "worker/db/counters/source_row.py",
        "    await tx.execute(_LOCK_ALL)\n",
        "    await tx.execute(select(_row.source).with_for_update())\n",
    ),
    Mutant(
        "an AOF that is written without a base is taken for an empty start",
        "worker/counters/flush/recovery.py",
        "return history.started_empty and (not history.by_its_aof or await self.redis.writes_a_base())",
        "return history.started_empty",
    ),
    Mutant(
        "another numbered database is the same data set",
        "worker/contract/keys.py",
        'history = f"{replid}/{self.database}" if self.database else replid',
        "history = replid",
    ),
    Mutant(
        "the probe has a lifetime",
        "worker/counters/flush/probe.lua",
        "redis.call('SET', KEYS[1], ARGV[1])",
        "redis.call('SET', KEYS[1], ARGV[1], 'EX', 3600)",
    ),
    Mutant(
        "a lease from a clock that was ahead is waited for",
        "worker/db/counters/source_row.py",
        "    _row.lease_until > _now + literal(2 * LEASE_TTL, Interval),\n",
        "",
    ),
    Mutant(
        "discarding takes what came since",
        "worker/counters/adopt.py",
        "min(now, shown.pop(vod_id))",
        "max(now, shown.pop(vod_id))",
    ),
    Mutant(
        "a reconnect is no gap",
        "worker/counters/intake/listener.py",
        "        gap = self._heard_before or epoch > 1\n",
        "        gap = False\n",
    ),
    Mutant(
        "the display adds what is pending to what was announced",
        "worker/counters/display.py",
        "        return Shown(stored.vod_id, stored.views + more, pending, stored.views)",
        "        return Shown(stored.vod_id, stored.views + pending, pending, stored.views)",
    ),
    Mutant(
        "the display does not know what is unsettled",
        "worker/counters/display.py",
        "max(0, value_now - stored.unsettled)",
        "value_now",
    ),
)


def main() -> int:
    wanted = sys.argv[1:]
    survivors = []
    for mutant in MUTANTS:
        if wanted and not any(word in mutant.name for word in wanted):
            continue
        began = time.monotonic()
        caught = _caught(mutant)
        print(f"{'caught' if caught else 'SURVIVED':9} {mutant.name}  ({time.monotonic() - began:.0f} s)", flush=True)
        if not caught:
            survivors.append(mutant.name)
    print(f"{len(survivors)} survived" if survivors else "all caught")
    return 1 if survivors else 0


def _caught(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory(prefix="viewer-worker-mutant-") as name:
        copy = Path(name)
        for part in ("worker", "tests", "alembic", "alembic.ini", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
            else:
                shutil.copy(source, copy)
        target = copy / mutant.file
        text = target.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its place in {mutant.file} is gone; bring tools/mutants.py up to date")
        target.write_text(text.replace(mutant.old, mutant.new))
        done = subprocess.run(
            # `python -m` puts the copy before the installed package.
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=copy,
            env=os.environ | {"PROPERTY_EXAMPLES": "100", "PROPERTY_SHRINK": "no"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):  # 1: tests failed; anything else means that they did not run
            raise SystemExit(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
        return done.returncode == 1


if __name__ == "__main__":
    raise SystemExit(main())
