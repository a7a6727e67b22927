"""The closed list of commands, their data, answers and errors, and the channel they travel on.

The names of Cloud Hypervisor's `vmm/src/api/mod.rs`, in the form that Python users expect. They are in
`public.py`, and looked up when they are asked for: who needs the channel alone is spared the data of all
commands.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as `typing` has it, without the time that its import takes
if TYPE_CHECKING:
    from cloudvmm.api.public import *  # noqa: F403
else:
    _MODULES = (
        "action",
        "call",
        "channel",
        "data",
        "error",
        "fleet",
        "frontend",
        "ping",
        "plumbing",
        "public",
    )

    def __getattr__(name: str) -> object:
        import sys

        module = name if name in _MODULES else "public"
        __import__(f"{__name__}.{module}")  # `importlib` is one more to load
        found = sys.modules[f"{__name__}.{module}"]
        if module == name:
            return found
        if not hasattr(found, name):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(found, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES, *__getattr__("__all__")})
