"""The default guest: a small Linux for demos and tests, built from Debian's packages on first use.

`build` makes it, `locate` finds it, `GuestShell` (in `cloudvmm.guest.shell`) runs commands inside
it. What a VM is and how it is run is not known here.
"""

from cloudvmm.guest.builder import build
from cloudvmm.guest.cache import Guest, locate
from cloudvmm.guest.error import GuestBuildError, GuestError, GuestNotBuilt

__all__ = ["Guest", "GuestBuildError", "GuestError", "GuestNotBuilt", "build", "locate"]
