"""The fuzz target itself runs, and holds on a few thousand inputs."""

import runpy
from pathlib import Path

TARGET = Path(__file__).parents[3] / "fuzz" / "http_grammar.py"


def test_target_holds_on_mutated_requests():
    target = runpy.run_path(str(TARGET))
    assert target["run_plain"](3000, 1, None) == 3000
