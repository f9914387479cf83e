"""The demo's last lines agree with each other, and each broken promise is named."""

from __future__ import annotations

import io
from collections import Counter

from rich.console import Console

from worker.dev.report import Line, Views, event_line, print_report
from worker.dev.viewers import Reported

REPORTED_BY = {"both": Reported.BOTH, "counted": Reported.INCR, "[heard]": Reported.PUBLISH}


def views(stored: dict[str, int], pending: dict[str, int] | None = None, unconfirmed: int = 0) -> Views:
    """Ten views of each id were sent and confirmed."""
    unsure = Counter(dict.fromkeys(REPORTED_BY, unconfirmed))
    confirmed = Counter(dict.fromkeys(REPORTED_BY, 10))
    return Views(REPORTED_BY, confirmed, unsure, Counter(stored), Counter(pending or {}))


def report(lines: list[Line], code: int = 0) -> tuple[bool, str]:
    text = io.StringIO()
    passed = print_report(Console(file=text, soft_wrap=True), lines, 0, 1, code)
    return passed, text.getvalue()


def test_missed_messages_are_counted_and_only_incred_views_are_called_exact() -> None:
    sent, rows = Counter({"both": 10, "[heard]": 10}), Counter({"both": 10, "[heard]": 6})
    lines = [*views({"both": 10, "counted": 10, "[heard]": 7}).lines(), event_line(sent, rows)]
    passed, text = report(lines)
    assert passed
    ends = [line.split("   ")[-1] for line in text.splitlines() if line.startswith("  ")]
    assert ends[1:] == [
        "EXACT: each view counted once",
        "EXACT: each view counted once",
        "3 missed, none counted twice",
        "4 missed, none stored twice",
    ]
    assert "EXACT: INCRed views (2 ids compared), stream entries and gRPC calls; worker killed once.\n" in text
    assert "published while no worker listened are missed" in text


def test_every_broken_promise_is_named() -> None:
    found = views({"both": 9, "counted": 11, "[heard]": 12}, pending={"both": 1}, unconfirmed=1)
    twice = event_line(Counter({"[heard]": 10}), Counter({"[heard]": 12}))
    passed, text = report([*found.lines(), twice])
    assert not passed
    assert "both: 10 sent, 9 in Postgres\n" in text
    assert "both: 1 pending\n" in text
    assert "counted: 10 sent" not in text, "one of its views was not confirmed"
    assert "[heard]: 10 sent, 12 in Postgres\n" in text
    assert "[heard]: 10 sent, 12 rows\n" in text
    assert text.endswith(
        "DIFFERENT: INCR and PUBLISH; PUBLISH only; view_events; worker killed once, last exit code 0.\n"
    )
    assert "EXACT: INCRed" not in text


def test_a_worker_that_fails_at_the_end_fails_the_demo() -> None:
    passed, text = report(views(dict.fromkeys(REPORTED_BY, 10)).lines(), code=1)
    assert not passed
    assert text.endswith("DIFFERENT: worker killed once, last exit code 1.\n")
