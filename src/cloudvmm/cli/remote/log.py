"""The remote's few log lines, in the form of the reference's logger, and how `RUST_LOG` silences them."""

from __future__ import annotations

import os
import sys
import time

TARGET = "ch_remote"
REPORT_TARGET = "cloud_hypervisor"

_LEVELS = ("off", "error", "warn", "info", "debug", "trace")
_ERROR = 1


def log_error(text: str, *, target: str = TARGET) -> None:
    """Write `text` to standard error unless `RUST_LOG` silences `target`."""
    if level_of(target, os.environ.get("RUST_LOG", "")) < _ERROR:
        return
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sys.stderr.write(f"[{moment} ERROR {target}] {text}\n")


def note(text: str) -> None:
    """Tell the user what would otherwise happen silently; the reference says nothing of it."""
    sys.stderr.write(f"warning: {text}\n")


def level_of(target: str, directives: str) -> int:
    """Return the finest level that `directives` let through for `target`: 0 is none, 1 errors alone.

    Directives are `level`, `target` or `target=level`, with commas between; the longest target that `target`
    begins with decides. Without any only errors are let through; with some, what none names is silent.
    """
    rules = _rules(directives)
    if not rules:
        return _ERROR
    fitting = [(len(name), level) for name, level in rules if target.startswith(name)]
    return max(fitting, default=(0, 0))[1]


def _rules(directives: str) -> list[tuple[str, int]]:
    rules = []
    for directive in directives.partition("/")[0].split(","):
        name, equals, level = directive.strip().partition("=")
        if equals and level.lower() in _LEVELS:
            rules.append((name, _LEVELS.index(level.lower())))
        elif not equals and name.lower() in _LEVELS:
            rules.append(("", _LEVELS.index(name.lower())))
        elif not equals and name:
            rules.append((name, len(_LEVELS) - 1))
    return rules
