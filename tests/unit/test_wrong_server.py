"""Which errors of Redis mean that a new connection may reach the right server."""

from __future__ import annotations

import pytest
from redis._parsers.base import BaseParser

from worker.errors import RedisUnavailable
from worker.redis.pool import is_of_wrong_server

# As the servers send them.
WRONG = [
    "READONLY You can't write against a read only replica.",
    "READONLY You can't write against a read only replica. script: 1ac6, on @user_script:1.",
    "ERR Error running script (call to f_1ac6): @user_script:1: -READONLY You can't write against a read only replica.",
    "EXECABORT Transaction discarded because of: READONLY You can't write against a read only replica.",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
    "LOADING Redis is loading the dataset in memory",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOREPLICAS Not enough good replicas to write.",
]
RIGHT = [
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "OOM command not allowed when used memory > 'maxmemory'.",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "NOPERM User viewer has no permissions to run the 'incrby' command",
    "EXECABORT Transaction discarded because of previous errors.",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR unknown command 'x', with args beginning with: 'NOT READONLY'",
]


@pytest.mark.parametrize(("answer", "wrong"), [*((each, True) for each in WRONG), *((each, False) for each in RIGHT)])
def test_error_means_the_wrong_server(answer: str, wrong: bool) -> None:
    error = BaseParser.parse_error(answer)
    assert is_of_wrong_server(error) is wrong
    assert is_of_wrong_server([1, [b"OK", error]]) is wrong
    translated = RedisUnavailable("it cannot be used")
    translated.__cause__ = error
    assert is_of_wrong_server(translated) is wrong


@pytest.mark.parametrize("reply", [None, 1, b"READONLY", [b"READONLY", 1]])
def test_reply_that_is_no_error_is_of_the_right_server(reply: object) -> None:
    assert not is_of_wrong_server(reply)
