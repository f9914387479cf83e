"""The files of the page, and the headers that keep it from loading or running anything else."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Path → file and its type. The paths in the page are relative, so that it works below any path of a proxy.
FILES = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/plots.js": ("plots.js", "text/javascript"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/uplot.css": ("uplot.css", "text/css"),
    "/page/uplot.js": ("uplot.js", "text/javascript"),
}


def file_routes() -> list[web.RouteDef]:
    folder = files(__package__) / "static"
    return [web.get(path, _serve((folder / name).read_bytes(), kind)) for path, (name, kind) in FILES.items()]


def _serve(body: bytes, kind: str) -> Handler:
    tag = sha256(body).hexdigest()[:16]

    async def handle(request: web.Request) -> web.StreamResponse:
        is_known = any(known.value in (tag, "*") for known in request.if_none_match or ())
        response = web.Response(status=304) if is_known else web.Response(body=body, content_type=kind, charset="utf-8")
        response.headers.update(HEADERS)
        response.etag = tag
        return response

    return handle
