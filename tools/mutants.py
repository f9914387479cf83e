"""Mutation test: inserts one mistake at a time into a copy of the code and checks that the tests catch it.

Run by `make mutants`; arguments select mutants by words in their names. Exit code 1 if a mistake survives. Most
mistakes remove one safeguard of the flush protocol.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".dev", ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "node_modules"
)
# The property tests take two minutes. A mistake that is caught by this limit makes a test hang.
TEST_LIMIT_S = "600"
# Without those that compare the code with documents.
UNIT_TESTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests" / "unit").glob("test_*.py"))
    if path.name not in ("test_docs.py", "test_settings.py", "test_mutants.py", "test_log_events.py")
)
# Those that catch most come first. The property test finds what the others miss.
TESTS = (
    "tests/integration/test_flush.py",
    "tests/integration/test_recovery.py",
    "tests/integration/test_another_redis.py",
    "tests/integration/test_lease.py",
    "tests/integration/test_adopt.py",
    "tests/integration/test_messages.py",
    "tests/integration/test_target.py",
    "tests/integration/test_target_fit.py",
    "tests/integration/test_table_faults.py",
    "tests/integration/test_encoding.py",
    "tests/integration/test_total_import.py",
    "tests/integration/test_display.py",
    "tests/integration/test_history.py",
    "tests/integration/test_forget.py",
    *UNIT_TESTS,
    "tests/property",
)

STREAM_TESTS = (
    "tests/integration/test_streams.py",
    "tests/integration/test_stream_holds.py",
    "tests/integration/test_stream_traps.py",
    *UNIT_TESTS,
    "tests/property/test_stream_protocol.py",
)

WRITER_TESTS = (
    "tests/unit/test_batcher.py",
    "tests/unit/test_buffer.py",
    "tests/unit/test_buffered_source.py",
    "tests/unit/test_drain.py",
    "tests/unit/test_writer_metrics.py",
    "tests/integration/test_writer.py",
    "tests/integration/test_writer_faults.py",
    "tests/integration/test_sync_writer.py",
    "tests/integration/test_sink_isolation.py",
    "tests/acceptance/test_writer_crash.py",
)


EVENT_TESTS = (
    "tests/unit/test_view_event_documents.py",
    "tests/unit/test_channel_receiver.py",
    "tests/unit/test_buffer_writer.py",
    "tests/integration/test_view_events.py",
)

RECORD_TESTS = (
    "tests/integration/test_conflict_rules.py",
    "tests/integration/test_record_table.py",
    "tests/integration/test_session_store.py",
)


@dataclass(frozen=True)
class Mutant:
    """Replaces `old`, which occurs in `file` exactly once, by `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS


MUTANTS = (
    Mutant(
        "settle before commit",
        "worker/counters/flush/commit.py",
        "        return Committed(before, flush, changes, skipped)\n",
        "        committed = Committed(before, flush, changes, skipped)\n"
        "        from worker.counters.flush.settle import Settler\n"
        "        settler = Settler(self.stores.redis, self.stores.keys, self.metrics)\n"
        "        await settler.settle(before, committed.marker, flush.counted)\n"
        "        return committed\n",
    ),
    Mutant(
        "settle does not compare the marker",
        "worker/counters/flush/settle.lua",
        "if marker ~= ARGV[1] then return {'moved', marker} end\n",
        "",
    ),
    Mutant(
        "settle subtracts more than the counter has",
        "worker/counters/flush/settle.lua",
        "      table.insert(clamped, i - 2)\n      table.insert(emptied, i)\n",
        "      table.insert(clamped, i - 2)\n      table.insert(reduced, i)\n",
    ),
    Mutant(
        "a flush reuses the last nonce",
        "worker/counters/flush/commit.py",
        "flush = Flush(row.last_flush_id + 1, uuid4(),",
        "flush = Flush(row.last_flush_id + 1, row.last_nonce,",
    ),
    Mutant(
        "marker created at last_flush_id",
        "worker/counters/flush/recovery.py",
        "        return Marker(lineage, row.settled_id, nonce)",
        "        return Marker(lineage, row.last_flush_id, row.last_nonce or nonce)",
    ),
    Mutant(
        "the source row is not locked",
        "worker/db/counters/source_row.py",
        ".where(_this).with_for_update(skip_locked=True)\n_LOCK_PATIENTLY",
        ".where(_this)\n_LOCK_PATIENTLY",
    ),
    Mutant(
        "settle writes before it has read everything",
        "worker/counters/flush/settle.lua",
        "      table.insert(reduced, i)\n    else",
        "      redis.call('DECRBY', KEYS[i], taken)\n    else",
    ),
    Mutant(
        "marker created without checking the probe",
        "worker/counters/flush/create_marker.lua",
        "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 'moved' end\n",
        "",
    ),
    Mutant(
        "a restart from an AOF counts as an empty start",
        "worker/redis/client.py",
        'and (facts.get("aof_enabled") == 0 or facts.get("aof_base_size") == 0)',
        "and True",
    ),
    Mutant(
        "a refused marker is not recorded",
        "worker/counters/flush/commit.py",
        "await self.stores.source_row.refuse(tx, str(verdict.refused))",
        "pass",
    ),
    Mutant(
        "two data sets share a lineage",
        "worker/counters/flush/recovery.py",
        "lineage, nonce, last_nonce = uuid4(), uuid4(), row",
        "lineage, nonce, last_nonce = row.lineage or uuid4(), row.last_nonce or uuid4(), row",
    ),
    Mutant(
        "identity read after the evidence",
        "worker/counters/flush/recovery.py",
        "last_nonce, row.settled_id, evidence.data_set_id)",
        "last_nonce, row.settled_id, await self.stores.probe_data_set())",
    ),
    Mutant(
        "another Redis takes over at once",
        "worker/counters/flush/agreement.py",
        "return recently and self.lineage != row.lineage",
        "return False",
    ),
    Mutant(
        "a worker never goes on with a Redis that lost its data",
        "worker/counters/flush/agreement.py",
        "return recently and self.lineage != row.lineage",
        "return recently",
    ),
    Mutant(
        "agreement without views is not recorded",
        "worker/counters/flush/commit.py",
        "if agreed != (row.last_flush_id, data_set_id, None, 0):",
        "if agreed[0] != row.last_flush_id or row.refused is not None:",
    ),
    Mutant(
        "a lineage whose marker was deleted in place stays known",
        "worker/counters/flush/recovery.py",
        "if evidence.origin is Origin.APART:",
        "if evidence.origin is not Origin.UNKNOWN:",
    ),
    Mutant(
        "past lineages stay known although their views may be counted under another",
        "worker/counters/flush/recovery.py",
        "await source_row.forget_lineages(tx)",
        "pass",
    ),
    Mutant(
        "past lineages stay known after adopt",
        "worker/counters/adopt.py",
        "await source_row.forget_lineages(tx)",
        "pass",
    ),
    Mutant(
        "a data set is taken up again as often as its old marker returns",
        "worker/counters/flush/recovery.py",
        "await source_row.continue_lineage(tx, marker.lineage, successor.encode().decode())",
        "pass",
    ),
    Mutant(
        "a data set is taken up again before its flushes are settled",
        "worker/counters/flush/verdict.py",
        "if ahead < 0:",
        "if ahead < 0 and past is None:",
    ),
    Mutant(
        "a data set that was used before counts as new without its marker",
        "worker/counters/flush/recovery.py",
        "return not await self.stores.source_row.is_past(tx, data_set_id)",
        "return True",
    ),
    Mutant(
        "a replica has the identity of its master",
        "worker/redis/client.py",
        'return _text(facts, "master_replid") if facts.get("role") == "master" else None',
        'return _text(facts, "master_replid")',
    ),
    Mutant(
        "a worker on hold keeps the lease",
        "worker/counters/loop.py",
        "self._lets_others_try = isinstance(outcome, Hold)",
        "self._lets_others_try = False",
    ),
    Mutant(
        "settle is refused at maxmemory",
        "worker/counters/flush/settle.lua",
        "#!lua flags=allow-oom\n",
        "#!lua\n",
    ),
    Mutant(
        "Redis not probed before the lock",
        "worker/counters/flush/commit.py",
        "data_set_id = await self.stores.probe_data_set()",
        "data_set_id = None",
    ),
    Mutant(
        "pending keys sorted before the batch is taken",
        "worker/counters/intake/pending.py",
        "return sorted(itertools.islice(self._found, count))",
        "return sorted(self._found)[:count]",
    ),
    Mutant(
        "retention deletes unsettled flushes",
        "worker/counters/retention.py",
        "min(row.settled_id - 1, row.rolled_up_id)",
        "row.rolled_up_id",
    ),
    Mutant(
        "retention passes the history",
        "worker/counters/retention.py",
        "min(row.settled_id - 1, row.rolled_up_id)",
        "row.settled_id - 1",
    ),
    Mutant(
        "the history is written without the lock of the source row",
        "worker/db/counters/history.py",
        ".where(_this).with_for_update()\n_POSITIONS",
        ".where(_this)\n_POSITIONS",
    ),
    Mutant(
        "the history does not move rolled_up_id in its transaction",
        "worker/db/counters/history.py",
        "        .values(rolled_up_id=upto.c.flush_id)",
        "        .values(rolled_up_id=_source.rolled_up_id)",
    ),
    Mutant(
        "rolled_up_id is not compared",
        "worker/db/counters/history.py",
        ".where(_flush.source == name, _flush.flush_id > rolled_up)",
        ".where(_flush.source == name, rolled_up >= 0)",
    ),
    Mutant(
        "forget leaves other sources out of the history",
        "worker/counters/forget.py",
        "for source in await all_sources(tx):",
        "for source in [source_row.name]:",
    ),
    Mutant(
        "lease epoch not checked under the lock",
        "worker/counters/flush/commit.py",
        "if not self.lease.covers(row.lease_holder, row.lease_epoch):",
        "if False:",
    ),
    Mutant(
        "message sums copied after Redis is read",
        "worker/counters/flush/commit.py",
        "            announced = self.announced.copy(ids, row.lease_epoch)\n"
        "            reading = await self.reader.read(ids)\n",
        "            reading = await self.reader.read(ids)\n"
        "            announced = self.announced.copy(ids, row.lease_epoch)\n",
    ),
    Mutant(
        "message sums of another epoch are written",
        "worker/counters/intake/announced.py",
        "        if epoch != self._epoch:\n            return {}\n",
        "",
    ),
    Mutant(
        "takeover keeps old message sums",
        "worker/counters/intake/announced.py",
        "            self.drop()\n            self._epoch = epoch\n",
        "            self._epoch = epoch\n",
    ),
    Mutant(
        "an ambiguous commit counts as failed",
        "worker/counters/flush/commit.py",
        "self.announced.resolve_sent(row.announced_nonce)",
        "self.announced.resolve_sent(None)",
    ),
    Mutant(
        "an ambiguous commit counts as committed",
        "worker/counters/intake/announced.py",
        "        if nonce != written:\n            return\n",
        "",
    ),
    Mutant(
        "an ambiguous commit is checked before the lock",
        "worker/counters/flush/commit.py",
        "            row = await self.stores.source_row.lock(tx)\n",
        "            unlocked = await self.stores.source_row.read(tx)\n"
        "            self.announced.resolve_sent(unlocked.announced_nonce if unlocked else None)\n"
        "            row = await self.stores.source_row.lock(tx)\n",
    ),
    Mutant(
        "a row that refuses fails the flush",
        "worker/db/target/table.py",
        "bisect(batch, attempt, _is_refused, adding.refuse)",
        "bisect(batch, attempt, lambda error: False, adding.refuse)",
    ),
    Mutant(
        "an unusual trigger error fails the flush",
        "worker/db/errors.py",
        "    return not concerns_all or _is_raised_in_a_function(error)\n",
        "    return not concerns_all\n",
    ),
    Mutant(
        "a full disk counts as a row that refuses",
        "worker/db/errors.py",
        "    return not concerns_all or _is_raised_in_a_function(error)\n",
        "    return True\n",
    ),
    Mutant(
        "a fault of the table is blamed on ids",
        "worker/counters/flush/flusher.py",
        "(too_slow or kind is ErrorClass.ROW) and not progress.tables_work:\n",
        "False:\n",
    ),
    Mutant(
        "the trial tries no id that has a total",
        "worker/counters/flush/trial.py",
        ", *await ledger.known_ids(tx, suspect, KNOWN_IDS)]\n",
        "]\n",
    ),
    Mutant(
        "a slow flush never makes batches smaller than the initial size",
        "worker/counters/flush/batch_size.py",
        "        self._reduce(max(1, keys // 2))\n",
        "        self._reduce(self._smallest)\n",
    ),
    Mutant(
        "ids that cannot be stored reach the flush",
        "worker/counters/intake/backlog.py",
        "if not self.database.can_store(vod_id):",
        "if False:",
    ),
    Mutant(
        "an import locks only existing source rows",
        "worker/db/counters/source_row.py",
        "    await tx.execute(_LOCK_ALL)\n",
        "    await tx.execute(select(_row.source).with_for_update())\n",
    ),
    Mutant(
        "an AOF without a base counts as an empty start",
        "worker/counters/flush/recovery.py",
        "        if history.by_its_aof and not await self.stores.redis.writes_a_base():\n            return False\n",
        "",
    ),
    Mutant(
        "two Redis databases count as one data set",
        "worker/contract/keys.py",
        'history = f"{replid}/{self.database}" if self.database else replid',
        "history = replid",
    ),
    Mutant(
        "the probe expires",
        "worker/counters/flush/probe.lua",
        "redis.call('SET', KEYS[1], ARGV[1])",
        "redis.call('SET', KEYS[1], ARGV[1], 'EX', 3600)",
    ),
    Mutant(
        "waits for a lease from a clock that was ahead",
        "worker/db/lease_sql.py",
        "        row.lease_until > NOW + literal(2 * LEASE_TTL, Interval),\n",
        "",
    ),
    Mutant(
        "discarding subtracts views that came later",
        "worker/counters/adopt.py",
        "min(now, shown.pop(vod_id))",
        "max(now, shown.pop(vod_id))",
    ),
    Mutant(
        "a reconnect does not count as a gap",
        "worker/redis/listener.py",
        "        gap = self._receiver.begin(token) or self._heard_before\n",
        "        gap = self._receiver.begin(token) and False\n",
    ),
    Mutant(
        "the display adds pending views to announced views",
        "worker/counters/display.py",
        "        return Shown(stored.vod_id, stored.views + more, pending, stored.views, is_exact)",
        "        return Shown(stored.vod_id, stored.views + pending, pending, stored.views, is_exact)",
    ),
    Mutant(
        "the display ignores unsettled views",
        "worker/counters/display.py",
        "max(0, value_now - stored.unsettled)",
        "value_now",
    ),
    Mutant(
        "streams: the position of a batch in hand is mirrored",
        "worker/pipelines/sources/stream/source.py",
        'seen = await self._looker.look(self._row, expected.last, self._count(), "")',
        'seen = await self._looker.look(expected, expected.last, self._count(), "")',
        STREAM_TESTS,
    ),
    Mutant(
        "streams: the claim is taken in a transaction of its own",
        "worker/pipelines/sink.py",
        "                if not await batch.claim.take(tx):\n                    return NotClaimed()\n",
        "                async with self._database.transaction() as other:\n"
        "                    if not await batch.claim.take(other):\n                        return NotClaimed()\n",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: the claim is not checked",
        "worker/pipelines/sink.py",
        "                if not await batch.claim.take(tx):\n                    return NotClaimed()\n",
        "                await batch.claim.take(tx)\n",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: the token is not compared",
        "worker/db/positions.py",
        '        _row.lease_token == bindparam("token", type_=Uuid),\n',
        '        bindparam("token", type_=Uuid).is_not(None),\n',
        STREAM_TESTS,
    ),
    Mutant(
        "streams: high is ignored",
        "worker/pipelines/sources/stream/judge.py",
        "if evidence.next_entry is not None and row.high is not None and evidence.next_entry <= row.high:",
        "if False:",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: bisect outside of savepoints",
        "worker/pipelines/sink.py",
        "            async with tx.begin_nested():\n                rows = ",
        "            if True:\n                rows = ",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: letters of refused records are not written",
        "worker/pipelines/sink.py",
        "await write_letters(tx, self._record.name, letters)",
        "await write_letters(tx, self._record.name, batch.letters)",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: a mark that the row did not offer is taken over",
        "worker/pipelines/sources/stream/judge.py",
        '    if evidence.mark not in (row.candidate or "").split():\n',
        "    if evidence.mark is None:\n",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: the second answer decides",
        "worker/pipelines/sources/stream/source.py",
        "judge(row, seen.first, seen.ids, owner, self._subject)",
        "judge(row, seen.second, seen.ids, owner, self._subject)",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: an empty XRANGE is nothing",
        "worker/pipelines/sources/stream/look.py",
        "    if not entries or entries[0][0] != evidence.next_entry:\n        return False\n",
        "",
        STREAM_TESTS,
    ),
    Mutant(
        "streams: trimming does not spare other groups",
        "worker/pipelines/sources/stream/look.lua",
        "    if is_above(limit, other['last-delivered-id']) then limit = other['last-delivered-id'] end\n",
        "",
        STREAM_TESTS,
    ),
    Mutant(
        "writer: the ticket is not checked",
        "worker/db/tickets.py",
        'return (await tx.execute(_TAKE, {"ticket": self.id, "of_pipeline": self.pipeline})).rowcount == 1',
        'return (await tx.execute(_TAKE, {"ticket": self.id, "of_pipeline": self.pipeline})).rowcount < 2',
        WRITER_TESTS,
    ),
    Mutant(
        "writer: rows outside of the ticket's transaction",
        "worker/pipelines/sink.py",
        "                if not await batch.claim.take(tx):\n                    return NotClaimed()\n",
        "                async with self._database.transaction() as other:\n"
        "                    if not await batch.claim.take(other):\n                        return NotClaimed()\n",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: capacity is released before the commit",
        "worker/pipelines/buffer.py",
        "                self.taken += len(closed.items)\n",
        "                self.taken += len(closed.items)\n"
        "                self._release(len(closed.items), sum(len(it) + OVERHEAD_BYTES for _, it in closed.items))\n",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: a batch that may be written gets new tickets",
        "worker/pipelines/drain.py",
        "if attempt.is_too_slow and len(batch.items) > 1 and attempt.unanswered is None:",
        "if (attempt.is_too_slow or attempt.unanswered) and len(batch.items) > 1:",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: a batch that may be written is dropped",
        "worker/pipelines/drain.py",
        "            if attempt.isolates and attempt.unanswered is None:\n",
        "            if attempt.isolates:\n",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: a batch that may be written is tried for ever",
        "worker/pipelines/drain.py",
        "return any(now - began > GIVE_UP_S for",
        "return any(now - began > float('inf') for",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: a batch that was written without an answer is counted as nothing",
        "worker/pipelines/drain.py",
        "outcome if isinstance(outcome, Written) else attempt.unanswered or Written()",
        "outcome if isinstance(outcome, Written) else Written()",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: a cancelled write counts as not written",
        "worker/pipelines/drain.py",
        "return self.outcome is None and (self.is_committing or self.unanswered is not None)",
        "return self.outcome is None and self.unanswered is not None",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: flush waits for the youngest batch only",
        "worker/pipelines/sources/buffered.py",
        "        while min(self._in_flight, default=self._buffer.taken) < target:\n",
        "        while max(self._in_flight, default=self._buffer.taken) < target:\n",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: the child of a fork writes what the parent holds",
        "worker/pipelines/buffer.py",
        "        self._lock = self._budget.lock\n        self._batcher.clear()\n"
        "        self._bytes = self.held = self.accepted = self.coalesced = self.taken = self.refused = 0\n",
        "        self._lock = self._budget.lock\n",
        WRITER_TESTS,
    ),
    Mutant(
        "writer: the child of a fork uses its parent's thread",
        "worker/inprocess/thread.py",
        "        self._loop = self._thread = None\n",
        "",
        WRITER_TESTS,
    ),
    Mutant(
        "records: the first of two rows with one key wins",
        "worker/db/upsert.py",
        "self._position_of(row) >= self._position_of(winners[key])",
        "self._position_of(row) > self._position_of(winners[key])",
        RECORD_TESTS,
    ),
    Mutant(
        "records: an older event replaces a newer one",
        "worker/db/upsert.py",
        "where=or_(is_newer, stored[rule.position[0]] > latest)",
        "where=or_(is_newer, stored[rule.position[0]] > 0)",
        RECORD_TESTS,
    ),
    Mutant(
        "records: a position far ahead is for ever",
        "worker/db/upsert.py",
        "where=or_(is_newer, stored[rule.position[0]] > latest)",
        "where=is_newer",
        RECORD_TESTS,
    ),
    Mutant(
        "records: a text that contains the separator is split",
        "worker/db/packed_text.py",
        "        if all(_fits(*each, separator, null) for each in zip(texts, columns, strict=True)):\n",
        "        if texts:\n",
        RECORD_TESTS,
    ),
    Mutant(
        "records: a full buffer refuses a session that it holds",
        "worker/pipelines/buffer.py",
        "            if key is not None and self._replace(key, document):\n                return True\n",
        "            if self.held < self._capacity and key is not None and self._replace(key, document):\n"
        "                return True\n",
        RECORD_TESTS,
    ),
    Mutant(
        "view events: a message is taken while another worker may hear it",
        "worker/pipelines/sources/channel.py",
        "        elif not self._lease.is_sure:\n",
        "        elif self._lease.token is None:\n",
        EVENT_TESTS,
    ),
    Mutant(
        "view events: what was set aside is stored by the next lease",
        "worker/pipelines/sources/channel.py",
        "        if token != self._token:\n            self._forget_aside()\n",
        "",
        EVENT_TESTS,
    ),
    Mutant(
        "view events: the lease counts as sure without a renewal",
        "worker/db/lease.py",
        "        if state is not None and state.is_renewed:\n",
        "        if state is not None:\n",
        EVENT_TESTS,
    ),
    Mutant(
        "view events: the first listener counts a gap",
        "worker/db/positions.py",
        "        if state is not None and not was_held:\n",
        "        if state is not None and was_held:\n",
        EVENT_TESTS,
    ),
    Mutant(
        "view events: what was dropped is left at the end",
        "worker/pipelines/buffer_writer.py",
        "        self._tally.dropped += 1\n",
        "",
        EVENT_TESTS,
    ),
)


def main() -> int:
    wanted = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not wanted or any(word in mutant.name for word in wanted)]
    # Where the tests fail without a mistake, they would seem to catch every one.
    if (failure := _fail(dict.fromkeys(test for mutant in chosen for test in mutant.tests))) is not None:
        raise SystemExit(f"the tests fail without any mistake\n{failure}")
    survivors = []
    for mutant in chosen:
        began = time.monotonic()
        caught = _fail(mutant.tests, mutant) is not None
        print(f"{'caught' if caught else 'SURVIVED':9} {mutant.name}  ({time.monotonic() - began:.0f} s)", flush=True)
        if not caught:
            survivors.append(mutant.name)
    print(f"{len(survivors)} survived" if survivors else "all caught")
    return 1 if survivors else 0


def _fail(tests: Iterable[str], mutant: Mutant | None = None) -> str | None:
    """Run the tests on a copy, with the mistake if there is one. Returns the end of the report when one fails."""
    with tempfile.TemporaryDirectory(prefix="viewer-worker-mutant-") as name:
        copy = Path(name) / "repository"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        if mutant is not None:
            _plant(mutant, copy / mutant.file)
        done = subprocess.run(
            # `python -m` puts the copy before the installed package.
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", TEST_LIMIT_S, *tests],
            cwd=copy,
            env=os.environ | {"PROPERTY_EXAMPLES": "100", "PROPERTY_SHRINK": "no"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1):  # 1: tests failed; any other code: they did not run
            raise SystemExit(f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
        return done.stdout[-2000:] if done.returncode == 1 else None


def _plant(mutant: Mutant, target: Path) -> None:
    text = target.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} does not have the text once; update tools/mutants.py")
    target.write_text(text.replace(mutant.old, mutant.new))


if __name__ == "__main__":
    raise SystemExit(main())
