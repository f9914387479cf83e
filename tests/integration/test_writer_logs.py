"""A Writer in a process that does not configure logs: warnings go to the standard loggers, without secrets."""

from __future__ import annotations

from urllib.parse import urlsplit

from tests.support.written import WrittenRecords

SECRET = "correct-horse"
PROGRAM = """
import logging
if len(sys.argv) > 2:
    class Show(logging.Handler):
        def emit(self, record): print(record.levelname, record.name, record.getMessage(), file=sys.stderr)
    logging.getLogger("worker").addHandler(Show())
async def use(url):
    async with Writer.chunk_requests(url, capacity=5, batch_timeout=0.01) as writer:
        for number in range(7): writer.send(event(number))
        writer.send(None)
        await writer.flush(0.3)
        await writer.shutdown(0)
async def main():
    await asyncio.gather(*map(use, sys.argv[1:]))
asyncio.run(main())
"""
# It cannot be reached, has no such name, is not there, or has no TLS.
PLACES = ("127.0.0.1:1/none", "nowhere.invalid/none", "{server}/does_not_exist", "{server}/{name}?sslmode=require")


async def test_errors_of_the_connection_are_logged_without_secrets(written: WrittenRecords) -> None:
    found = urlsplit(written.url)
    server, name = f"{found.hostname}:{found.port}", found.path.removeprefix("/")
    login = f"postgresql://{found.username}:{SECRET}@"
    out, err = await written.run(PROGRAM, *(login + place.format(server=server, name=name) for place in PLACES))
    assert out == ""
    assert SECRET not in err
    for cause in ("127.0.0.1:1", "nowhere.invalid", "does_not_exist", "SSL"):
        (line,) = {line for line in err.splitlines() if "records not written" in line and cause in line}
        assert line.startswith("WARNING worker.pipelines.drain records not written cause=")
    assert "WARNING worker.writer record refused pipeline='chunk_requests' cause='buffer full' refused=1" in err
    assert "ERROR worker.writer record cannot be encoded" in err
    assert "ERROR worker.writer records left at shutdown" in err


async def test_without_any_handler_warnings_go_to_stderr(written: WrittenRecords) -> None:
    out, err = await written.run(PROGRAM, written.url)
    assert out == ""
    assert "record refused" in err
