"""Threads of the server import at once: what several of them may load first is loaded in one way.

msgspec loads its own parts while it is loaded: it holds its lock and wants theirs. Whoever asks for a part
first holds the part's lock and wants the package's, and one of the two fails. So it is asked for as a whole.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cloudvmm

SOURCE = Path(cloudvmm.__file__).parent


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module)


def test_msgspec_is_loaded_as_a_whole() -> None:
    asked = {
        (str(path.relative_to(SOURCE)), name) for path in SOURCE.rglob("*.py") for name in imported(path)
    }

    assert ("control/edit.py", "msgspec") in asked
    assert [(path, name) for path, name in sorted(asked) if name.startswith("msgspec.")] == []
