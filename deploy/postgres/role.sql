-- The role that the worker runs as, with the rights that it needs and no others. Run it as the owner of the tables, in the
-- database and with the search_path that they are in, after each `viewer-worker migrate`; it may be run any number of times:
--
--   psql -v ON_ERROR_STOP=1 -f role.sql "$OWNER_URL"
--
-- Creating the role needs CREATEROLE; where the owner does not have that, let an administrator create it first. It has no
-- password until you give it one (in psql: \password viewer_worker). Where PUBLIC may not connect to the database, grant
-- it CONNECT, too.
--
-- With TimescaleDB this is all, too: chunks are made by the hypertable's owner and inherit its rights.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'viewer_worker') THEN
        CREATE ROLE viewer_worker LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION NOBYPASSRLS;
    END IF;
    -- Whichever schema the tables are in.
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO viewer_worker', current_schema());
END
$$;

GRANT SELECT                 ON viewer_worker_schema TO viewer_worker;
-- Totals and history are added to.
GRANT SELECT, INSERT, UPDATE ON view_counts          TO viewer_worker;
GRANT SELECT, INSERT, UPDATE ON view_counts_hourly   TO viewer_worker;
-- The ledger is written once, and deleted when it is older than VIEW_LEDGER_RETENTION.
GRANT SELECT, INSERT, DELETE ON view_count_flushes   TO viewer_worker;
-- One row for each source: the lease, and the lock that flushes take.
GRANT SELECT, INSERT, UPDATE ON view_count_sources   TO viewer_worker;
-- One row for each Redis that the source used before; `adopt` deletes them.
GRANT SELECT, INSERT, UPDATE, DELETE ON view_count_lineages TO viewer_worker;
-- One row for each stream: how far it is carried, and the lease.
GRANT SELECT, INSERT, UPDATE ON stream_positions     TO viewer_worker;
-- Records are written once, and deleted when they are older than their retention.
GRANT SELECT, INSERT, DELETE ON dead_letters         TO viewer_worker;
GRANT SELECT, INSERT, DELETE ON chunk_requests       TO viewer_worker;
GRANT SELECT, INSERT, DELETE ON metrics              TO viewer_worker;
GRANT SELECT, INSERT, DELETE ON view_events          TO viewer_worker;
-- One row for each batch of messages that were heard on the channel, for a day.
GRANT SELECT, INSERT, DELETE ON ingest_batches       TO viewer_worker;
-- These are also replaced by newer ones.
GRANT SELECT, INSERT, UPDATE, DELETE ON bars_1m        TO viewer_worker;
GRANT SELECT, INSERT, UPDATE, DELETE ON session_events TO viewer_worker;
