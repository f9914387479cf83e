"""docs/reference/logs.md lists every event that the code logs, with its level and fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

ROOT = Path(__file__).parents[2]
TREES = {source: ast.parse(source.read_text()) for source in (ROOT / "worker").rglob("*.py")}
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
LOGGERS = r"log|(get_logger|logging\.getLogger)\(.*\)"
# A check's event by the method of Status that logs it.
CHECK_EVENTS = {"… ok": "ok", "… failing": "failing", "… on hold": "hold"}


@dataclass
class Event:
    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)


def test_reference_lists_every_event_with_its_level_and_fields() -> None:
    text = (ROOT / "docs" / "reference" / "logs.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z, ]+) \| ([^|]+) \|", text, re.MULTILINE)
    listed = {
        event: Event(set(levels.split(", ")), set(re.findall(r"`(\w+)`", names))) for event, levels, names in rows
    }
    assert len(listed) == len(rows), "an event is listed twice"
    assert listed == events_in_the_code()


def test_every_logger_has_a_name_that_the_other_test_finds() -> None:
    for source, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and re.fullmatch(LOGGERS, ast.unparse(node.value)):
                assert [ast.unparse(target) for target in node.targets] in (["log"], ["root"]), source


def events_in_the_code() -> dict[str, Event]:
    found: dict[str, Event] = {}
    for tree in TREES.values():
        calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in filter(is_logging, ast.walk(tree)):
            # A method that is passed on fails here: its events could not be found.
            call = calls[node]
            level, text = ([call.args[0]], call.args[1]) if node.attr == "log" else ([node], call.args[0])
            for event in texts(text):
                known = found.setdefault(event, Event())
                known.levels |= {name.lower() for part in level for name in attributes(part) if name.lower() in LEVELS}
                known.fields |= set(fields(call, event))
    return found


def is_logging(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in LEVELS | {"log"}
        and re.fullmatch(LOGGERS, ast.unparse(node.value)) is not None
    )


def attributes(node: ast.AST) -> Iterator[str]:
    return (each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute))


def texts(node: ast.expr) -> set[str]:
    """The events that an expression may be, with `…` for what changes from line to line."""
    match node:
        case ast.IfExp(body=one, orelse=other):
            return texts(one) | texts(other)
        case ast.JoinedStr(values=parts):
            return {"".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)}
        case ast.Constant(value=str(text)):
            return {text.replace("%s", "…")}
    raise AssertionError(f"not a literal text: {ast.unparse(node)}")


def fields(call: ast.Call, event: str) -> Iterator[str]:
    for keyword in call.keywords:
        if keyword.arg is None:
            yield from facts(CHECK_EVENTS[event])
        else:
            yield "exception" if keyword.arg == "exc_info" else keyword.arg


def facts(method: str) -> Iterator[str]:
    """Keywords of all calls such as `status.ok(name, role="idle")`."""
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                yield from (keyword.arg for keyword in node.keywords if keyword.arg)
