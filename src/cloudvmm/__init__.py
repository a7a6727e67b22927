"""cloudvmm: Cloud Hypervisor's VMM, API first, in Python, on QEMU.

`Vmm` is a VMM in your own process; `cloudvmm.client` speaks to one in another.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as `typing` has it, without the time that its import takes
if TYPE_CHECKING:
    from cloudvmm.daemon.vmm import Vmm

__version__ = "0.1.0"

__all__ = ["Vmm", "__version__"]


def __getattr__(name: str) -> object:
    # Looked up when it is asked for: this package is imported by all of its parts, and by the commands.
    if name != "Vmm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return importlib.import_module("cloudvmm.daemon.vmm").Vmm
