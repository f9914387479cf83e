"""Settings of a transaction that writes what was taken from Redis."""

from __future__ import annotations

from sqlalchemy import func, select, text

# Local to the transaction. A worker that freezes in it loses its locks and the transaction together; a confirmed
# commit, which later steps rely on, is on disk even where the database's default is weaker.
LOCAL_SETTINGS = {
    "synchronous_commit": "on",
    "lock_timeout": "5s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "8s",
    # Plan a batch for its size: for an unknown size, Postgres would join its rows one by one.
    "plan_cache_mode": "force_custom_plan",
}
SETTINGS = [func.set_config(name, value, True) for name, value in LOCAL_SETTINGS.items()]
APPLY_SETTINGS = select(*SETTINGS)
CHECK_CONSTRAINTS_NOW = text("SET CONSTRAINTS ALL IMMEDIATE")
