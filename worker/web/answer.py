"""The answer of every endpoint except /metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP status code and a JSON document. Caches are asked not to store it."""

    code: int
    body: Mapping[str, object]

    def response(self) -> web.Response:
        text = json.dumps(self.body, ensure_ascii=False) + "\n"
        # What is not Unicode stays JSON: an escape.
        body = text.encode(errors="backslashreplace")
        headers = {"Cache-Control": "no-store", "Content-Type": "application/json; charset=utf-8"}
        return web.Response(body=body, status=self.code, headers=headers)
