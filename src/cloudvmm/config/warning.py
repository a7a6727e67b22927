"""Warnings: what is said in the log while a configuration is read or checked, and refused by nobody.

The texts are the reference's. Whoever reads or checks hands in where they go.
"""

from __future__ import annotations

from collections.abc import Callable

Warn = Callable[[str], None]


def unheard(text: str) -> None:
    """Where warnings go that nobody asked for."""
