"""The binaries; the place where an engine is chosen."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudvmm.cli import error as error
else:

    def __getattr__(name: str) -> object:
        # `cli.error` is there when one is raised or caught: a start needs none of these classes.
        if name != "error":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return importlib.import_module("cloudvmm.cli.error")
