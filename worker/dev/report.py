"""The demo's report: what was sent, what is in Postgres, and whether that is what is promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape

from worker.dev.viewers import Reported

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

DIFFERENCES_SHOWN = 10
MESSAGES_ARE_BEST_EFFORT = (
    "Messages are best effort, since Redis does not keep them: those published while no worker listened are missed,\n"
    "and so are those that a killed worker had not written yet."
)


@dataclass(frozen=True, slots=True)
class Line:
    """`result` says how the rows meet the promise. `differences` say how they break it; without any it is kept."""

    name: str
    ids: int | None
    sent: int
    stored: int
    result: str
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Views:
    """Views by id. `stored`: in Postgres, without those of earlier runs. `unconfirmed`: may be counted or not."""

    reported_by: Mapping[str, Reported]
    confirmed: Counter[str]
    unconfirmed: Counter[str]
    stored: Counter[str]
    pending: Counter[str]

    def lines(self) -> list[Line]:
        """One line for each way of reporting a view."""
        return [self._line(reported) for reported in Reported]

    def _line(self, reported: Reported) -> Line:
        ids = [vod_id for vod_id, how in self.reported_by.items() if how is reported]
        sent, stored = _of(self.confirmed, ids), _of(self.stored, ids)
        result = (
            f"{max(0, sent - stored):,} missed, none counted twice"
            if reported is Reported.PUBLISH
            else "[bold green]EXACT[/]: each view counted once"
        )
        wrong = tuple(text for vod_id in ids for text in self._differences(vod_id, reported))
        return Line(reported.value, len(ids), sent, stored, result, wrong)

    def _differences(self, vod_id: str, reported: Reported) -> Iterable[str]:
        least, stored = self.confirmed[vod_id], self.stored[vod_id]
        lost = stored < least and reported is not Reported.PUBLISH
        if lost or stored > least + self.unconfirmed[vod_id]:
            yield f"{vod_id}: {least:,} sent, {stored:,} in Postgres"
        if self.pending[vod_id]:
            yield f"{vod_id}: {self.pending[vod_id]:,} pending"


def event_line(sent: Counter[str], rows: Counter[str]) -> Line:
    """Messages and rows of view_events, by id. Each message is at most one row."""
    wrong = tuple(f"{vod_id}: {sent[vod_id]:,} sent, {rows[vod_id]:,} rows" for vod_id in rows - sent)
    missed = (sent - rows).total()
    return Line("view_events", None, sent.total(), rows.total(), f"{missed:,} missed, none stored twice", wrong)


def print_report(console: Console, lines: list[Line], unconfirmed: int, kills: int, code: int) -> bool:
    """Print the lines and the result of all of them. `code` is the worker's last exit code.

    Returns True if every promise was kept and the worker ended with exit code 0.
    """
    console.print(f"\n  {'':<18}{'ids':>7}{'sent':>12}{'in Postgres':>14}")
    for line in lines:
        ids = "" if line.ids is None else f"{line.ids:,}"
        result = "[bold red]DIFFERENT[/]" if line.differences else line.result
        console.print(f"  {line.name:<18}{ids:>7}{line.sent:>12,}{line.stored:>14,}   {result}")
        for text in line.differences[:DIFFERENCES_SHOWN]:
            console.print(f"    [red]{escape(text)}[/]")
    if unconfirmed:
        console.print(f"  {'unconfirmed':<25}{unconfirmed:>12,}  views (may be counted or not)")
    killed = "worker killed " + ("once" if kills == 1 else f"{kills} times")
    differing = [line.name for line in lines if line.differences]
    if differing or code:
        ended = f"{killed}, last exit code {code}"
        console.print(f"\n[bold red]DIFFERENT[/]: {'; '.join([*differing, ended])}.")
        return False
    exact = sum(line.ids or 0 for line in lines if line.name != Reported.PUBLISH.value)
    console.print(
        f"\n[bold green]EXACT[/]: INCRed views ({exact:,} {'id' if exact == 1 else 'ids'} compared), "
        f"stream entries and gRPC calls; {killed}.\n{MESSAGES_ARE_BEST_EFFORT}"
    )
    return True


def _of(views: Counter[str], ids: Iterable[str]) -> int:
    return sum(views[vod_id] for vod_id in ids)
