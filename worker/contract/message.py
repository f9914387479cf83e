"""The message on the channel: `{"vodId": "vod_123", "count": 1}`. Producers publish it, the worker reads it."""

from __future__ import annotations

import json

DEFAULT_CHANNEL = "view_count_updates"
MAX_MESSAGE_BYTES = 64 * 1024
MAX_COUNT = 10**9


def encode_message(vod_id: str, count: int) -> str:
    """The message for `count` views of an id."""
    return json.dumps({"vodId": vod_id, "count": count}, ensure_ascii=False, separators=(",", ":"))
