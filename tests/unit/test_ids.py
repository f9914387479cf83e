"""Ids made from text of any length."""

from __future__ import annotations

import pytest

from worker.contract.ids import MAX_ID_BYTES, check_id, fitting_id


def test_text_that_fits_is_its_own_id() -> None:
    assert fitting_id("/watch/é") == "/watch/é"
    assert fitting_id("é" * 128) == "é" * 128


@pytest.mark.parametrize("text", ["x" * 257, "é" * 200, "x" + "é" * 200, "€" * 100])
def test_text_that_is_too_long_becomes_a_unique_id(text: str) -> None:
    vod_id = fitting_id(text)
    assert check_id(vod_id) == vod_id
    assert MAX_ID_BYTES - 4 < len(vod_id.encode()) <= MAX_ID_BYTES
    beginning, _, digest = vod_id.rpartition("~")
    assert text.startswith(beginning)
    assert len(digest) == 32
    assert fitting_id(text + "!") != vod_id == fitting_id(text)
