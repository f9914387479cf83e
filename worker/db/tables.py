"""The tables as SQLAlchemy Core definitions. The migrations create them; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    func,
)

metadata = MetaData()

_timestamp = DateTime(timezone=True)

view_counts = Table(
    "view_counts",
    metadata,
    Column("vod_id", Text, primary_key=True),
    Column("views", BigInteger, nullable=False, server_default="0"),
    Column("counted", BigInteger, nullable=False, server_default="0"),
    Column("announced", BigInteger, nullable=False, server_default="0"),
    Column("updated_at", _timestamp, nullable=False, server_default=func.now()),
    # The part of `views` that was imported from the application's own table. NULL: nothing was imported.
    Column("imported", BigInteger),
)

view_counts_hourly = Table(
    "view_counts_hourly",
    metadata,
    Column("bucket", _timestamp, nullable=False),
    Column("vod_id", Text, nullable=False),
    Column("views", BigInteger, nullable=False),
    PrimaryKeyConstraint("vod_id", "bucket"),
)

# The ledger: what each flush took. It is the write-ahead log of what is still to be subtracted in Redis.
view_count_flushes = Table(
    "view_count_flushes",
    metadata,
    Column("source", Text, nullable=False),
    Column("flush_id", BigInteger, nullable=False),
    Column("flushed_at", _timestamp, nullable=False, server_default=func.now()),
    Column("nonce", Uuid, nullable=False),
    Column("prev_nonce", Uuid, nullable=False),
    Column("keys", Integer, nullable=False),
    # The sum over many ids can exceed a bigint.
    Column("views", Numeric, nullable=False),
    Column("worker_id", Text, nullable=False),
    # One element for each id, in the same order. The view `view_count_deltas` shows them as rows.
    Column("vod_ids", ARRAY(Text), nullable=False),
    Column("counted", ARRAY(BigInteger), nullable=False),
    Column("announced", ARRAY(BigInteger), nullable=False),
    # What was added to `view_counts.views`.
    Column("changes", ARRAY(BigInteger), nullable=False),
    PrimaryKeyConstraint("source", "flush_id"),
    CheckConstraint(
        "cardinality(vod_ids) = keys AND cardinality(counted) = keys AND cardinality(announced) = keys "
        "AND cardinality(changes) = keys",
        name="view_count_flushes_complete",
    ),
)

view_count_sources = Table(
    "view_count_sources",
    metadata,
    Column("source", Text, primary_key=True),
    Column("lineage", Uuid),
    Column("last_flush_id", BigInteger, nullable=False, server_default="0"),
    Column("last_nonce", Uuid),
    Column("settled_id", BigInteger, nullable=False, server_default="0"),
    # The column has the name of its main part, INFO's master_replid.
    Column("replid", Text, key="data_set_id"),
    Column("announced_nonce", Uuid),
    Column("refused", Text),
    Column("lease_holder", Text),
    Column("lease_epoch", BigInteger, nullable=False, server_default="0"),
    Column("lease_until", _timestamp),
    # When a marker last named the last flush. By the database's clock.
    Column("agreed_at", _timestamp),
    # The last flush whose views are in `view_counts_hourly`.
    Column("rolled_up_id", BigInteger, nullable=False, server_default="0"),
)

# Lineages before the one in `view_count_sources`, whose data set may return with its marker.
view_count_lineages = Table(
    "view_count_lineages",
    metadata,
    Column("source", Text, nullable=False),
    Column("lineage", Uuid, nullable=False),
    # The last flush of the lineage.
    Column("last_flush_id", BigInteger, nullable=False),
    Column("last_nonce", Uuid, nullable=False),
    Column("replid", Text, key="data_set_id"),
    # The marker that replaces that of the last flush. NULL: its data set did not return yet.
    Column("successor", Text),
    PrimaryKeyConstraint("source", "lineage"),
)

stream_positions = Table(
    "stream_positions",
    metadata,
    Column("source", Text, nullable=False),
    Column("stream", Text, nullable=False),
    Column("pipeline", Text, nullable=False),
    # The last entry that was carried.
    Column("last_ms", BigInteger, nullable=False, server_default="0"),
    Column("last_seq", BigInteger, nullable=False, server_default="0"),
    # The highest position before Redis went back. NULL: it never did, or all is carried again.
    Column("high_ms", BigInteger),
    Column("high_seq", BigInteger),
    # Of all entries ever added, those up to the position. NULL: not known.
    Column("entries_read", BigInteger, server_default="0"),
    Column("lost", BigInteger, nullable=False, server_default="0"),
    Column("gaps", BigInteger, nullable=False, server_default="0"),
    # The mark on the stream: the name of our group's consumer.
    Column("incarnation", Text),
    # The marks that were last offered for this row, newest first. One becomes the incarnation by the next commit.
    Column("candidate", Text),
    Column("carried_at", _timestamp),
    Column("lease_holder", Text),
    Column("lease_token", Uuid),
    Column("lease_until", _timestamp),
    PrimaryKeyConstraint("source", "stream"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("pipeline", Text, nullable=False),
    Column("received_at", _timestamp, nullable=False, server_default=func.now()),
    Column("origin", Text, nullable=False),
    Column("error_class", Text, nullable=False),
    Column("sqlstate", Text),
    Column("error", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Index("dead_letters_pipeline_idx", "pipeline", "id"),
)

# A row for each batch of records that came from a process's memory, for a day.
ingest_batches = Table(
    "ingest_batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("pipeline", Text, nullable=False),
    Column("at", _timestamp, nullable=False, server_default=func.now()),
    Index("ingest_batches_at_idx", "at"),
)
