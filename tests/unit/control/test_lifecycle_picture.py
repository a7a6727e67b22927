"""The picture of the states is the table's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cloudvmm.api.data import VmState
from cloudvmm.control.lifecycle import TRANSITIONS

ROOT = Path(__file__).resolve().parents[3]


def _script():
    spec = importlib.util.spec_from_file_location("draw_lifecycle", ROOT / "scripts" / "draw_lifecycle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_table_draws():
    page = (ROOT / "docs" / "state-machine.md").read_text(encoding="utf-8")

    assert page == _script().render(TRANSITIONS), "out of date: run scripts/draw_lifecycle.py"


def test_check_passes_on_the_page_as_it_is():
    assert _script().main(["--check"]) == 0


def test_check_fails_on_a_page_that_lacks_a_transition(tmp_path, monkeypatch):
    script = _script()
    shorter = {**TRANSITIONS, VmState.PAUSED: frozenset({VmState.SHUTDOWN})}
    old_page = tmp_path / "state-machine.md"
    old_page.write_text(script.render(shorter), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", old_page)

    assert script.main(["--check"]) == 1


def test_every_transition_is_an_arrow_and_nothing_else_is():
    drawn = {
        tuple(line.strip().split(" --> "))
        for line in _script().render(TRANSITIONS).splitlines()
        if " --> " in line and "[*]" not in line
    }

    assert drawn == {
        (state.value, target.value) for state, targets in TRANSITIONS.items() for target in targets
    }
