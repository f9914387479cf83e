"""What the endpoints under `/v1` share: they read the request in the same way, and answer errors in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote_to_bytes

from aiohttp import web

from worker.contract.ids import InvalidId
from worker.errors import DatabaseRefused, Unavailable, ViewerWorkerError
from worker.observability.printable import excerpt
from worker.web.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from aiohttp.typedefs import Handler

# Keep bytes of a URL that are not UTF-8, so that an id is refused. Replacing them would make it another id.
UNCHANGED = "surrogateescape"


class BadRequest(ViewerWorkerError):
    """The request is invalid; the message says what is expected."""


class NotFound(ViewerWorkerError):
    """The request is valid, and there is nothing to answer."""


def answering(answer: Callable[[web.Request], Awaitable[dict[str, Any]]]) -> Handler:
    """Answer 400 to an invalid request, 404 where nothing is found, and 503 while a server cannot be asked.

    The body has the reason.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return Answer(200, await answer(request)).response()
        except (BadRequest, InvalidId) as error:
            return Answer(400, {"error": str(error)}).response()
        except NotFound as error:
            return Answer(404, {"error": str(error)}).response()
        except (Unavailable, DatabaseRefused) as error:
            return Answer(503, {"error": str(error), "remedy": error.remedy}).response()

    return handle


def read_path(request: web.Request) -> bytes:
    """What follows `/v1/<endpoint>/` in the path, with slashes, decoded."""
    return _decode(_rest_of_path(request))


def read_pair(request: web.Request) -> tuple[bytes, bytes]:
    """What follows `/v1/<endpoint>/` in the path, before and after its first slash, decoded."""
    first, _, second = _rest_of_path(request).partition("/")
    return _decode(first), _decode(second)


def _rest_of_path(request: web.Request) -> str:
    _, _, _, *quoted = request.rel_url.raw_path.split("/", 3)
    return "".join(quoted)


def _decode(quoted: str) -> bytes:
    return unquote_to_bytes(quoted.encode(errors=UNCHANGED))


def read_list(request: web.Request, name: str) -> list[bytes]:
    """The items of a parameter, decoded: commas separate them, but a comma that is percent-encoded is part of one.

    The parameter may be repeated. Empty items are left out.
    """
    found = []
    for field in request.rel_url.raw_query_string.split("&"):
        quoted_name, _, quoted = field.partition("=")
        if _decode(quoted_name) == name.encode():
            found += [_decode(item.replace("+", " ")) for item in quoted.split(",") if item]
    return found


def read_query(request: web.Request) -> list[tuple[str, str]]:
    """The parameters, in their order."""
    return parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True, errors=UNCHANGED)


def read_parameters(request: web.Request, known: Sequence[str] = ()) -> dict[str, str]:
    """The parameters by name. Raises BadRequest for an unknown one, and for one that is given twice."""
    refuse_unknown(request, known)
    found: dict[str, str] = {}
    for name, value in read_query(request):
        if name in found:
            raise BadRequest(f"{name}: expected once")
        found[name] = value
    return found


def refuse_unknown(request: web.Request, known: Sequence[str]) -> None:
    """Raises BadRequest for an unknown parameter."""
    for name, _ in read_query(request):
        if name not in known:
            expected = f"expected only {', '.join(known)}" if known else "expected none"
            raise BadRequest(f"unknown parameter {excerpt(name.encode(errors=UNCHANGED))}: {expected}")
