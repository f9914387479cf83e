"""The name of a worker, in the lease and in the ledger."""

from __future__ import annotations

import itertools
import os
import secrets
import socket

# Differs after each restart. Host and process id may not: in a container every worker is process 1.
_PROCESS = secrets.token_hex(4)
_workers = itertools.count(1)


def new_worker_id() -> str:
    """`host:pid:process.worker`."""
    return f"{socket.gethostname()}:{os.getpid()}:{_PROCESS}.{next(_workers)}"


def has_died_here(worker_id: str) -> bool:
    """True when the worker ran on this host and its process is gone."""
    host, _, rest = worker_id.rpartition(":")[0].rpartition(":")
    process = worker_id.rpartition(":")[2].partition(".")[0]
    if host != socket.gethostname() or not rest.isdecimal():
        return False
    if int(rest) == os.getpid():
        return process != _PROCESS
    try:
        os.kill(int(rest), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False
