"""The mistakes of tools/mutants.py fit the code: each text that one replaces occurs exactly once."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_each_mistake_can_be_planted() -> None:
    found = {mutant.name: (ROOT / mutant.file).read_text().count(mutant.old) for mutant in load_mutants().MUTANTS}
    assert {name: count for name, count in found.items() if count != 1} == {}
