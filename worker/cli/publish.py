"""`viewer-worker publish`."""

from __future__ import annotations

import os
import signal
import stat
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from worker.cli.exits import EXIT_FAILURE, EXIT_UNAVAILABLE, fail
from worker.cli.options import EnvFile, LogLevel, plural, read_settings, wrong
from worker.contract.message import MAX_COUNT
from worker.observability.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

    from worker.producer.client import SyncViewProducer
    from worker.producer.publish import Tally
    from worker.settings.model import Settings

STDIN = Path("-")
TIMEOUT_S = 5.0


def publish(
    vod_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="The id that was viewed.", show_default=False)
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=MAX_COUNT, help="How many views of ID to record.")] = 1,
    from_log: Annotated[
        Path | None,
        typer.Option(
            "--from-log",
            metavar="FILE",
            help="Record a view for each request in this access log (combined format); - reads standard input.",
        ),
    ] = None,
    from_line: Annotated[int, typer.Option("--from-line", min=1, help="Start at this line of the log.")] = 1,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Record views in Redis as an application does: of one ID, or one view for each request in an access log.

    The id of a request is its path without the query.
    The views of a log count as of now, whatever times the log has.
    Exit code 69 when Redis cannot be reached or refuses the views, 1 when some were sent and not confirmed.
    If it stops early, it prints which lines are published, which are uncertain, and how to continue.
    """
    if (vod_id is None) == (from_log is None):
        raise wrong("give one of them", "ID", "--from-log")
    settings = read_settings(env_file, log_level)
    with _producer(settings) as producer:
        if vod_id is not None:
            _publish_one(producer, vod_id, count)
        elif from_log is not None:
            with _open(from_log) as log:
                _publish_log(producer, log, from_line)


def _open(path: Path) -> AbstractContextManager[BinaryIO]:
    if path == STDIN:
        if sys.stdin is None:
            raise wrong("standard input is closed", "--from-log")
        return nullcontext(sys.stdin.buffer)
    try:
        return path.open("rb")
    except OSError as error:
        raise wrong(f"{path} cannot be read: {error.strerror}", "--from-log") from None


def _producer(settings: Settings) -> SyncViewProducer:
    from worker.producer.client import SyncViewProducer

    return SyncViewProducer(
        settings.redis_url.get_secret_value(),
        prefix=settings.view_key_prefix,
        channel=settings.view_channel,
        timeout=TIMEOUT_S,
        raise_errors=True,
    )


def _publish_one(producer: SyncViewProducer, vod_id: str, count: int) -> None:
    from worker.errors import InvalidView, RedisUnavailable, ViewIndeterminate, ViewNotRecorded

    views = f"{count} {plural(count, 'view')} of {printable(vod_id)}"
    try:
        producer.record(vod_id, count)
    except InvalidView as error:
        raise wrong(str(error), "ID") from None
    except ViewNotRecorded as error:
        fail(f"not published: {error}", error.remedy or RedisUnavailable.remedy, EXIT_UNAVAILABLE)
    except ViewIndeterminate as error:
        fail(f"{views} may or may not be counted: {error}", "Publishing again may count twice.", EXIT_FAILURE)
    typer.echo(f"published {views}")


def _publish_log(producer: SyncViewProducer, log: BinaryIO, from_line: int) -> None:
    from worker.errors import RedisUnavailable, ViewIndeterminate, ViewNotRecorded
    from worker.producer.access_log import read_access_log
    from worker.producer.publish import Tally, publish_log

    tally, deferred = Tally(from_line), DeferredSignals()
    ending: tuple[str, str, int] | None = None
    try:
        with _progress(log) as watched:
            publish_log(read_access_log(watched, from_line), producer, tally, deferred)
        if tally.lines and not tally.views:
            ending = (
                "no line of the log is a request",
                "Check that it is an access log in the combined format, and not compressed.",
                EXIT_FAILURE,
            )
        elif not tally.lines and from_line > 1:
            ending = (f"the log has no line {from_line}", "", EXIT_FAILURE)
    except ViewNotRecorded as error:
        ending = _stopped(tally, str(error), error.remedy or RedisUnavailable.remedy, EXIT_UNAVAILABLE)
    except ViewIndeterminate as error:
        first, last = tally.next_line, tally.last_tried
        lines = f"line {first}" if first == last else f"lines {first} to {last}"
        remedy = f"To skip what is uncertain, continue with --from-line {last + 1}; to repeat it, --from-line {first}."
        ending = (f"{lines} may or may not be counted: {error}", remedy, EXIT_FAILURE)
    except OSError as error:
        ending = _stopped(tally, str(error), "", EXIT_FAILURE)
    except KeyboardInterrupt:
        ending = _stopped(tally, "interrupted", "", deferred.exit_code)
    try:
        _print_summary(tally)
    finally:
        if ending is not None:  # printed even if standard output cannot be written
            fail(*ending)


def _stopped(tally: Tally, cause: str, remedy: str, code: int) -> tuple[str, str, int]:
    line = tally.next_line
    return f"stopped before line {line}: {cause}", f"{remedy} Continue with --from-line {line}.".strip(), code


def _print_summary(tally: Tally) -> None:
    numbers = {"lines": tally.lines, "views": tally.views, "ids": len(tally.ids), "malformed": tally.malformed}
    for name, number in numbers.items():
        typer.echo(f"{name:<10}{number:>12,}")
    for line in tally.examples:
        typer.echo(f"  {line}")


@contextmanager
def _progress(log: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the log. A progress bar is shown when stderr is a terminal and the log is a regular file."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    status = os.fstat(log.fileno())
    if not (console.is_terminal and stat.S_ISREG(status.st_mode)):
        yield log
        return
    with Progress(console=console) as progress:
        yield progress.wrap_file(log, total=status.st_size, description="publishing")


class DeferredSignals:
    """Defers Ctrl-C and SIGTERM: inside a `with` block, KeyboardInterrupt is raised only when the block has ended.

    Outside of the block it is raised immediately.
    """

    def __init__(self) -> None:
        self._inside = False
        self._signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it."""
        return 128 + (self._signal or 0)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if not self._inside:
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        if self._signal is not None and error is None:
            raise KeyboardInterrupt
