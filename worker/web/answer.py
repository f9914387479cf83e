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
        text = json.dumps(self.body) + "\n"
        return web.json_response(text=text, status=self.code, headers={"Cache-Control": "no-store"})
