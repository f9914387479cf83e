"""Makes the parts of the view counters, and connects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.contract.keys import Keys
from worker.counters.adopt import Adoption
from worker.counters.display import Display
from worker.counters.flush.agreement import Agreement
from worker.counters.flush.batch_size import BatchSize
from worker.counters.flush.commit import Committer
from worker.counters.flush.flusher import Flusher
from worker.counters.flush.reading import CounterReader
from worker.counters.flush.recovery import Recovery
from worker.counters.flush.settle import Settler
from worker.counters.flush.totals import TotalsChannel
from worker.counters.flush.trial import Trial
from worker.counters.forget import Forgetting
from worker.counters.history import RollUp
from worker.counters.intake.announced import Announced
from worker.counters.intake.backlog import Backlog
from worker.counters.intake.messages import MessageSummer
from worker.counters.intake.pending import Pending, Sweep
from worker.counters.intake.quarantine import Quarantine
from worker.counters.intake.receiver import AnnouncedReceiver
from worker.counters.loop import FlushLoop
from worker.counters.retention import Retention
from worker.counters.standby import Standby
from worker.counters.stores import Stores
from worker.db.counters.ledger import Ledger
from worker.db.counters.source_row import SourceRow
from worker.db.lease import Lease
from worker.db.read_limit import ReadLimit
from worker.db.target.table import REASONS, TargetTable
from worker.observability.status import MESSAGES
from worker.redis.listener import Listener, listen_timeout
from worker.runtime.clock import SystemClock
from worker.runtime.worker_id import new_worker_id

if TYPE_CHECKING:
    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.redis.client import RedisClient
    from worker.settings.model import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewCounters:
    """The view counters of one worker: the loops that run, and what commands and endpoints use."""

    loop: FlushLoop
    listener: Listener[int]
    lease: Lease[int]
    retention: Retention
    target: TargetTable | None
    flusher: Flusher
    backlog: Backlog
    adoption: Adoption
    forgetting: Forgetting
    display: Display


def build_counters(
    settings: Settings,
    database: Database,
    redis: RedisClient,
    status: Status,
    metrics: Metrics,
    limit: ReadLimit | None = None,
    quarantine: Quarantine | None = None,
) -> ViewCounters:
    """Nothing is read or written yet. `limit` is the one that other reads of this database share."""
    clock = SystemClock()
    worker_id = new_worker_id()
    stores = Stores(
        database=database,
        ledger=Ledger(settings.view_source_name, worker_id, settings.view_count_source),
        source_row=SourceRow(settings.view_source_name),
        redis=redis,
        keys=make_keys(settings),
    )
    lease = Lease(database, stores.source_row, worker_id, status)
    backlog = _build_backlog(settings, stores, metrics, Quarantine(clock) if quarantine is None else quarantine)
    batch_size = BatchSize(settings.batch_size, settings.batch_size_max)
    flusher = _build_flusher(settings, stores, lease, backlog, batch_size, status, metrics)
    drain_timeout = listen_timeout(settings.shutdown_timeout.total_seconds())
    loop = FlushLoop(
        lease=lease,
        backlog=backlog,
        flusher=flusher,
        roll_up=RollUp(database, settings.view_source_name, metrics, clock),
        standby=Standby(stores, flusher.recovery.agreement),
        batch_size=batch_size,
        interval=settings.batch_interval_ms / 1000,
        drain_timeout=drain_timeout,
        status=status,
        metrics=metrics,
        clock=clock,
    )
    listener = Listener(
        name=MESSAGES,
        redis=redis,
        channel=settings.view_channel,
        lease=lease,
        receiver=AnnouncedReceiver(
            announced=backlog.announced, messages=MessageSummer(metrics, clock), flushing=loop, metrics=metrics
        ),
        status=status,
        drain_timeout=drain_timeout,
    )
    settler, recovery, reader = flusher.settler, flusher.recovery, flusher.committer.reader
    return ViewCounters(
        loop=loop,
        listener=listener,
        lease=lease,
        retention=Retention(stores, lease, status, settings.view_ledger_retention),
        target=flusher.committer.target,
        flusher=flusher,
        backlog=backlog,
        adoption=Adoption(stores=stores, settler=settler, recovery=recovery),
        forgetting=Forgetting(stores=stores, reader=reader, settler=settler, recovery=recovery),
        display=Display(stores, settings.view_count_source, limit or ReadLimit()),
    )


def _build_backlog(settings: Settings, stores: Stores, metrics: Metrics, quarantine: Quarantine) -> Backlog:
    clock = SystemClock()
    backlog = Backlog(
        pending=Pending(clock),
        sweep=Sweep(stores.redis, stores.keys, clock),
        announced=Announced(metrics, clock),
        quarantine=quarantine,
        keys=stores.keys,
        redis=stores.redis,
        database=stores.database,
    )
    if not settings.listens:
        backlog.announced.ended.set()
    return backlog


def _build_flusher(
    settings: Settings,
    stores: Stores,
    lease: Lease[int],
    backlog: Backlog,
    batch_size: BatchSize,
    status: Status,
    metrics: Metrics,
) -> Flusher:
    for reason in REASONS:  # the series exist from the start
        metrics.target_skipped.labels(reason)
    settler, agreement = Settler(stores.redis, stores.keys, metrics), Agreement()
    committer = Committer(
        stores=stores,
        target=make_target_table(settings),
        lease=lease,
        announced=backlog.announced,
        reader=CounterReader(stores.redis, stores.keys, backlog.quarantine),
        agreement=agreement,
        metrics=metrics,
    )
    recovery = Recovery(
        stores=stores,
        settler=settler,
        metrics=metrics,
        status=status,
        agreement=agreement,
        trust_lost_marker=settings.view_on_lost_marker == "fresh",
    )
    return Flusher(
        stores=stores,
        committer=committer,
        settler=settler,
        recovery=recovery,
        trial=Trial(stores=stores),
        batch_size=batch_size,
        quarantine=backlog.quarantine,
        totals=TotalsChannel(stores.redis, settings.view_totals_channel),
        metrics=metrics,
        clock=SystemClock(),
    )


def make_keys(settings: Settings) -> Keys:
    return Keys(settings.view_key_prefix.encode(), settings.redis.database)


def make_target_table(settings: Settings) -> TargetTable | None:
    return None if settings.view_target is None else TargetTable(settings.view_target, SystemClock())
