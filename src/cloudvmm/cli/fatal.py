"""The log line of what ends a program: every error of the chain by its name, in the reference's form."""

from __future__ import annotations


def fatal_text(error: BaseException) -> str:
    """Return `Fatal error: Outermost(Middle(Innermost('its text')))`."""
    return f"Fatal error: {_nested(error)}"


def _nested(error: BaseException) -> str:
    name = type(error).__name__
    if error.__cause__ is not None:
        return f"{name}({_nested(error.__cause__)})"
    return repr(error) if error.args else f"{name}({str(error)!r})"
