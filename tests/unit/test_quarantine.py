"""The quarantine is bounded in memory and in log lines."""

from __future__ import annotations

import pytest

from tests.support.fakes import FakeClock
from worker.counters.intake.quarantine import REMEMBERED_KEYS, REPORTED_KEYS, REST_S, Quarantine


def test_quarantine_lists_a_hundred_keys_and_drops_those_that_were_fixed() -> None:
    quarantine = Quarantine(FakeClock())
    for number in range(150):
        quarantine.report(b"key%d" % number, "bad")
    assert len(quarantine) == 150
    assert len(quarantine.listed()) == REPORTED_KEYS
    quarantine.next_sweep()
    quarantine.report(b"key7", "bad")
    quarantine.next_sweep()
    assert quarantine.listed() == {"key7": "bad"}


def test_quarantine_logs_a_key_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.counters.intake import quarantine as module

    logged: list[str] = []
    monkeypatch.setattr(module.log, "warning", lambda event, **_: logged.append(event), raising=False)
    clock = FakeClock()
    quarantine = Quarantine(clock)
    for _ in range(3):
        quarantine.report(b"key", "bad")
        quarantine.next_sweep()
    assert len(logged) == 1
    clock.advance(3601)
    quarantine.report(b"key", "bad")
    assert len(logged) == 2


def test_quarantine_is_bounded() -> None:
    quarantine = Quarantine(FakeClock())
    for number in range(REMEMBERED_KEYS + 500):
        quarantine.report(b"%d" % number, "bad")
    assert len(quarantine) == REMEMBERED_KEYS + 500
    quarantine.next_sweep()
    quarantine.next_sweep()
    assert len(quarantine) == 0


def test_resting_keys_are_bounded_and_the_newest_are_kept() -> None:
    quarantine = Quarantine(clock := FakeClock())
    for number in range(REMEMBERED_KEYS + 1):
        quarantine.report(b"%d" % number, "bad", rest=True)
    newest = b"%d" % REMEMBERED_KEYS
    assert quarantine.without_resting([newest, b"0"]) == [b"0"]
    clock.advance(REST_S)
    assert quarantine.without_resting([newest, b"0"]) == [newest, b"0"]
